"""The published recipes on tiny base models with the traits of the published ones, from end to end."""

import json

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo.commands.main import main
from sapo.commands.recipes import find_recipe
from sapo.data.chat_template import template_digest, use_chat_template
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, collate_examples
from sapo.data.prepare import prepare_dataset
from sapo.weights.description import load_template_tokenizer
from tests.bases import BASES, CONVERSATION, save_base
from tests.runs import metrics_of
from tests.tiny import write_rows

SMALLER = (
    "--use_cpu", "--bf16", "false", "--dtype", "float32", "--optim", "adamw_torch", "--max_steps", "2",
    "--report_to", "none", "--per_device_train_batch_size", "2", "--max_length", "320", "--logging_steps", "1",
    "--gradient_checkpointing", "false",
)  # fmt: skip
SELF_PLAY = ("--max_prompt_length", "240", "--segment_length", "16", "--report_pairs", "0", "--chosen_probe_size", "2")


def rows(count=6):
    return [{"messages": CONVERSATION[: 3 if place % 2 else 5]} for place in range(count)]


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "train_sft.jsonl", rows())


def train(recipe, model, data, out, *more):
    published = yaml.safe_load(find_recipe(recipe).read_text())
    own = () if published["objective"] == "sft" else SELF_PLAY
    given = (
        "--model_name_or_path",
        model,
        "--dataset_name",
        data,
        "--output_dir",
        out,
        "--dataset_train_split",
        "train",
    )
    command = ["train", "--quiet", "--config", recipe, *map(str, given), *SMALLER, *own, *more]
    assert main(command) == 0
    return out


def ready(folder, marker, size):
    """A saved model that says all by itself: template, EOS token, embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.chat_template
    assert tokenizer.eos_token == marker
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert len(tokenizer) == size == model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    assert model.get_output_embeddings().weight.shape[0] == size
    return tokenizer, model


def test_llama_from_the_base_model_through_sft_to_dpo(tmp_path, data, capsys):
    base = save_base(tmp_path / "base", "llama")
    size = len(BASES["llama"][0]()) + 2
    sft = train("llama3-8b-sft", base, data, tmp_path / "sft")
    recipe = yaml.safe_load(find_recipe("llama3-8b-dpo").read_text())
    assert recipe["model_name_or_path"] == yaml.safe_load(find_recipe("llama3-8b-sft").read_text())["output_dir"]
    ready(sft, "<|im_end|>", size)
    dpo = train("llama3-8b-dpo", sft, data, tmp_path / "dpo")
    for folder in (dpo, dpo / "opponent", dpo / "checkpoint-2"):
        ready(folder, "<|im_end|>", size) if folder.name != "checkpoint-2" else AutoTokenizer.from_pretrained(folder)
    _, margin = metrics_of(dpo)[:2]
    assert "rewards/margins" in margin
    capsys.readouterr()
    assert main(["chat", str(dpo), "--prompt", "Hello", "--max_new_tokens", "3"]) == 0
    assert "policy>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "kind", "marker", "more"),
    [
        ("llama3-8b-orpo", "llama", "<|im_end|>", 2),
        ("mistral-7b-orpo", "mistral", "</s>", 0),
        ("mistral-7b-dpo", "mistral", "</s>", 0),
    ],
)
def test_the_other_recipes_train_from_a_base_model(recipe, kind, marker, more, tmp_path, data):
    base = save_base(tmp_path / "base", kind)
    run = train(recipe, base, data, tmp_path / "run")
    size = len(BASES[kind][0]()) + more
    for folder in (run, run / "opponent"):
        ready(folder, marker, size)


def test_a_run_from_a_base_model_resumes_bit_for_bit_and_not_with_another_template(tmp_path, data, capsys):
    base = save_base(tmp_path / "base", "llama")
    save = ("--save_steps", "1", "--save_strategy", "steps")
    whole = train("llama3-8b-orpo", base, data, tmp_path / "run", *save)
    before = (whole / "model.safetensors").read_bytes()
    checkpoint = ("--resume_from_checkpoint", str(whole / "checkpoint-1"))
    # The same template from another place.
    (tmp_path / "mine.jinja").write_bytes(
        (find_recipe("llama3-8b-orpo").parent / "templates/chatml.jinja").read_bytes()
    )
    again = train(
        "llama3-8b-orpo", base, data, whole, *checkpoint, "--chat_template_path", str(tmp_path / "mine.jinja")
    )
    assert (again / "model.safetensors").read_bytes() == before
    with (tmp_path / "mine.jinja").open("a") as file:
        file.write("{# changed #}")
    capsys.readouterr()
    other = ["train", "--config", str(whole / "recipe.yaml"), *checkpoint]
    assert main(other) == 2
    assert "chat_template_path was" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
def test_lora_trains_the_new_rows_and_resumes_bit_for_bit(tied, tmp_path, data):
    base = save_base(tmp_path / "base", "llama", tied=tied)
    size = len(BASES["llama"][0]()) + 2
    lora = ("--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear", "--learning_rate", "0.01",
            "--save_steps", "1", "--save_strategy", "steps", "--lr_scheduler_type", "constant")  # fmt: skip
    run = train("llama3-8b-orpo", base, data, tmp_path / "run", *lora)
    config = json.loads((run / "adapter_config.json").read_text())
    names = {"embed_tokens"} if tied else {"embed_tokens", "lm_head"}
    assert config["trainable_token_indices"] == {name: [size - 2, size - 1] for name in names}
    weights = (run / "adapter_model.safetensors").read_bytes()
    # Two rows an embedding, and not the embeddings.
    assert len(weights) < 40_000
    loaded = AutoPeftModelForCausalLM.from_pretrained(run)
    assert loaded.get_input_embeddings().weight.shape[0] == size
    moved = [w for name, w in loaded.named_parameters() if "trainable_tokens_delta" in name]
    assert len(moved) == len(names)
    plain = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.mean(0)
    assert all((rows - plain).abs().max() > 5e-3 for rows in moved)
    checkpoint = ("--resume_from_checkpoint", str(run / "checkpoint-1"))
    again = train("llama3-8b-orpo", base, data, run, *lora, *checkpoint)
    assert (again / "adapter_model.safetensors").read_bytes() == weights
    assert (run / "opponent" / "adapter_model.safetensors").read_bytes() != weights
    assert main(["chat", str(run), "--prompt", "Hello", "--max_new_tokens", "3"]) == 0


def test_dpo_from_a_base_model_begins_with_policy_equal_to_the_reference(tmp_path, data):
    base = save_base(tmp_path / "base", "llama")
    lora = ("--use_peft", "--lora_r", "4", "--lora_dropout", "0", "--reference", "initial")
    for name, more in (("full", ()), ("lora", lora)):
        run = train("llama3-8b-dpo", base, data, tmp_path / name, *more)
        first = metrics_of(run)[0]
        assert first["rewards/margins"] == 0
        assert first["loss"] == pytest.approx(0.6931472)


@pytest.mark.parametrize(("kind", "template"), [("llama", "chatml"), ("mistral", "zephyr")])
def test_the_tokens_are_the_published_ones_but_for_named_departures(kind, template):
    tokenizer = BASES[kind][0]()
    use_chat_template(tokenizer, template, load_template_tokenizer)
    # The published way: the messages before the reply and the reply itself, each through the template alone and
    # tokenized alone, without a start token, and an EOS token at the end.
    texts = [tokenizer.apply_chat_template(part, tokenize=False) for part in (CONVERSATION[:-1], CONVERSATION[-1:])]
    prompt, reply = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    published = [*prompt, *reply, tokenizer.eos_token_id]
    options = DataOptions(400, 300)
    ends = eos_token_ids(tokenizer, None)
    prepared, _ = prepare_dataset([{"messages": CONVERSATION}], tokenizer, options, eos_ids=ends, source="x")
    (example,) = collate_examples([prepared[0]])["examples"]
    ours = [*example.turns[0].prompt_ids, *example.turns[0].response_ids]
    # Departure 4: one EOS token and not two, and no line break between them.
    closing = published[published.index(tokenizer.eos_token_id, len(prompt)) + 1 :]
    assert closing[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(closing[:-1]).strip() == ""
    kept = published[: len(published) - len(closing)]
    if kind == "mistral":
        # Departure 28: sentencepiece puts a space before the reply, which is a text of its own there.
        space = tokenizer.convert_tokens_to_ids("▁")
        assert kept[len(prompt)] == space
        del kept[len(prompt)]
    assert ours == kept
    # Departure 6: the assistant's header belongs to the prompt.
    header = tokenizer.decode(ours[len(prompt) : len(example.turns[0].prompt_ids)])
    assert header == {"chatml": "<|im_start|>assistant\n", "zephyr": "<|assistant|>\n"}[template]
    # Nobody adds a start token to a rendered conversation.
    assert tokenizer.bos_token_id not in published
    assert tokenizer.bos_token_id not in ours


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # trl's own default
def test_the_form_for_trl_makes_the_start_of_the_dpo_recipe(tmp_path, data):
    from trl import SFTConfig, SFTTrainer

    recipe = yaml.safe_load(find_recipe("llama3-8b-trl-sft").read_text())
    folder = tmp_path / "chatml-tokenizer"
    tokenizer = BASES["llama"][0]()
    use_chat_template(tokenizer, "chatml", load_template_tokenizer)
    tokenizer.save_pretrained(folder)
    base = save_base(tmp_path / "base", "llama")
    kept = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_length", "packing")
    config = SFTConfig(
        str(tmp_path / "sft"), use_cpu=True, bf16=False, max_steps=2, report_to="none", gradient_checkpointing=False,
        per_device_train_batch_size=2, chat_template_path=str(folder), disable_tqdm=True,
        **{name: recipe[name] for name in kept} | {"max_length": 320, "packing": False},
    )  # fmt: skip
    import datasets

    trainer = SFTTrainer(str(base), config, train_dataset=datasets.Dataset.from_list(rows()))
    trainer.train()
    trainer.save_model()
    made = AutoTokenizer.from_pretrained(tmp_path / "sft")
    assert made.eos_token == "<|im_end|>"
    assert made.chat_template == tokenizer.chat_template
    assert template_digest(made) != ""
    run = train("llama3-8b-dpo", tmp_path / "sft", data, tmp_path / "dpo")
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model.get_input_embeddings().weight.shape[0] == len(made)
    assert torch.isfinite(model.get_input_embeddings().weight).all()


def test_data_check_generate_and_evaluate_take_the_template_too(tmp_path, data, capsys):
    base = save_base(tmp_path / "base", "llama")
    given = (
        "--model_name_or_path",
        str(base),
        "--dataset_name",
        str(data),
        "--max_length",
        "320",
        "--segment_length",
        "16",
    )
    assert main(["data", "check", *given]) == 2
    assert "--chat_template_path chatml" in capsys.readouterr().err
    template = ("--chat_template_path", "chatml")
    assert main(["data", "check", *given, *template]) == 0
    assert "<|im_start|>assistant" in capsys.readouterr().out
    pairs = tmp_path / "pairs.parquet"
    assert main(["generate", *given, *template, "--use_cpu", "--output_file", str(pairs)]) == 0
    assert pairs.is_file()
    capsys.readouterr()
    local = ("--suite", "local", "--dataset_name", str(data), "--max_new_tokens", "4", "--max_length", "320")
    out = ("--output_dir", str(tmp_path / "evaluation"))
    assert main(["evaluate", str(base), *local, *out]) == 2
    assert "chat_template_path" in capsys.readouterr().err
    assert main(["evaluate", str(base), *local, *out, *template]) == 0


@pytest.mark.parametrize("more", [(), ("--use_peft", "--lora_r", "4")])
def test_the_start_of_a_run_is_asked_as_the_policy_is(more, tmp_path, data, capsys):
    run = train("llama3-8b-orpo", save_base(tmp_path / "base", "llama"), data, tmp_path / "run", *more)
    capsys.readouterr()
    local = ("--suite", "local", "--dataset_name", str(data), "--max_new_tokens", "4", "--max_length", "320")
    assert main(["evaluate", str(run), *local]) == 0
    assert "start" in capsys.readouterr().out

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import clone_chat_template

from sapo.data.chat_template import read_chat_template, template_digest, use_chat_template
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, collate_examples
from sapo.data.prepare import prepare_dataset
from sapo.errors import ConfigurationError, TokenizerError
from sapo.weights.description import load_template_tokenizer, load_tokenizer
from sapo.weights.embeddings import fit_model, grow, refuse_new_rows, train_tokens
from tests.bases import BASES, CONVERSATION, llama_model, llama_tokenizer, mistral_tokenizer, save_base

FORMS = [
    ("llama", "chatml"),
    ("mistral", "zephyr"),
    ("llama", "zephyr"),
    ("llama", "chatml-bos"),
    ("mistral", "zephyr-bos"),
]


def use(tokenizer, path):
    return use_chat_template(tokenizer, str(path), load_template_tokenizer)


def with_template(kind, template):
    tokenizer = BASES[kind][0]()
    use(tokenizer, template)
    return tokenizer


@pytest.mark.parametrize(("kind", "template"), FORMS)
@pytest.mark.parametrize("turns", ["last", "random", "all"])
def test_prompts_are_the_templates_and_a_reply_ends_once(kind, template, turns):
    tokenizer = with_template(kind, template)
    rows = [{"messages": CONVERSATION[:size]} for size in (3, 5)] + [{"messages": CONVERSATION[1:]}]
    options = DataOptions(400, 300, assistant_turns=turns)
    ends = eos_token_ids(tokenizer, None)
    prepared, _ = prepare_dataset(rows, tokenizer, options, eos_ids=ends, source="x")
    seen = 0
    for example in collate_examples(list(prepared))["examples"]:
        messages = rows[example.row]["messages"]
        places = [place for place, one in enumerate(messages) if one["role"] == "assistant"]
        for turn in example.turns:
            place = places[turn.index]
            before, through = messages[:place], messages[: place + 1]
            prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(through, return_dict=False)
            assert list(turn.prompt_ids) == prompt
            scored = [*turn.prompt_ids, *turn.response_ids]
            # Only the line break after the EOS token is left out.
            assert scored == whole[: len(scored)]
            assert tokenizer.decode(whole[len(scored) :]).strip() == ""
            assert turn.response_ids[-1] == tokenizer.eos_token_id
            assert not set(turn.response_ids[:-1]) & ends
            seen += 1
    assert seen == (3 if turns == "last" else 5)


@pytest.mark.parametrize(
    ("kind", "template", "marker"), [("llama", "chatml", "<|im_end|>"), ("mistral", "zephyr", "</s>")]
)
def test_the_end_marker_is_the_eos_token_and_again_changes_nothing(kind, template, marker, tmp_path):
    tokenizer = BASES[kind][0]()
    size = len(tokenizer)
    added = use(tokenizer, template)
    assert tokenizer.eos_token == marker
    assert added == tuple(range(size, size + (2 if template == "chatml" else 0)))
    digest = template_digest(tokenizer)
    # The same tokens: who trains asks after who read the data.
    assert use(tokenizer, template) == added
    assert template_digest(tokenizer) == digest
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer_of(tmp_path)
    assert template_digest(again) == digest
    assert use(again, template) == ()
    assert again.apply_chat_template(CONVERSATION) == tokenizer.apply_chat_template(CONVERSATION)


def load_tokenizer_of(folder):
    return load_template_tokenizer(str(folder))


@pytest.mark.parametrize(("kind", "template"), [("llama", "chatml"), ("mistral", "zephyr")])
def test_a_template_without_the_bos_token_is_said_once_and_one_with_it_differs_in_nothing_else(kind, template, caplog):
    with_it = with_template(kind, f"{template}-bos")
    assert not caplog.records
    without = with_template(kind, template)
    use(without, template)
    assert [f"prints no {without.bos_token}" in record.message for record in caplog.records] == [True]
    begun, bare = (one.apply_chat_template(CONVERSATION, return_dict=False) for one in (with_it, without))
    assert begun == [with_it.bos_token_id, *bare]


def test_a_template_begun_by_a_token_that_is_not_there_is_refused():
    tokenizer = llama_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(TokenizerError, match="no BOS token"):
        use(tokenizer, "chatml-bos")


def test_a_folder_gives_what_trl_gives(tmp_path):
    source = with_template("llama", "chatml")
    source.add_tokens(["<more>"])
    source.save_pretrained(tmp_path / "source")
    ours, theirs = mistral_tokenizer(), mistral_tokenizer()
    model = BASES["mistral"][1](theirs)
    _, _, their_ids = clone_chat_template(model, theirs, str(tmp_path / "source"), resize_to_multiple_of=None)
    our_model = BASES["mistral"][1](mistral_tokenizer())
    our_ids = use(ours, tmp_path / "source")
    assert sorted(their_ids) == list(our_ids)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.chat_template, ours.eos_token) == (theirs.chat_template, theirs.eos_token)
    assert fit_model(our_model, ours, seed=0) == our_ids
    assert our_model.config.eos_token_id == model.config.eos_token_id == ours.eos_token_id
    assert our_model.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    # trl forgets the base's own EOS token, at which generation would no longer stop.
    assert our_model.generation_config.eos_token_id == [ours.eos_token_id, 2]


def test_the_place_of_a_template_is_found_here_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_chat_template("chatml", load_template_tokenizer).tokens == ("<|im_start|>", "<|im_end|>")
    (tmp_path / "chatml").write_text("{{ messages[0].content }}")
    assert read_chat_template("chatml", load_template_tokenizer).text == "{{ messages[0].content }}"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "chat_template.jinja").write_text("x{{ eos_token }}")
    assert read_chat_template("folder", load_template_tokenizer).text == "x{{ eos_token }}"


PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PLAIN, r"ends a reply with '<|im_end|>', which is no token .* added_tokens: <\|im_end\|> "),
        ("{% for m in messages %}{{ m.nothing.at.all }}{% endfor %}", "cannot render a question and its reply"),
        ("{% for m in", "cannot render"),
        (" \n", "is empty"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_the_way_out(text, says, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(text)
    with pytest.raises((ConfigurationError, TokenizerError), match=says):
        use(llama_tokenizer(), file)


def test_the_way_out_works(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{#- added_tokens: <|im_end|> -#}\n" + PLAIN)
    tokenizer = llama_tokenizer()
    assert len(use(tokenizer, file)) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template(CONVERSATION[1:3], tokenize=False).startswith("[user] Hello")


@pytest.mark.parametrize("name", ["chatmll", "./none.jinja", "some/none.jinja"])
def test_a_template_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigurationError, match=r"no shipped template. Shipped are chatml, zephyr"):
        use(llama_tokenizer(), name)


def test_a_folder_without_a_template_is_refused(tmp_path):
    save_base(tmp_path, "llama")
    with pytest.raises(ConfigurationError, match="its tokenizer has no chat template"):
        use(llama_tokenizer(), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_near_the_mean_alike_for_a_seed_and_leave_the_random_state(tied):
    tokenizer = with_template("llama", "chatml")
    models = [llama_model(llama_tokenizer(), tied=tied) for _ in range(3)]
    old = models[0].get_input_embeddings().weight.detach().clone()
    state = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        assert fit_model(model, tokenizer, seed=seed) == (len(old), len(old) + 1)
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (model.get_input_embeddings().weight for model in models)
    assert torch.equal(first, again)
    assert torch.equal(first[: len(old)], old)
    assert not torch.equal(first, other)
    assert (first[len(old) :] - old.mean(0)).abs().max() < 1e-3
    head = models[0].get_output_embeddings().weight
    assert (head is first) == tied
    assert len(head) == len(first)
    assert grow(models[0], len(first)) == ()


def test_a_template_of_the_models_own_needs_no_option(tmp_path):
    save_base(tmp_path, "llama")
    tokenizer = with_template("llama", "chatml")
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token == "<|im_end|>"


LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def test_rows_that_peft_cannot_train_are_refused(monkeypatch):
    model = llama_model(llama_tokenizer())
    assert train_tokens(LoraConfig(**LORA), model, {3}).trainable_token_indices == {"embed_tokens": [3], "lm_head": [3]}
    kept = LoraConfig(**LORA, modules_to_save=["lm_head"])
    assert train_tokens(kept, model, {3}).trainable_token_indices == {"embed_tokens": [3]}
    assert kept.trainable_token_indices is None
    with pytest.raises(ConfigurationError, match="lora_target_modules holds lm_head"):
        train_tokens(LoraConfig(**LORA | {"target_modules": ["q_proj", "lm_head"]}), model, {3})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train_tokens(kept, model, ()) is kept
    with pytest.raises(ConfigurationError, match="cannot train single rows of sharded embeddings"):
        train_tokens(kept, model, {3})


def test_vllm_is_refused_what_it_has_no_rows_for():
    tokenizer = with_template("llama", "chatml")
    refuse_new_rows(tokenizer, len(tokenizer), "vllm_server")
    with pytest.raises(ConfigurationError, match="adds 2 tokens: vLLM holds the model without"):
        refuse_new_rows(tokenizer, len(tokenizer) - 2, "vllm_server")


def test_an_adapter_over_too_few_embeddings_is_refused():
    model = get_peft_model(llama_model(llama_tokenizer()), LoraConfig(**LORA))
    with pytest.raises(ConfigurationError, match="Grow the base model before"):
        fit_model(model, with_template("llama", "chatml"), seed=0)

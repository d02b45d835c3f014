"""The way out of a run: an ordinary model folder that answers like the run, and what is refused on the way."""

import fcntl
import json
import os
import signal

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo.commands.main import main
from sapo.hub import export
from sapo.hub.ollama import find_turns, modelfile
from sapo.runs.layout import LOCK_FILE
from tests.faults import children
from tests.runs import refused
from tests.tiny import byte_tokenizer, tiny_llama

INPUTS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def make_run(make_trainer, tokenizer, tmp_path):
    def make(*, lora, generation=None, dtype=torch.float32, **options):
        start = tiny_llama(dtype=dtype)
        start.save_pretrained(tmp_path / "start")
        tokenizer.save_pretrained(tmp_path / "start")
        if generation is not None:
            (tmp_path / "start" / "generation_config.json").write_text(json.dumps(generation))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype="float32")
        options = {"learning_rate": 0.05, "ema_decay": 0.9, "report_pairs": 12, "max_steps": 3} | options
        trainer = make_trainer("run", lora=lora, model=model, **options)
        trainer.train()
        trainer.save_model()
        return trainer

    return make


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def exported(tmp_path, *flags, run="run"):
    assert main(["export", str(tmp_path / run), str(tmp_path / "out"), "--device", "cpu", *flags]) == 0
    return AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# ---- What is written ----


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("which", ["policy", "opponent", "start"])
def test_the_exported_folder_computes_what_the_run_does(which, lora, make_run, tmp_path, capsys):
    trainer = make_run(lora=lora)
    model = exported(tmp_path, "--which", which)
    folder = {"policy": "run", "opponent": "run/opponent", "start": "start"}[which]
    load = AutoPeftModelForCausalLM if lora and which != "start" else AutoModelForCausalLM
    run_model = load.from_pretrained(tmp_path / folder)
    torch.testing.assert_close(logits(model), logits(run_model), atol=1e-5, rtol=1e-5)
    if which == "policy":
        torch.testing.assert_close(logits(model), logits(trainer.policy()), atol=1e-5, rtol=1e-5)
    else:
        assert not torch.allclose(logits(model), logits(trainer.policy()), atol=1e-3)
    assert "3 of 3 greedy replies are equal" in capsys.readouterr().out
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    weights, config = (tmp_path / "out" / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode  # a server of another user reads it
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2").input_ids == [4, 5]


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_exports_the_opponent_of_its_step(lora, make_run, tmp_path):
    trainer = make_run(lora=lora, save_strategy="steps", save_steps=3)
    with trainer.opponent.using() as module:
        of_last_step = logits(module)
    model = exported(tmp_path, "--which", "opponent", run="run/checkpoint-3")
    torch.testing.assert_close(logits(model), of_last_step, atol=1e-5, rtol=1e-5)


def test_an_opponent_with_float32_masters_is_exported_with_the_weights_it_computes_with(make_trainer, tmp_path):
    options = {"learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    trainer = make_trainer("run", model=tiny_llama(dtype=torch.bfloat16), ema_decay=0.9, **options)
    trainer.train()
    trainer.save_model()
    own = dict(exported(tmp_path, "--which", "opponent", run="run/checkpoint-3").named_parameters())
    with trainer.opponent.using() as module:
        assert all(torch.equal(own[name], weight) for name, weight in module.named_parameters())
    assert not all(torch.equal(own[name], weight.bfloat16()) for name, weight in trainer.opponent.tensors().items())


def test_an_adapter_is_cast_to_the_type_of_its_base_after_the_merge(make_run, tmp_path, capsys):
    make_run(lora=True, dtype=torch.bfloat16)
    assert exported(tmp_path).dtype == torch.bfloat16
    assert "merged" in capsys.readouterr().out
    assert exported(tmp_path, "--dtype", "float16", "--overwrite").dtype == torch.float16


@pytest.mark.parametrize("use_cache", [False, True])
def test_saved_configurations_have_the_cache_setting_of_the_start(use_cache, make_trainer, tmp_path):
    trainer = make_trainer(model=tiny_llama(use_cache=use_cache), save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    trainer.save_model()
    for folder in ("", "opponent", "checkpoint-2"):
        content = json.loads((tmp_path / "run" / folder / "config.json").read_text())
        assert content["use_cache"] is use_cache, folder


def test_an_invalid_generation_configuration_is_repaired_and_said(make_run, tmp_path, capsys, caplog):
    make_run(lora=False, generation={"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1})
    said = "left out temperature=0.6, top_p=0.9"
    assert said in caplog.text
    model = exported(tmp_path)
    model.generation_config.validate(strict=True)
    assert not model.generation_config.do_sample
    exported(tmp_path, "--which", "start", "--overwrite")
    assert said in " ".join(capsys.readouterr().out.split())


def test_an_adapter_that_is_no_run_is_merged(make_run, tmp_path):
    make_run(lora=True)
    (tmp_path / "run" / "opponent").rename(tmp_path / "alone")
    wanted = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "alone"))
    torch.testing.assert_close(logits(exported(tmp_path, run="alone")), wanted, atol=1e-5, rtol=1e-5)


# ---- What is refused ----


def test_what_is_there_is_not_overwritten(make_run, tmp_path, capsys):
    make_run(lora=False)
    run, out = tmp_path / "run", tmp_path / "out"
    exported(tmp_path)
    assert "--overwrite" in refused(["export", run, out], capsys)
    exported(tmp_path, "--overwrite")
    assert "not an earlier export" in refused(["export", run, run, "--overwrite"], capsys)
    assert "not an earlier export" in refused(["export", run, tmp_path / "start", "--overwrite"], capsys)
    assert "is a file" in refused(["export", run, run / "config.json"], capsys)


def test_a_copy_of_ones_own_beside_the_export_and_files_in_it_are_left_alone(make_run, tmp_path, capsys):
    make_run(lora=False)
    mine = tmp_path / "out.old" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    exported(tmp_path)
    exported(tmp_path, "--overwrite")
    notes = tmp_path / "out" / "notes.txt"
    notes.write_text("mine too")
    assert "holds notes.txt, not written by" in refused(
        ["export", tmp_path / "run", tmp_path / "out", "--overwrite"], capsys
    )
    assert mine.read_text() == "mine"
    assert notes.read_text() == "mine too"


def test_behind_a_link_is_what_is_written(make_run, tmp_path, capsys):
    make_run(lora=False)
    (tmp_path / "out").symlink_to(tmp_path / "big-disk")
    exported(tmp_path)
    exported(tmp_path, "--overwrite")
    assert (tmp_path / "out").is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["big-disk", "out", "run", "start"]


def test_no_export_passes_for_a_part_of_a_run(make_run, tmp_path, capsys):
    make_run(lora=False, objective="sft")
    for name in ("checkpoint-9", "opponent"):
        assert "taken for a part of the run" in refused(["export", tmp_path / "run", tmp_path / "run" / name], capsys)
    exported(tmp_path / "run", run="../run")


def test_two_exports_to_one_folder_do_not_meet(make_run, tmp_path, capsys):
    make_run(lora=False)
    half = tmp_path / ".out.exporting" / "out" / "half"
    half.parent.mkdir(parents=True)
    half.write_text("of the other")
    # As another process holds it: locks of one process do not exclude each other.
    with (tmp_path / ".out.exporting" / LOCK_FILE).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is in use by another process" in refused(["export", tmp_path / "run", tmp_path / "out"], capsys)
        assert half.is_file()
    exported(tmp_path)
    assert not half.parent.exists()


def test_an_export_that_a_signal_ends_leaves_nothing_but_what_the_next_one_removes(make_run, tmp_path, capfd):
    make_run(lora=True)
    exported(tmp_path)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--overwrite"]
    allowed = export.allowed_difference

    def end_by(number):
        def now(dtype):
            # All is written, and not checked yet.
            os.kill(os.getpid(), number)
            return allowed(dtype)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        export.allowed_difference = now
        raise SystemExit(main(arguments))

    # A shell shows 128 and the number of the signal.
    for number, status in ((signal.SIGTERM, -15), (signal.SIGHUP, -1), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        assert children.ended(children.start(end_by, number), 120) == status, capfd.readouterr().err
        assert "Traceback" not in capfd.readouterr().err
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        left = {file.name for file in tmp_path.iterdir()} - {"out", "run", "start"}
        assert left == ({".out.exporting"} if number == signal.SIGKILL else set())
    exported(tmp_path, "--overwrite")
    assert {file.name for file in tmp_path.iterdir()} == {"out", "run", "start"}


def test_a_folder_that_does_not_agree_is_not_left(make_run, tmp_path, capsys, monkeypatch):
    make_run(lora=True)
    merge = export.merge_adapter

    def wrong(model):
        merged = merge(model)
        merged.model.layers[0].mlp.up_proj.weight.data.mul_(-3)
        return merged

    monkeypatch.setattr(export, "merge_adapter", wrong)
    assert "does not agree" in refused(["export", tmp_path / "run", tmp_path / "out"], capsys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run", "start"]


def test_a_model_that_is_not_there_is_told(make_run, make_trainer, tmp_path, capsys):
    make_run(lora=False, objective="sft")
    assert "has no opponent" in refused(["export", tmp_path / "run", tmp_path / "out", "--which", "opponent"], capsys)
    assert "is a model and not a run" in refused(
        ["export", tmp_path / "start", tmp_path / "out", "--which", "start"], capsys
    )
    make_trainer("begun").train()
    assert "has not saved its policy yet" in refused(["export", tmp_path / "begun", tmp_path / "out"], capsys)


def test_a_quantized_base_is_refused(make_run, tmp_path, capsys):
    make_run(lora=True)
    file = tmp_path / "start" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    assert "stored quantized (gptq)" in refused(["export", tmp_path / "run", tmp_path / "out"], capsys)


# ---- Ollama ----

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ '<s>' }}{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + '</s>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("template", "default"), [(CHATML, "Be kind."), (LLAMA, ""), (ZEPHYR, "")])
def test_simple_chat_templates_have_a_form_for_ollama(template, default):
    tokenizer = byte_tokenizer(template)
    turns = find_turns(tokenizer)
    assert turns is not None
    assert turns.default_system == default
    assert turns.bos == ("<s>" if template is LLAMA else "")
    text, converted = modelfile(".", tokenizer, tiny_llama().generation_config, frozenset([tokenizer.eos_token_id]))
    assert converted
    assert "{{ range .Messages }}" in text
    assert 'PARAMETER stop "</s>"' in text
    assert ('SYSTEM """Be kind."""' in text) == bool(default)
    if template is ZEPHYR:
        assert '{{ if eq .Role "system" }}<|system|>\n{{ .Content }}</s>\n{{ else if' in text
        assert text.split('TEMPLATE """')[1].split('"""')[0].endswith("{{ end }}{{ end }}<|assistant|>\n")


@pytest.mark.parametrize("template", [MISTRAL, None])
def test_other_chat_templates_are_left_to_the_client(template):
    tokenizer = byte_tokenizer(template)
    text, converted = modelfile(".", tokenizer, tiny_llama().generation_config, frozenset([tokenizer.eos_token_id]))
    assert not converted
    assert "raw: true" in text


def test_sampling_parameters_stand_in_the_modelfile(make_run, tmp_path, capsys):
    make_run(lora=False, generation={"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": 1})
    exported(tmp_path, "--ollama")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "PARAMETER temperature 0.6\nPARAMETER top_k 20" in text
    assert "ollama create out" in capsys.readouterr().out

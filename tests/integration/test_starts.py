"""What a run can start from: an adapter that is continued or merged, an adapter of the Hub, a GGUF file."""

import json

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from sapo.commands.chat_models import load_chat_models
from sapo.commands.main import main
from sapo.errors import ModelError
from sapo.weights import description, loading, source
from sapo.weights.rounding import rounded
from tests.integration.pages import TEMPLATE
from tests.tiny import byte_tokenizer, save_tiny, tiny_llama, write_rows

INPUTS = torch.tensor([[5, 6, 7, 8, 9]])


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


@pytest.fixture
def adapter(tokenizer, tmp_path):
    tokenizer.chat_template = TEMPLATE
    save_tiny(tmp_path / "base", tokenizer=tokenizer)
    tokenizer.chat_template = None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(7)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


@pytest.fixture
def train(tmp_path):
    write_rows(tmp_path / "rows.jsonl")

    def run(start, *flags, folder="run"):
        command = ["train", "--model_name_or_path", str(start), "--dataset_name", str(tmp_path / "rows.jsonl")]
        command += ["--output_dir", str(tmp_path / folder), "--max_steps", "2", "--learning_rate", "0.05", "--use_cpu"]
        command += ["--max_length", "32", "--segment_length", "4", "--report_to", "none", "--logging_steps", "1"]
        command += ["--gradient_checkpointing", "false", "--report_pairs", "0", "--per_device_train_batch_size", "2"]
        status = main([*command, *map(str, flags)])
        return tmp_path / folder if status == 0 else status

    return run


# ---- Adapters ----


def test_policy_opponent_and_reference_are_copies_of_the_adapter_on_one_base(adapter, make_trainer):
    wanted = logits(loading.load_frozen(str(adapter), device="cpu"))
    model = loading.load_frozen(str(adapter.parent / "base"), device="cpu")
    model = loading.load_adapter(model, str(adapter), trainable=True)
    assert not torch.allclose(wanted, logits(AutoModelForCausalLM.from_pretrained(adapter.parent / "base")), atol=1e-3)
    trainer = make_trainer(model=model, reference="initial", disable_dropout=True)
    assert trainer.reference.own_module is False
    for role in (trainer.opponent, trainer.reference):
        with role.using() as module:
            assert module.get_base_model() is trainer.policy().get_base_model()
            torch.testing.assert_close(logits(module), wanted)
    trainer.train()
    with trainer.reference.using() as module:
        torch.testing.assert_close(logits(module), wanted)
    assert not torch.allclose(logits(trainer.policy()), wanted, atol=1e-3)


@pytest.mark.parametrize("flags", [(), ("--adapter", "merge"), ("--adapter", "merge", "--use_peft", "--lora_r", 2)])
def test_a_run_from_an_adapter_resumes_bit_equal_and_is_exported(flags, adapter, train, tmp_path, capsys):
    run = train(adapter, *flags, "--save_steps", 1)
    again = train(adapter, *flags, "--save_steps", 1, "--resume_from_checkpoint", run / "checkpoint-1", folder="again")
    one, other = loading.load_frozen(str(run), device="cpu"), loading.load_frozen(str(again), device="cpu")
    assert torch.equal(logits(one), logits(other))
    assert not torch.allclose(logits(one), logits(loading.load_frozen(str(adapter), device="cpu")), atol=1e-3)
    assert isinstance(one, PeftModel) == (flags != ("--adapter", "merge"))
    assert main(["export", str(run), str(tmp_path / "out"), "--device", "cpu"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported), logits(one), atol=1e-5, rtol=1e-5)
    assert [model.name for model in load_chat_models(str(run), device="cpu").models] == ["start", "opponent", "policy"]


def test_a_merged_start_computes_what_the_adapter_does(adapter, train, tmp_path):
    wanted = logits(loading.load_frozen(str(adapter), device="cpu"))
    for flags in ((), ("--use_peft",)):
        run = train(adapter, "--adapter", "merge", "--learning_rate", 0, *flags, folder=f"still{len(flags)}")
        torch.testing.assert_close(logits(loading.load_frozen(str(run), device="cpu")), wanted, atol=1e-5, rtol=1e-5)
        cast = load_chat_models(str(run), device="cpu")
        for model in cast.models:
            with model.active() as active:
                torch.testing.assert_close(logits(active), wanted, atol=1e-5, rtol=1e-5)
    content = json.loads((tmp_path / "still1" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(adapter)


def test_a_bfloat16_base_is_merged_in_float32(adapter, tmp_path):
    AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="bfloat16").save_pretrained(tmp_path / "base")
    exact = loading.load_frozen(str(adapter), dtype="float32", device="cpu").merge_and_unload()
    merged = loading.merge_adapters(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        source.find_source(str(adapter)).with_adapter_merged(),
        loading.load_adapter,
    )
    for (name, weight), (_, other) in zip(merged.named_parameters(), exact.named_parameters(), strict=True):
        assert weight.dtype == torch.bfloat16, name
        assert torch.equal(weight, rounded(other, torch.bfloat16)), name


@pytest.mark.parametrize(
    ("start", "flags", "says"),
    [
        ("base", ("--adapter", "merge"), "which is not an adapter"),
        ("sft", ("--use_peft",), "--adapter merge"),
        (
            "sft",
            ("--adapter", "merge", "--generation_backend", "vllm_server", "--vllm_server_timeout", "1"),
            "sapo export",
        ),
        ("sft", ("--adapter", "merge", "--use_peft", "--load_in_4bit"), "sapo export"),
    ],
)
def test_what_an_adapter_cannot_be_combined_with_is_one_line(start, flags, says, adapter, train, tmp_path, capsys):
    assert train(tmp_path / start, *flags) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1


def test_an_adapter_of_the_hub_is_found_in_its_cache(adapter, monkeypatch, tmp_path):
    files = {"adapter_config.json": str(adapter / "adapter_config.json")}
    monkeypatch.setattr(source, "try_to_load_from_cache", lambda name, file, revision: files.get(file))
    found = source.find_source("someone/sft", "v1")
    assert (found.name, found.adapter, found.base) == ("someone/sft", str(adapter), str(tmp_path / "base"))
    assert torch.equal(
        logits(loading.load_frozen("someone/sft", device="cpu")),
        logits(loading.load_frozen(str(adapter), device="cpu")),
    )
    files["config.json"] = "somewhere/config.json"
    assert source.find_source("someone/sft").adapter is None


def test_the_hub_is_asked_for_an_adapter_where_there_is_no_model(adapter, monkeypatch):
    cached, known = {}, AutoConfig.from_pretrained
    monkeypatch.setattr(source, "try_to_load_from_cache", lambda name, file, revision: cached.get(file))

    def lacking(name, **options):
        if name != "someone/sft":
            return known(name, **options)
        error = EntryNotFoundError.__new__(EntryNotFoundError)
        Exception.__init__(error, "404")
        raise OSError("no config.json") from error

    def download(name, revision, allow_patterns):
        cached["adapter_config.json"] = str(adapter / "adapter_config.json")
        return str(adapter)

    monkeypatch.setattr(AutoConfig, "from_pretrained", lacking)
    monkeypatch.setattr(source, "snapshot_download", download)
    assert description.read_config("someone/sft").model_type == "llama"
    cached.clear()
    monkeypatch.setattr(source, "snapshot_download", lambda name, revision, allow_patterns: str(adapter.parent))
    with pytest.raises(ModelError, match="incomplete on the hub"):
        description.read_config("someone/sft")


# ---- GGUF ----

CONVERTER = """
import json, sys, pathlib
sys.path.insert(0, {root!r})
from tests.integration.test_starts import write_gguf
folder, kind, out = sys.argv[1], sys.argv[3], sys.argv[5]
write_gguf(pathlib.Path(folder), out, permuted={permuted})
"""


def write_gguf(folder, file, *, permuted=True):
    """A Llama as llama.cpp writes it: rows of queries and keys in the order of its rotary embedding."""
    import gguf

    model = AutoModelForCausalLM.from_pretrained(folder)
    config, tokens = model.config, json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    special = {one["content"]: one["id"] for one in tokens["added_tokens"]}
    vocabulary = {**tokens["model"]["vocab"], **special}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3 if token in special else 1 for token in sorted(vocabulary, key=vocabulary.get)])
    writer.add_token_merges([" ".join(pair) for pair in tokens["model"]["merges"]])
    writer.add_eos_token_id(special["</s>"])
    writer.add_bos_token_id(special["<s>"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if permuted and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def made(tmp_path):
    """A model of bytes, whose tokenizer has a form in GGUF."""
    tokenizer = byte_tokenizer(TEMPLATE, merges=[("a", "b")])
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None}
    model = tiny_llama(vocab_size=len(tokenizer), **ends)
    for layer in model.model.layers:
        # Large enough that the order of their rows shows.
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
            torch.nn.init.normal_(part.weight)
    model.save_pretrained(tmp_path / "made")
    tokenizer.save_pretrained(tmp_path / "made")
    return tmp_path / "made"


def test_gguf_without_its_package_is_one_line(made, monkeypatch, tmp_path, train, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert train(tmp_path / "model.gguf") == 2
    assert 'pip install "sapo-llm[gguf]"' in capsys.readouterr().err
    assert main(["export", str(made), str(tmp_path / "out"), "--gguf"]) == 2
    assert 'pip install "sapo-llm[gguf]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [(), ("--use_peft",)])
def test_a_gguf_file_is_dequantized_and_trained(flags, made, tmp_path, train, capsys, caplog):
    pytest.importorskip("gguf")
    (tmp_path / "folder").mkdir()
    write_gguf(made, tmp_path / "folder" / "model.gguf")
    loaded = loading.load_frozen(str(tmp_path / "folder"), device="cpu")
    torch.testing.assert_close(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(made)))
    run = train(tmp_path / "folder", "--max_length_policy", "truncate", *flags)
    assert "dequantized to float32" in caplog.text
    assert "quantization_config" not in (run / ("adapter_config.json" if flags else "config.json")).read_text()
    trained = loading.load_frozen(str(run), device="cpu")
    assert not torch.allclose(logits(trained), logits(loaded), atol=1e-3)
    assert main(["export", str(run), str(tmp_path / "out"), "--device", "cpu"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported), logits(trained), atol=1e-5, rtol=1e-5)


def test_gguf_files_that_cannot_be_read_are_one_line(made, tmp_path):
    pytest.importorskip("gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_gguf(made, folder / "one.gguf")
    for start in (b"nothing", b"GGUF"):
        (folder / "two.gguf").write_bytes(start)
        with pytest.raises(ModelError, match="cannot be read from this GGUF file"):
            description.read_config(str(folder / "two.gguf"))
    with pytest.raises(ModelError, match=r"holds 2 GGUF files.*one\.gguf"):
        description.read_config(str(folder))
    (folder / "big-00001-of-00002.gguf").write_bytes(b"half")
    with pytest.raises(ModelError, match="llama-gguf-split"):
        description.read_config(str(folder / "big-00001-of-00002.gguf"))
    with pytest.raises(ModelError, match="no such model folder"):
        description.read_config(str(folder / "three.gguf"))


def test_an_exported_gguf_is_read_again(made, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("PATH", str(tmp_path))
    root = str(__file__).removesuffix("/tests/integration/test_starts.py")
    command = ["export", str(made), str(tmp_path / "out"), "--gguf", "f32", "--device", "cpu"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "git clone https://github.com/ggml-org/llama.cpp" in message
    assert "--outtype f32" in message
    tool = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    tool.parent.mkdir()
    for permuted in (False, True):
        tool.write_text(CONVERTER.format(root=root, permuted=permuted))
        assert main([*command, "--llama_cpp", str(tool.parent)]) == (0 if permuted else 2)
        said = capsys.readouterr()
        assert permuted or "does not agree with the model" in said.err
        assert (tmp_path / "out").exists() == permuted
    assert "Read again by transformers: 3 of 3" in said.out
    assert main([*command[:3], "--gguf", "q4_k_m", "--llama_cpp", str(tool.parent), "--overwrite"]) == 2
    assert "llama-quantize" in capsys.readouterr().err
    tool.write_text("raise SystemExit('no such architecture')")
    assert main([*command, "--llama_cpp", str(tool.parent), "--overwrite"]) == 2
    assert "no such architecture" in capsys.readouterr().err
    assert (tmp_path / "out" / "out-f32.gguf").is_file()

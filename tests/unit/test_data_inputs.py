"""From the flags of a command to prepared rows, without a weight being loaded."""

import datetime
import json
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from sapo.commands import inputs
from sapo.commands.arguments import parse
from sapo.commands.inputs import load_inputs
from sapo.commands.main import main
from sapo.data.examples import collate_examples
from sapo.errors import ConfigurationError, DatasetError, TokenizerError
from tests.prepared import CHATML, talk
from tests.tiny import byte_tokenizer
from tests.unit.test_data_templates import DATED


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save(folder, template=CHATML, *, vocabulary=None, pad=None):
    tokenizer = byte_tokenizer(template)
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=vocabulary or len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


def run(model, data, tmp_path, *more, **options):
    named = ("--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(tmp_path / "run"))
    given = parse([*named, "--use_cpu", "--report_to", "none", *more], "sapo train")
    return load_inputs(given, **options), given


def texts(prepared, tokenizer):
    turns = [turn for example in collate_examples(list(prepared))["examples"] for turn in example.turns]
    return [tokenizer.decode(turn.prompt_ids) + tokenizer.decode(turn.response_ids) for turn in turns]


ROWS = [{"prompt": "a" * (10 * size), "completion": "b"} for size in range(1, 11)]


def test_data_for_evaluation_is_the_test_split(model, tmp_path):
    train = write(tmp_path / "own.jsonl", [{"prompt": "p", "completion": "c"}])
    write(tmp_path / "held/train.jsonl", [{"prompt": "p", "completion": "train"}])
    write(tmp_path / "held/test.jsonl", [{"prompt": "p", "completion": "test"}])
    write(tmp_path / "held/test_b.jsonl", [{"prompt": "p", "completion": "other"}])
    flags = ("--eval_strategy", "steps", "--eval_steps", "1", "--eval_dataset_name")
    for more, said in (((), "ptest</s>"), (("--dataset_test_split", "test_b"), "pother</s>")):
        found, _ = run(model, train, tmp_path, *flags, str(tmp_path / "held"), *more)
        assert texts(found.eval, found.tokenizer) == [said]
        assert f"held ({more[1] if more else 'test'})" in found.eval_reports[0].source
    found, _ = run(model, train, tmp_path, *flags, str(tmp_path / "held/train.jsonl"))
    assert texts(found.eval, found.tokenizer) == ["ptrain</s>"]
    (tmp_path / "held/test.jsonl").unlink()
    with pytest.raises(DatasetError, match='no split "test"; it has test_b, train'):
        run(model, train, tmp_path, *flags, str(tmp_path / "held"))


def test_tokens_beyond_the_embeddings_are_named_before_a_model_loads(tmp_path):
    rows = [{"messages": talk("a", "b")}, {"messages": talk("c", "<|im_start|>x")}]
    data = write(tmp_path / "a.jsonl", rows)
    size = len(byte_tokenizer())
    small = save(tmp_path / "small", vocabulary=size - 1)
    with pytest.raises(
        TokenizerError, match=rf"^row 1 of .*token {size - 1} \('<\|im_end\|>'\) is beyond the {size - 1}"
    ):
        run(small, data, tmp_path)
    padded = save(tmp_path / "padded", vocabulary=size, pad="<fill>")
    with pytest.raises(
        TokenizerError, match=rf"^the pad token of the tokenizer: token {size} \('<fill>'\) .*embeddings\({size + 1}\)"
    ):
        run(padded, data, tmp_path)
    run(save(tmp_path / "wide", vocabulary=size + 64), data, tmp_path)


class Tomorrow(datetime.date):
    @classmethod
    def today(cls):
        return cls(2030, 1, 2)


def test_a_run_prints_one_date(tmp_path, monkeypatch):
    dated = save(tmp_path / "dated", DATED)
    data = write(tmp_path / "a.jsonl", [{"messages": talk("a", "b")}])
    found, given = run(dated, data, tmp_path, "--template_date", "2026-03-05")
    assert "Today: 05 Mar 2026" in texts(found.train, found.tokenizer)[0]
    _, given = run(dated, data, tmp_path)
    assert given.config.template_date == datetime.date.today().isoformat()
    monkeypatch.setattr(inputs.datetime, "date", Tomorrow)
    monkeypatch.setattr(inputs, "read_state", lambda folder: {"facts": {"template_date": "2026-03-06"}})
    (tmp_path / "run/checkpoint-2").mkdir(parents=True)
    for resume in ("auto", "true", str(tmp_path / "run/checkpoint-2")):
        found, _ = run(dated, data, tmp_path, "--resume_from_checkpoint", resume)
        assert "Today: 06 Mar 2026" in texts(found.train, found.tokenizer)[0]
    _, given = run(dated, data, tmp_path)
    assert given.config.template_date == "2030-01-02"
    with pytest.raises(ConfigurationError, match=r"template_date=5\.3\.: not a date. Use the form 2026-01-31"):
        run(dated, data, tmp_path, "--template_date", "5.3.")


def test_a_template_without_a_date_sets_none(model, tmp_path):
    _, given = run(model, write(tmp_path / "a.jsonl", ROWS), tmp_path)
    assert given.config.template_date is None


def test_a_date_that_no_template_prints_is_said_to_have_no_effect(model, tmp_path, caplog):
    data = write(tmp_path / "a.jsonl", ROWS)
    _, given = run(model, data, tmp_path, "--template_date", "2026-03-05")
    assert "No effect with a chat template that prints no date: template_date=2026-03-05." in caplog.text
    assert given.config.template_date is None
    with pytest.raises(ConfigurationError, match="not a date"):
        run(model, data, tmp_path, "--template_date", "5.3.")


def test_a_length_that_cuts_most_rows_is_refused_unless_asked_for(model, tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DatasetError, match=r"a\.jsonl: 6 of 10 .*max_length=50 .*--max_length 102 keeps 95% .*102 all"):
        run(model, data, tmp_path, "--max_length", "50")
    found, _ = run(model, data, tmp_path, "--max_length", "50", "--max_length_policy", "truncate")
    assert len(found.train) == 10
    found, _ = run(model, data, tmp_path, "--max_length", "60")
    lines = found.train_reports[0].lines()
    assert (
        "warning: 5 of 10 (50%) exceed max_length=60 and are truncated; --max_length 102 would keep 95% complete"
        in lines[1]
    )
    found, _ = run(model, data, tmp_path, "--max_length", "40", "--max_length_policy", "drop")
    assert len(found.train) == 3


def check(model, data, *more):
    return main(["data", "check", str(data), "--model_name_or_path", str(model), *more])


def test_data_check_counts_every_bad_row(model, tmp_path, capsys):
    bad = {"messages": [{"role": "narrator", "content": "x"}]}
    rows = [{"messages": talk("a", "b")}, bad, {"messages": talk("a", "b")}, bad, {"messages": talk("c", "")}]
    assert check(model, write(tmp_path / "a.jsonl", [*rows, *[bad] * 5, {"messages": talk("x", "y", "z")}])) == 2
    shown = capsys.readouterr()
    said = " ".join(shown.out.split())
    assert 'refused 7: message 1 of "messages" has the unknown role "narrator"' in said
    assert "(rows 2, 4, 6, 7, 8, ...)" in said
    assert "messages after the last reply are left out: 1 row (row 11)" in said
    assert "dropped 1: empty reply (row 5)" in said
    assert "duplicates: 1 (row 3)" in said
    assert shown.err.startswith("DatasetError: 7 of 11 rows are refused, for the reasons above")


def test_data_check_goes_on_after_lines_that_cannot_be_read(model, tmp_path, capsys):
    good = json.dumps({"messages": talk("a", "b")})
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(["{", good, "[1]", *['{"a": }'] * 6, good]))
    test = write(tmp_path / "b.jsonl", [{"messages": talk("a", "b")}, {"messages": talk("a")}])
    more = ("--eval_strategy", "steps", "--eval_dataset_name", str(test))
    assert check(model, file, *more) == 2
    shown = capsys.readouterr()
    said = " ".join(shown.out.split())
    # A long path is folded anywhere.
    joined = "".join(shown.out.split())
    assert f"{file}:formatmessages,10rows,2exampleskept" in joined
    assert "refused 6: not valid JSON (Expecting value). (rows 4, 5, 6, 7, 8, ...)" in said
    assert "refused 1: is a list; each row must be an object with named fields. (row 3)" in said
    assert f"{test}:formatmessages,2rows,1examplekept" in joined
    assert shown.err.startswith("DatasetError: 9 of 12 rows are refused")
    file.write_text("{\n{")
    assert check(model, file) == 2
    assert "line 1: not valid JSON" in capsys.readouterr().err


def test_data_check_imports_neither_torch_nor_peft_nor_a_trainer(model, tmp_path):
    data = write(tmp_path / "a.jsonl", [{"messages": talk("a", "b")}])
    code = (
        "import sys; from sapo.commands.main import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'accelerate', 'peft', 'bitsandbytes', 'transformers.trainer', 'sapo.config'};"
        "heavy &= set(sys.modules);"
        "print(status, sorted(heavy))"
    )
    arguments = ["data", "check", str(data), "--model_name_or_path", str(model)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert done.stderr == ""


def test_data_check_tells_lengths_turns_and_systems(model, tmp_path, capsys):
    rows = [{"messages": talk("a", "b", system="s")}, {"messages": talk("a", "b", "c", "d"), "topic": "x"}]
    assert check(model, write(tmp_path / "a.jsonl", [*rows, *({"messages": talk("q" * 99, "b")},) * 4])) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "columns not used: topic" in said
    assert "replies per conversation: 1 (5 rows), 2 (1 row)" in said
    assert "system messages: in 1 of 6 conversations" in said
    assert "duplicates: 3 (rows 4, 5, 6)" in said
    assert check(model, tmp_path / "a.jsonl", "--max_length", "64", "--segment_length", "8") == 2
    shown = capsys.readouterr()
    assert "longer than max_length=64: 4 of 6 (67%)" in " ".join(shown.out.split())
    assert "--max_length_policy truncate" in shown.err


def test_evaluation_rows_that_are_trained_on_are_said(model, tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", [{"messages": talk(f"q{i}", "a")} for i in range(8)])
    rows = [{"messages": talk(q, a)} for q, a in (("q9", "a"), ("q3", "a"), ("q4", "b"), ("q5", "a"))]
    held = write(tmp_path / "held.jsonl", rows)
    flags = ("--eval_strategy", "steps", "--eval_steps", "1", "--eval_dataset_name")
    found, _ = run(model, train, tmp_path, *flags, str(held))
    assert found.shared_rows()[0].startswith("warning: 2 of 4 evaluation rows are training rows too (rows 2, 4)")
    found, _ = run(model, train, tmp_path, *flags, str(train))
    assert "warning: 8 of 8 evaluation rows are training rows too (rows 1, 2, 3, 4, 5, ...)" in found.shared_rows()[0]
    assert check(model, train, "--eval_dataset_name", str(held)) == 0
    assert "2 of 4 evaluation rows are training rows too (rows 2, 4)" in " ".join(capsys.readouterr().out.split())
    found, _ = run(model, train, tmp_path, *flags, str(write(tmp_path / "new.jsonl", rows[::2])))
    assert found.shared_rows() == []

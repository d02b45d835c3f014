"""Files are complete or absent, and what cannot be read is named with its line."""

import hashlib
import json
import threading
import time

import pytest

from sapo.errors import ConfigurationError, EvaluationError
from sapo.evaluation import results
from sapo.runs.files import (
    append_line,
    file_digest,
    folder_digest,
    read_json_lines,
    read_object,
    replacing,
    write_atomically,
)
from sapo.runs.user_cache import user_cache


def test_an_error_leaves_the_earlier_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "made/one.txt"
    write_atomically(file, "first")
    with pytest.raises(RuntimeError, match="inside"):
        half_write(file)
    assert file.read_text() == "first"
    write_atomically(file, b"\x00second")
    assert file.read_bytes() == b"\x00second"
    assert [one.name for one in file.parent.iterdir()] == ["one.txt"]


def half_write(file):
    with replacing(file) as partial:
        partial.write_text("half")
        raise RuntimeError("inside")


def test_a_digest_is_that_of_names_and_contents_wherever_they_lie(tmp_path):
    content = b"a" * 3_000_000
    for folder in ("one", "two"):
        write_atomically(tmp_path / folder / "model.bin", content)
        write_atomically(tmp_path / folder / "state.json", folder)
    assert file_digest(tmp_path / "one/model.bin") == hashlib.sha256(content).hexdigest()
    digests = {folder_digest(tmp_path / name, ("*.bin", "*.json"), without=["state.json"]) for name in ("one", "two")}
    assert len(digests) == 1
    assert folder_digest(tmp_path / "one", ("*",)) != folder_digest(tmp_path / "two", ("*",))
    assert folder_digest(tmp_path / "one", ("*.safetensors",)) is None
    (tmp_path / "two/model.bin").rename(tmp_path / "two/other.bin")
    assert folder_digest(tmp_path / "two", ("*.bin",)) not in digests


def test_lines_are_read_up_to_the_last_line_break(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_json_lines(file, {"step": int}) == []
    append_line(file, '{"step": 1, "text": "a\u2028b"}')
    append_line(file, '{"step": 2}')
    with file.open("a") as stream:
        stream.write('{"step": 3, "lo')
    assert [row["step"] for row in read_json_lines(file, {"step": int})] == [1, 2]


DAMAGED = [b"{", b"[1]", b"3", b'"step"', b"{}", b'{"step": "x"}', b'{"step": null}', b"\xff", b"", b"[" * 100_000]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_named_with_its_file(line, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ConfigurationError, match=r"rows\.jsonl, line 2: ") as error:
        read_json_lines(file, {"step": int})
    assert "\n" not in str(error.value)
    with pytest.raises(EvaluationError, match=r"line 2: .* Do this\.$"):
        read_json_lines(file, {"step": int}, error=EvaluationError, remedy="Do this.")


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml"])
@pytest.mark.parametrize("content", ["{", "[1]", "text", "3"])
def test_a_file_that_holds_no_object_is_refused(name, content, tmp_path):
    file = tmp_path / name
    assert read_object(file) == {}
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=name):
        read_object(file)


def test_the_users_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SAPO_CACHE_DIR", raising=False)
    assert user_cache("rows") == tmp_path / "home/.cache/sapo/rows"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache("rows") == tmp_path / "xdg/sapo/rows"
    monkeypatch.setenv("SAPO_CACHE_DIR", "~/own")
    assert user_cache("rows") == tmp_path / "home/own/rows"


def test_suites_that_end_at_the_same_moment_are_all_kept(tmp_path, monkeypatch):
    original = results.write_result

    def slowly(*given):
        time.sleep(0.05)
        original(*given)

    monkeypatch.setattr(results, "write_result", slowly)
    folder = tmp_path / "evaluation"
    writers = [threading.Thread(target=results.write, args=(folder, f"suite-{n}", {})) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(json.loads((folder / "results.json").read_text())["suites"]) == 4
    assert [one.name for one in folder.iterdir()] == ["results.json"]

import bz2
import csv
import gzip
import importlib.util
import json
import lzma
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from sapo.data import loading
from sapo.data.folders import split_name
from sapo.data.loading import evaluation_split, load_rows
from sapo.errors import DatasetError
from tests.tiny import write_rows

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(10)]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(path, rows=ROWS):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)


def refused(name, **options):
    with pytest.raises(DatasetError) as caught:
        load_rows(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_rows_survive_every_kind_of_file():
    write_lines("a.jsonl")
    Path("b.json").write_text(json.dumps(ROWS), encoding="utf-8")
    Path("c.json").write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    write_lines("d.json")  # JSON lines in spite of its name
    Path("h.jsonl").write_text(json.dumps(ROWS), encoding="utf-8")  # and the other way round
    Path("i.jsonl").write_text("\n" + json.dumps(ROWS, indent=2), encoding="utf-8")
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, "e.parquet")
    with pyarrow.OSFile("f.arrow", "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pyarrow.OSFile("g.arrow", "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.jsonl", "b.json", "c.json", "d.json", "e.parquet", "f.arrow", "g.arrow", "h.jsonl", "i.jsonl"):
        assert list(load_rows(name)) == ROWS, name


def test_rows_may_differ_in_their_fields():
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "tool", "x": [1]}], "id": "b"},
    ]
    write_lines("mixed.jsonl", rows)
    assert load_rows("mixed.jsonl") == rows


def test_mark_blank_lines_and_crlf_are_tolerated():
    Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert load_rows("a.jsonl") == [{"a": 1}, {"a": 2}]
    Path("b.json").write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert load_rows("b.json") == [{"a": 1}]


def test_line_separators_inside_text_do_not_end_a_line():
    Path("a.json").write_text('{"a": "x\u2028y"}\n{"a": "\u0085"}\n', encoding="utf-8")
    assert load_rows("a.json") == [{"a": "x\u2028y"}, {"a": "\u0085"}]


def test_broken_json_names_file_and_line():
    Path("train.jsonl").write_text('{"a": 1}\n' * 16 + '{"a": 1 "b": 2}\n', encoding="utf-8")
    assert refused("train.jsonl") == "train.jsonl, line 17: not valid JSON (Expecting ',' delimiter, column 9)."
    Path("b.json").write_text('[\n{"a": 1},\n{"a": }\n]', encoding="utf-8")
    assert refused("b.json") == "b.json, line 3: not valid JSON (Expecting value, column 7)."


def test_row_that_is_no_object_names_its_line():
    Path("a.jsonl").write_text('{"a": 1}\n["x"]\n', encoding="utf-8")
    assert refused("a.jsonl").startswith("a.jsonl, line 2: is a list; each row must be an object")
    Path("b.json").write_text('[{"a": 1}, 3]', encoding="utf-8")
    assert refused("b.json").startswith("b.json, row 2: is a number")
    Path("d.json").write_text('"text"', encoding="utf-8")
    assert refused("d.json") == "d.json: is text; expected a list of objects."


def test_one_object_is_one_row_on_however_many_lines():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    Path("d").mkdir()
    for name, indent in (("d/1.json", 2), ("d/2.json", None)):
        Path(name).write_text(json.dumps(row, indent=indent), encoding="utf-8")
    assert load_rows("d") == [row, row]


def test_json_lines_with_a_list_under_data_are_rows():
    rows = [{"data": ["x"], "prompt": "a", "completion": "b"}] * 2
    write_lines("a.json", rows)
    assert load_rows("a.json") == rows


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.jsonl", '{"p": 1}\n{"p": 1, "c": 2, "p": 3}\n', ", line 2"),
        ("a.jsonl", '{"p": [{"p": 1, "p": 3}]}\n', ", line 1"),
        ("a.json", '[\n{"c": 1},\n{"c": {"p": 1,\n"p": 3}}]', ", line 3"),
        ("a.json", '{"data": [{"p": 1}],\n"p": 1, "p": 2}', ""),
    ],
)
def test_a_duplicate_name_in_an_object_is_refused(name, text, place):
    Path(name).write_text(text, encoding="utf-8")
    assert refused(name) == f"{name}{place}: not valid JSON (one object has the name 'p' twice)."


def test_a_number_that_python_does_not_read_is_refused():
    Path("a.jsonl").write_text('{"p": 1}\n{"p": ' + "9" * 5000 + "}\n", encoding="utf-8")
    assert refused("a.jsonl") == "a.jsonl, line 2: not valid JSON (a number has too many digits)."


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "a.json.gz"])
def test_a_pointer_of_git_lfs_is_not_taken_for_data(name):
    Path(name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", encoding="utf-8")
    assert refused(name) == f"{name}: is a pointer of Git LFS, not the data. Run in its folder: git lfs pull"


def test_hidden_files_are_no_data():
    write_lines("d/train.jsonl")
    for name in ("d/._train.jsonl", "d/.train.jsonl", "d/train/.0.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"\0")
    assert load_rows("d") == ROWS


def test_broken_utf8_names_line_and_byte():
    Path("a.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    assert refused("a.jsonl") == ("a.jsonl, line 2: not UTF-8 (byte 8 of the line is 0xff). Save the file as UTF-8.")
    Path("b.json").write_bytes(b'[{"a": 1},\n{"a": "\xff"}]\n')
    assert "b.json, line 2: not UTF-8 (byte 8" in refused("b.json")


def test_endless_nesting_is_refused():
    Path("a.jsonl").write_text("[" * 200_000, encoding="utf-8")
    assert "a.jsonl, line 1:" in refused("a.jsonl")


def test_misspelt_path_suggests_the_nearest():
    write_lines("train.jsonl")
    assert refused("trian.jsonl") == "no file or folder 'trian.jsonl'; did you mean 'train.jsonl'?"
    write_lines("corpus/train.jsonl")
    assert refused("corpsu/train.jsonl").endswith("did you mean 'corpus'?")
    assert refused("corpus/xyz").startswith("no file or folder 'corpus/xyz'; no similar name in ")


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/gone/entirely", "~/gone", "a/b/c", "data/gone"])
def test_what_looks_like_a_path_never_reaches_the_hub(name, monkeypatch):
    Path("data").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    assert "no file or folder" in refused(name)


def test_hub_failure_gives_the_way_out(monkeypatch):
    def unreachable(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("org/talks", "en", "test", True)
        raise ConnectionError("Couldn't reach\n'org/talks' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(loading, "hub_fault", lambda: None)
    message = refused("org/talks", config="en", split="test", streaming=True)
    assert message.startswith(
        "org/talks (en), split test: no such local file or folder, and loading from the Hub failed"
    )
    assert "Couldn't reach 'org/talks' on the Hub" in message
    assert "hf auth login" in message


def test_hub_rows_are_passed_on(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(ROWS))
    assert list(load_rows("org/talks")) == ROWS
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([]))
    assert "has no rows" in refused("org/talks")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file_is_refused(content):
    for name in ("a.jsonl", "a.json"):
        Path(name).write_text(content, encoding="utf-8")
        assert refused(name) == f"{name}: has no rows. Use another file or split."


def test_unsupported_kind_lists_the_supported():
    Path("a.txt").write_text("a,b\n", encoding="utf-8")
    assert "supported are .jsonl, .json, .ndjson, .csv, .tsv, .parquet, .arrow, also with .gz" in refused("a.txt")


def test_damaged_table_is_refused():
    for name in ("a.parquet", "a.arrow"):
        Path(name).write_bytes(b"PAR1 nonsense")
        assert f"{name}: not readable as" in refused(name)


def test_folder_gives_its_splits():
    write_lines("talks/train.jsonl", ROWS[:6])
    write_lines("talks/test.jsonl", ROWS[6:])
    assert load_rows("talks") == ROWS[:6]
    assert load_rows("talks", split="test") == ROWS[6:]
    assert (
        refused("talks", split="validation")
        == 'talks: has no split "validation"; it has test, train. Use one of these.'
    )


def test_folder_joins_parquet_shards():
    Path("talks/data").mkdir(parents=True)
    for i in range(2):
        table = pyarrow.Table.from_pylist(ROWS[5 * i : 5 * i + 5])
        pyarrow.parquet.write_table(table, f"talks/data/train-0000{i}-of-00002.parquet")
    assert list(load_rows("talks")) == ROWS


def test_folder_of_nameless_shards_is_the_train_split():
    write_lines("talks/part-0.jsonl", ROWS[:5])
    write_lines("talks/part-1.jsonl", ROWS[5:])
    assert load_rows("talks") == ROWS
    assert 'no split "test"' in refused("talks", split="test")


def test_split_may_be_a_folder_or_any_file_name():
    write_lines("talks/train/a.jsonl", ROWS[:2])
    write_lines("talks/held_out.jsonl", ROWS[2:])
    assert load_rows("talks") == ROWS[:2]
    assert load_rows("talks", split="held_out") == ROWS[2:]


def test_two_files_for_one_split_are_refused():
    write_lines("talks/train.jsonl")
    Path("talks/train.parquet").touch()
    assert "train.jsonl, train.parquet would be read as one split" in refused("talks")


def test_folder_without_data_is_refused():
    Path("talks").mkdir()
    assert "contains no data" in refused("talks")


def test_saved_datasets_are_read():
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk("one")
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk("several")
    assert list(load_rows("one")) == ROWS
    assert "without splits" in refused("one", split="test")
    assert list(load_rows("several", split="test")) == ROWS[1:2]
    assert 'no split "dev"; it has train, test' in refused("several", split="dev")
    Path("one/state.json").write_text("{", encoding="utf-8")
    assert "one: was saved by datasets, but cannot be read" in refused("one")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:3]", ROWS[:3]),
        ("train[50%:]", ROWS[5:]),
        ("train[-2:]", ROWS[-2:]),
        ("train[2:4]", ROWS[2:4]),
    ],
)
def test_part_of_a_split(split, expected):
    write_lines("a.jsonl")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "a.parquet")
    assert load_rows("a.jsonl", split=split) == expected
    assert list(load_rows("a.parquet", split=split)) == expected


def test_impossible_part_is_refused():
    write_lines("a.jsonl")
    assert "does not fit its 10 rows" in refused("a.jsonl", split="train[some]")
    assert "not understood" in refused("a.jsonl", split="train[")
    assert "has no rows in train[4:4]" in refused("a.jsonl", split="train[4:4]")


def test_one_file_has_no_other_split():
    write_lines("a.jsonl")
    assert 'a.jsonl: a single file is the split "train"; there is no "test"' in refused("a.jsonl", split="test")


def test_local_data_has_no_configuration():
    write_lines("a.jsonl")
    assert "no configuration 'en'" in refused("a.jsonl", config="en")


def test_compressed_files_are_read():
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    for suffix, pack in ((".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)):
        Path(f"a.jsonl{suffix}").write_bytes(pack(content))
        assert load_rows(f"a.jsonl{suffix}") == ROWS
        Path(f"b.jsonl{suffix}").write_bytes(pack(content)[:30])
        assert f"b.jsonl{suffix}: cannot be decompressed" in refused(f"b.jsonl{suffix}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "a.parquet")
    Path("c.parquet.gz").write_bytes(gzip.compress(Path("a.parquet").read_bytes()))
    assert list(load_rows("c.parquet.gz")) == ROWS
    write_lines("talks/train.jsonl")
    Path("talks/test.csv.gz").write_bytes(gzip.compress(b"prompt,completion\na,b\n"))
    assert load_rows("talks", split="test") == [{"prompt": "a", "completion": "b"}]


def test_zstandard_is_read_or_named(monkeypatch):
    zstandard = pytest.importorskip("zstandard") if importlib.util.find_spec("zstandard") else None
    packed = b"(\xb5/\xfd" if zstandard is None else zstandard.ZstdCompressor().compress(b'{"a": 1}\n')
    Path("a.jsonl.zst").write_bytes(packed)
    if zstandard is not None:
        assert load_rows("a.jsonl.zst") == [{"a": 1}]
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert refused("a.jsonl.zst") == "a.jsonl.zst: reading .zst requires zstandard. Run: pip install zstandard"


def test_tables_of_text_are_read():
    rows = [{"prompt": 'a, "b"\nc', "completion": "d"}, {"prompt": "é", "completion": "x" * 200_000}]
    for name, separator in (
        ("a.csv", ","),
        ("a.tsv", "\t"),
        ("semicolon.csv", ";"),
        ("tab.csv", "\t"),
        ("a2.tsv", ","),
    ):
        with open(name, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
        assert load_rows(name) == rows
    Path("b.csv").write_text("a,b\n1,2\n1,2,3\n", encoding="utf-8")
    assert refused("b.csv").startswith("b.csv, line 3: has 3 cells, but the first line names 2 columns")
    Path("c.csv").write_text('a,b\n"1"x,2\n', encoding="utf-8")
    assert refused("c.csv").startswith("c.csv, line 2: not valid CSV")
    Path("one.csv").write_text("text\na;b\n", encoding="utf-8")
    assert load_rows("one.csv") == [{"text": "a;b"}]
    Path("missing.csv").write_text('a,b\nnan,None\n<NA>,"null"\nNone of it,nano\n', encoding="utf-8")
    missing = {"a": None, "b": None}
    assert load_rows("missing.csv") == [missing, missing, {"a": "None of it", "b": "nano"}]
    Path("d.csv").write_text("a,a\n1,2\n", encoding="utf-8")
    assert "duplicate column name" in refused("d.csv")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train_sft.jsonl", "train_sft"),
        ("train_1M.jsonl", "train_1M"),
        ("test_prefs-00000-of-00002.parquet", "test_prefs"),
        ("train_gen-00001-of-00010.jsonl.gz", "train_gen"),
        ("train-3.jsonl", "train"),
        ("train_part2.jsonl", "train"),
        ("train_sft_shard-01.jsonl", "train_sft"),
        ("train2.jsonl", "train"),
        ("Test.jsonl", "test"),
        ("alpaca_train.jsonl", "train"),
        ("alpaca-test-00000-of-00001.parquet", "test"),
        ("my.data_train_sft.jsonl", "train_sft"),
        ("train-00000-of-00001-b42a775f407cee45.parquet", "train"),
        ("trainer.jsonl", ""),
        ("developers.jsonl", ""),
        ("part-0.jsonl", ""),
    ],
)
def test_the_name_of_a_file_states_its_split(name, split):
    assert split_name(Path(name)) == split


def test_splits_with_underscores_are_kept_apart():
    for name, rows in (("train_sft", ROWS[:3]), ("train_gen", ROWS[3:5]), ("test_sft", ROWS[5:])):
        write_lines(f"ultra/data/{name}-00000-of-00001.jsonl", rows)
    assert load_rows("ultra", split="train_sft[:2]") == ROWS[:2]
    assert load_rows("ultra", split="test_sft") == ROWS[5:]
    assert refused("ultra") == 'ultra: has no split "train"; it has test_sft, train_gen, train_sft. Use one of these.'


def test_the_hubs_own_layouts_are_read():
    write_lines("a/default/train/0000.jsonl", ROWS[:3])
    write_lines("b/data/train/0.jsonl", ROWS[:2])
    write_lines("b/data/test/0.jsonl", ROWS[2:])
    assert load_rows("a") == ROWS[:3]
    assert load_rows("b", split="test") == ROWS[2:]
    for name, pattern in (("c", "a/**"), ("d", "a"), ("e", "a/*/*")):
        write_lines(f"{name}/a/q/x.jsonl", ROWS)
        Path(name, "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {pattern}\n---\n")
        assert load_rows(name) == ROWS, name


def test_a_readme_is_read_in_spite_of_a_byte_order_mark_and_its_files_must_be_there():
    write_lines("a/x.jsonl", ROWS[:2])
    write_lines("a/y.jsonl")
    for path in ("x.jsonl", "z.jsonl"):
        text = f"\ufeff---\nconfigs:\n- config_name: default\n  data_files: {path}\n---\n"
        Path("a/README.md").write_text(text, encoding="utf-8")
        if path == "x.jsonl":
            assert load_rows("a") == ROWS[:2]
    assert refused("a").startswith("a: the data_files of its README name no file that is here.")


def test_lines_that_cannot_be_read_take_their_places_among_the_rows():
    Path("a.jsonl").write_bytes(b'{"a": 1}\n{"a": \n[2]\n\xff\n{"a": 3}\n')
    Path("b.json").write_text('[{"a": 1}, 2]')
    Path("c.csv").write_text("a,b\n1,2\n1\n")
    rows = load_rows("a.jsonl", tolerant=True)
    assert [row.get("a") for row in rows] == [1, None, None, None, 3]
    assert [row.reason for row in rows[1:4]] == [
        "not valid JSON (Expecting value).",
        "is a list; each row must be an object with named fields.",
        "not UTF-8 (byte 1 of the line is 0xff). Save the file as UTF-8.",
    ]
    assert [len(load_rows(name, tolerant=True)) for name in ("b.json", "c.csv")] == [2, 2]
    for name in ("a.jsonl", "b.json", "c.csv"):
        refused(name)


def test_a_split_has_several_names():
    write_lines("talks/train.jsonl", ROWS[:2])
    write_lines("talks/dev.jsonl", ROWS[2:])
    assert load_rows("talks", split="validation") == load_rows("talks", split="dev") == ROWS[2:]


README = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: rows/first-*
  - split: test
    path: [rows/second.jsonl]
- config_name: small
  data_files: rows/second.jsonl
---
# Rows
"""


def test_a_snapshot_of_a_hub_dataset_has_the_splits_of_its_readme():
    write_lines("snap/rows/first-a.jsonl", ROWS[:2])
    write_lines("snap/rows/first-b.jsonl", ROWS[2:4])
    write_lines("snap/rows/second.jsonl", ROWS[4:])
    Path("snap/README.md").write_text(README, encoding="utf-8")
    assert load_rows("snap", split="train_sft") == ROWS[:4]
    assert load_rows("snap", split="test") == load_rows("snap", config="small") == ROWS[4:]
    assert 'no split "train"; it has test, train_sft' in refused("snap")
    assert "dataset_config 'large' does not exist; its README has default, small" in refused("snap", config="large")
    Path("snap/README.md").write_text(README.replace("rows/first-*", "../*"), encoding="utf-8")
    assert "'../*' is outside the folder" in refused("snap")
    Path("snap/README.md").write_text("---\nconfigs: [\n---\n", encoding="utf-8")
    assert "contains no data" in refused("snap")


def test_a_configuration_may_be_a_folder():
    write_lines("gsm/main/train-00000-of-00001.jsonl", ROWS[:3])
    assert load_rows("gsm", config="main") == ROWS[:3]
    assert "no configuration 'other'" in refused("gsm", config="other")


def test_one_document_may_hold_splits():
    Path("a.json").write_text(json.dumps({"train": ROWS[:3], "test": ROWS[3:]}), encoding="utf-8")
    assert load_rows("a.json") == ROWS[:3]
    assert load_rows("a.json", split="test") == ROWS[3:]
    assert 'there is no "dev"' in refused("a.json", split="dev")
    Path("b.json").write_text(json.dumps(ROWS), encoding="utf-8")
    assert 'there is no "test"' in refused("b.json", split="test")


def test_data_for_evaluation_is_taken_whole_unless_it_has_splits():
    write_lines("a.jsonl")
    write_lines("both/train.jsonl", ROWS[:8])
    write_lines("both/test_prefs.jsonl", ROWS[8:])
    write_lines("plain/x.jsonl")
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    assert [evaluation_split(name, None, "test[:2]") for name in ("a.jsonl", "plain", "saved")] == ["train[:2]"] * 3
    assert evaluation_split("both", None, "test_prefs") == "test_prefs"
    assert evaluation_split("org/talks", None, "test") == "test"

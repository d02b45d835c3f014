"""Laws of preparing many rows: in several processes, and once while nothing changes."""

import datasets
import pytest

from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, dataset_digest
from sapo.data.parallel import processes_for
from sapo.data.prepare import prepare_dataset
from sapo.errors import DatasetError
from tests.prepared import CHATML, WIDE, talk

MANY = [
    {"messages": talk(f"question {i}", f"answer {i}" if i % 7 else " ", system="s" if i % 3 else None), "note": i}
    for i in range(4500)
]


def test_the_number_of_processes_changes_nothing(chatml, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    eos = eos_token_ids(chatml, None)
    rows = [*MANY, {"messages": [{"role": "narrator", "content": "x"}]}, MANY[1]]
    done = []
    one, own = prepare_dataset(rows, chatml, WIDE, eos_ids=eos, count_faults=True, progress=done.append)
    two, other = prepare_dataset(rows, chatml, WIDE, eos_ids=eos, count_faults=True, num_proc=2)
    assert done == [2048, 4096, len(rows)]
    assert dataset_digest(one) == dataset_digest(two)
    own.columns._last.clear()
    other.columns._last.clear()
    assert own == other
    with pytest.raises(DatasetError, match=f"row {len(MANY) + 1} of dataset: message 1"):
        prepare_dataset(rows, chatml, WIDE, eos_ids=eos, num_proc=2)


def test_rows_are_prepared_once_while_nothing_changes(chatml, tmp_path, monkeypatch):
    eos = eos_token_ids(chatml, None)

    def prepared(rows=MANY[:20], options=WIDE, **more):
        return prepare_dataset(rows, chatml, options, eos_ids=eos, cache_folder=tmp_path / "cache", **more)

    first, report = prepared()
    table = datasets.Dataset.from_list(MANY[:20])
    prepared(table)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr("sapo.data.prepare.in_order", None)
    again, other = prepared()
    assert dataset_digest(again) == dataset_digest(first)
    assert other.lines() == report.lines()
    assert other.details() == report.details()
    prepared(table, count_faults=True)
    changes = [
        {"rows": [*MANY[:19], MANY[3]]},
        {"options": DataOptions(100, 50)},
        {"rows": table.select(range(5))},
        {"source": "x"},
    ]
    for change in changes:
        with pytest.raises(TypeError, match="not callable"):
            prepared(**change)
    code = (("sapo.data.cache.version", lambda name: f"another {name}"), ("sapo.data.cache.__file__", "elsewhere.py"))
    for name, other in code:
        with monkeypatch.context() as patch:
            patch.setattr(name, other)
            with pytest.raises(TypeError, match="not callable"):
                prepared()
    monkeypatch.setattr(chatml, "chat_template", CHATML + " ")
    with pytest.raises(TypeError, match="not callable"):
        prepared()


def test_prepared_rows_that_are_damaged_or_cannot_be_kept_cost_time_only(chatml, tmp_path, caplog):
    eos = eos_token_ids(chatml, None)
    first, _ = prepare_dataset(MANY[:20], chatml, WIDE, eos_ids=eos, cache_folder=tmp_path)
    (stored,) = tmp_path.glob("*/rows/*.arrow")
    stored.write_bytes(stored.read_bytes()[:100])
    again, _ = prepare_dataset(MANY[:20], chatml, WIDE, eos_ids=eos, cache_folder=tmp_path)
    assert dataset_digest(again) == dataset_digest(first)
    assert "cannot be read" in caplog.text
    (tmp_path / "file").write_text("")
    prepare_dataset(MANY[:20], chatml, WIDE, eos_ids=eos, cache_folder=tmp_path / "file")
    assert "cannot be kept" in caplog.text
    for count in range(1, 11):
        prepare_dataset(MANY[1 : 2 + count], chatml, WIDE, eos_ids=eos, cache_folder=tmp_path / "small")
    assert len(list((tmp_path / "small").iterdir())) == 8


def test_as_many_processes_as_pay(monkeypatch):
    monkeypatch.setattr("sapo.data.parallel.os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert [processes_for(rows) for rows in (10, 19_999, 20_000, 40_000, 10**6)] == [1, 1, 2, 4, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes_for(10**6) == 2

import datasets
import pytest
from trl import DatasetMixtureConfig

from sapo.data.mixture import load_mixture, split_rows
from sapo.errors import DatasetError
from tests.tiny import write_rows

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(10)]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("a.jsonl", ROWS[:4]), ("b.jsonl", ROWS[4:])):
        write_rows(tmp_path / name, rows)


def mixed(*members):
    parts = load_mixture(DatasetMixtureConfig(datasets=list(members)))
    return [(part.name, list(part.rows)) for part in parts]


def refused(*members):
    with pytest.raises(DatasetError) as caught:
        mixed(*members)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("member", "name"),
    [
        ({"path": "b.jsonl"}, "b.jsonl"),
        ({"path": "json", "data_files": "b.jsonl"}, "b.jsonl"),
        ({"path": ".", "data_files": ["b.jsonl"]}, "b.jsonl"),
        ({"path": "json", "data_dir": ".", "data_files": "b*"}, "b*"),
        ({"path": "json", "data_files": {"train": "a.jsonl", "dev": "b.jsonl"}, "split": "dev"}, "b.jsonl"),
    ],
)
def test_every_way_to_name_local_files_gives_their_rows(member, name):
    assert mixed({"path": "a.jsonl"}, member) == [("a.jsonl", ROWS[:4]), (name, ROWS[4:])]


def test_files_of_one_member_are_one_split():
    both = {"path": "json", "data_files": ["a.jsonl", "b.jsonl"]}
    assert mixed(both) == [("a.jsonl, b.jsonl", ROWS)]
    assert mixed(both | {"split": "train[2:6]"}) == [("a.jsonl, b.jsonl", ROWS[2:6])]


def test_columns_are_selected():
    assert mixed({"path": "a.jsonl", "columns": ["prompt"]})[0][1] == [{"prompt": f"p{i}"} for i in range(4)]
    assert "has no column chosen to select; it has completion, prompt" in refused(
        {"path": "a.jsonl", "columns": ["prompt", "chosen"]}
    )


def test_fractions_take_what_trl_takes(tmp_path, monkeypatch):
    from trl import get_dataset

    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda **k: original(cache_dir=str(tmp_path / "cache"), **k))
    for first, second in ((1, 1), (1, 3), (0.7, 0.3), (2, 3)):
        members = [
            {"path": "json", "data_files": "a.jsonl", "fraction": first},
            {"path": "json", "data_files": "b.jsonl", "fraction": second},
        ]
        ours = [row for _, rows in mixed(*members) for row in rows]
        assert ours == list(get_dataset(DatasetMixtureConfig(datasets=members))["train"])


def test_members_that_do_not_fit_are_refused():
    assert "the list is empty" in refused()
    assert "did you mean 'a.jsonl'?" in refused({"path": "json", "data_files": "a.json"})
    assert 'has no split "test"; it has train' in refused({"path": "json", "data_files": "a.jsonl", "split": "test"})
    assert "some have a fraction" in refused({"path": "a.jsonl", "fraction": 0.5}, {"path": "b.jsonl"})
    assert "must be above 0" in refused({"path": "a.jsonl", "fraction": 0.0})


def test_member_elsewhere_is_read_by_datasets(monkeypatch):
    asked = {}

    def load(name, config, **options):
        asked.update(options, name=name)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    files = "https://example.org/b.jsonl"
    assert mixed({"path": "json", "data_files": files}, {"path": "csv", "data_files": "b.csv"})[0] == ("json", ROWS)
    assert asked == {"name": "csv", "data_files": "b.csv", "data_dir": None, "split": "train", "streaming": False}


def test_turns_of_a_row_stay_on_one_side_of_the_split():
    prepared = datasets.Dataset.from_dict({"row": [i // 2 for i in range(40)]})
    train, test = split_rows(prepared, 0.25, seed=0)
    assert sorted([*train["row"], *test["row"]]) == prepared["row"][:]
    assert not set(train["row"]) & set(test["row"])
    assert len(set(test["row"])) == 5
    assert split_rows(prepared, 0.25, seed=0)[1]["row"][:] == test["row"][:]
    assert split_rows(prepared, 0.25, seed=1)[1]["row"][:] != test["row"][:]
    assert len(split_rows(prepared, 3, seed=0)[1]) == 6


@pytest.mark.parametrize("size", [0, 20, 0.01, -1])
def test_split_that_leaves_a_side_empty_is_refused(size):
    with pytest.raises(DatasetError, match=r"hold out .* of 20 rows"):
        split_rows(datasets.Dataset.from_dict({"row": list(range(20))}), size, seed=0)

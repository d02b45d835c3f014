"""A Hub that cannot be reached costs one short try, and what its cache holds is used without asking again."""

import time

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from sapo import network
from sapo.data.loading import load_rows
from sapo.errors import DatasetError, ModelError
from sapo.weights.description import load_tokenizer, read_config
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer


@pytest.fixture
def tries(monkeypatch, tmp_path):
    """No Hub; the requests that were sent to it, and nothing in its cache."""
    sent = []

    class Session:
        def head(self, address, timeout):
            sent.append((address, timeout))
            raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    network.hub_fault.cache_clear()
    yield sent
    network.hub_fault.cache_clear()


def test_an_unreachable_hub_is_said_in_one_line_after_one_try(tries, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    began = time.monotonic()
    for asked in (read_config, load_tokenizer):
        with pytest.raises(ModelError, match=r"^org/model: no such folder, not in the .* reached \(no route to host\)"):
            asked("org/model")
    with pytest.raises(DatasetError, match=r"^org/rows, split train: no such .* reached \(no route to host\)"):
        load_rows("org/rows")
    with pytest.raises(DatasetError, match=r"\(did you mean 'rows.jsonl'\?\), not in the cache"):
        load_rows("rows.jsnol")
    assert time.monotonic() - began < 5
    assert tries == [(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)]
    assert not constants.HF_HUB_OFFLINE  # for what comes later, such as a push


def test_without_the_hub_its_cache_is_used_at_once(tries, tmp_path):
    tokenizer = tiny_tokenizer()
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / "1234"
    save_tiny(snapshot, tokenizer=tokenizer)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1234")
    assert read_config("org/model").vocab_size == len(tokenizer)
    assert len(load_tokenizer("org/model")) == len(tokenizer)
    assert len(tries) == 1


def test_nothing_is_asked_for_a_local_folder(tries, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    read_config(str(tmp_path / "model"))
    assert tries == []


def test_a_hub_that_answers_anything_is_asked(tries, monkeypatch):
    class Session:
        def head(self, address, timeout):
            return "503"

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    with network.hub_or_cache("org/model"):
        assert network.hub_fault() is None
        assert not constants.HF_HUB_OFFLINE


def test_what_is_no_fault_of_the_network_is_raised(tries, monkeypatch):
    class Session:
        def head(self, address):
            raise AssertionError

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    with pytest.raises(TypeError):
        network.hub_fault()

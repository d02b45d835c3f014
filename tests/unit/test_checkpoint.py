"""Laws of `sapo.runs.checkpoint`: what is written comes back the same, or cannot be written and is refused at once."""

import errno
import shutil
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.errors import CheckpointError
from sapo.preference.pair_tensors import entries_from_tensors, entries_to_tensors, redistribute
from sapo.preference.pairs import Pair
from sapo.preference.replay_buffer import BufferEntry
from sapo.preference.segments import Segment
from sapo.runs.folder import RunFolder
from sapo.runs.world import World

counts = st.integers(0, 2**40)
tokens = st.lists(st.integers(0, 2**31), max_size=12).map(tuple)
segments = st.tuples(counts, counts).map(lambda span: Segment(min(span), max(span)))
pairs = st.builds(Pair, counts, counts, tokens, tokens, tokens, segments, segments)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.builds(BufferEntry, pairs, counts, counts), max_size=5))
def test_a_replay_buffer_survives_a_checkpoint(entries):
    assert entries_from_tensors(entries_to_tensors(entries)) == entries


ages = st.lists(st.integers(0, 9), max_size=8).map(sorted)


@settings(derandomize=True, deadline=None)
@given(st.lists(ages, min_size=1, max_size=5), st.integers(1, 6))
def test_redistribution_loses_nothing_doubles_nothing_and_deals_evenly(steps, processes):
    parts = [
        [BufferEntry((process, place), step, 3 * process + place) for place, step in enumerate(part)]
        for process, part in enumerate(steps)
    ]
    dealt = redistribute(parts, processes, step=lambda entry: entry.step)
    assert len(dealt) == processes
    assert sorted((e for part in dealt for e in part), key=repr) == sorted((e for p in parts for e in p), key=repr)
    sizes = [len(part) for part in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert all([e.step for e in part] == sorted(e.step for e in part) for part in dealt)


def refuses(path, target):
    raise OSError(errno.ENOTSUP, "Operation not supported")


def leaves_the_files_behind(path, target):
    target.mkdir()


def copies_and_leaves_the_old(path, target):
    shutil.copytree(path, target)


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("rename", [refuses, leaves_the_files_behind, copies_and_leaves_the_old])
def test_a_bucket_as_run_folder_is_refused_before_anything_is_trained(rename, resumes, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run", World())
    if resumes:
        (folder.path / "checkpoint-3").mkdir(parents=True)
    monkeypatch.setattr(Path, "rename", rename)
    afresh = partial(folder.start_afresh, overwrite=False, restarted=True)
    begin = partial(folder.find_checkpoint, "auto") if resumes else afresh
    with pytest.raises(CheckpointError, match=r"folders cannot be renamed there .* as in a mounted bucket.*sky\.yaml"):
        begin()
    assert [one.name for one in folder.path.iterdir()] == (["checkpoint-3"] if resumes else [])

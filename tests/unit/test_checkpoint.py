"""Laws of `sapo.runs.checkpoint`: what is written comes back the same."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.preference.pair_tensors import entries_from_tensors, entries_to_tensors, redistribute
from sapo.preference.pairs import Pair
from sapo.preference.replay_buffer import BufferEntry
from sapo.preference.segments import Segment

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

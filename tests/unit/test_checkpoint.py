"""Laws of `sapo.checkpoint`: what is written comes back the same."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.checkpoint import entries_from_tensors, entries_to_tensors
from sapo.pairs import Pair
from sapo.replay_buffer import BufferEntry
from sapo.segments import Segment

counts = st.integers(0, 2**40)
tokens = st.lists(st.integers(0, 2**31), max_size=12).map(tuple)
segments = st.tuples(counts, counts).map(lambda span: Segment(min(span), max(span)))
pairs = st.builds(Pair, counts, counts, tokens, tokens, tokens, segments, segments)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.builds(BufferEntry, pairs, counts, counts), max_size=5))
def test_a_replay_buffer_survives_a_checkpoint(entries):
    assert entries_from_tensors(entries_to_tensors(entries)) == entries

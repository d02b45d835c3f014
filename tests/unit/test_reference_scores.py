"""Laws of the reference's kept scores: formed once a pair, gone with the reference, exact across a resume."""

import torch

from sapo.preference.objectives import ReferenceLogps
from sapo.preference.pairs import Pair
from sapo.preference.reference_scores import ReferenceScores
from sapo.preference.segments import Segment


def pairs(count):
    return [Pair(row, 0, (row,), (1, 2), (1, 3), Segment(1, 2), Segment(1, 2)) for row in range(count)]


class Reference:
    """Scores pair i as -i and -i - 1/3, and notes what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, missing):
        self.asked.append([pair.row for pair in missing])
        rows = torch.tensor([float(pair.row) for pair in missing])
        return ReferenceLogps(-rows, -rows - 1 / 3)


def test_a_pair_is_scored_once_however_often_it_is_drawn():
    stored, reference, scores = pairs(4), Reference(), ReferenceScores(10)
    for drawn in ([0, 1], [1, 1], [2, 0, 2]):
        found = scores.of([stored[row] for row in drawn], reference, lambda: stored)
        assert found.chosen_logps.tolist() == [-row for row in drawn]
        torch.testing.assert_close(found.rejected_logps, found.chosen_logps - 1 / 3)
    assert reference.asked == [[0, 1], [2]]


def test_pairs_of_equal_content_are_different_pairs():
    reference, scores = Reference(), ReferenceScores(10)
    scores.of([pairs(1)[0], pairs(1)[0]], reference, list)
    assert reference.asked == [[0, 0]]


def test_a_reference_that_moved_scores_anew():
    stored, reference, scores = pairs(1), Reference(), ReferenceScores(10)
    for _ in range(2):
        scores.of(stored, reference, lambda: stored)
        scores.clear()
    assert reference.asked == [[0], [0]]


def test_only_pairs_that_left_the_buffer_are_dropped():
    everything, reference, scores = pairs(6), Reference(), ReferenceScores(4)
    scores.of(everything[:4], reference, list)
    scores.of(everything[4:5], reference, lambda: everything[2:])
    assert len(scores) == 3
    scores.of(everything[2:5], reference, lambda: everything)
    assert reference.asked == [[0, 1, 2, 3], [4]]


def test_scores_survive_a_resume_to_the_last_bit():
    stored, reference, scores = pairs(3), Reference(), ReferenceScores(10)
    before = scores.of(stored[1:], reference, lambda: stored)
    again, restored = pairs(3), ReferenceScores(10)
    restored.restore(again, scores.state(stored))
    after = restored.of(again[1:], reference, lambda: again)
    assert torch.equal(after.chosen_logps, before.chosen_logps)
    assert torch.equal(after.rejected_logps, before.rejected_logps)
    assert reference.asked == [[1, 2]]
    restored.of(again, reference, lambda: again)
    assert reference.asked == [[1, 2], [0]]

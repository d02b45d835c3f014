import copy
import json
from pathlib import Path

import pytest

from tests.golden.replay import LOSS_TOLERANCE, WEIGHT_TOLERANCE, replay

HERE = Path(__file__).parent
TRACE = json.loads((HERE / "trace_dpo_ga1.json").read_text())


def test_recorded_run_is_reproduced_loss_by_loss():
    differences = replay(TRACE, HERE / "trace_model")
    assert len(differences.losses) == 6
    assert len(differences.weights) > 1000
    assert max(differences.losses) <= LOSS_TOLERANCE
    assert max(differences.weights) <= WEIGHT_TOLERANCE


def test_a_run_with_another_decay_is_not_reproduced():
    changed = copy.deepcopy(TRACE)
    changed["inputs"]["hyper"]["ema_beta"] = 0.2
    assert max(replay(changed, HERE / "trace_model").weights) > WEIGHT_TOLERANCE


def test_a_pair_that_differs_is_noticed():
    changed = copy.deepcopy(TRACE)
    changed["expected"]["micro_batches"][0]["generated_input_ids"][0][-2] += 1
    with pytest.raises(AssertionError, match="spliced response differs"):
        replay(changed, HERE / "trace_model")


def test_a_pick_that_differs_is_noticed():
    changed = copy.deepcopy(TRACE)
    assert changed["expected"]["micro_batches"][-1]["picked_insertion_numbers"] == [10, 9]
    changed["expected"]["micro_batches"][-1]["picked_insertion_numbers"] = [10, 8]
    differences = replay(changed, HERE / "trace_model")
    assert max(differences.losses) > LOSS_TOLERANCE
    assert max(differences.weights) > WEIGHT_TOLERANCE


def test_a_run_shorter_than_its_record_is_noticed():
    changed = copy.deepcopy(TRACE)
    changed["inputs"]["hyper"]["max_steps"] = 4
    with pytest.raises(AssertionError, match="4 of 6"):
        replay(changed, HERE / "trace_model")


def test_a_figure_that_is_not_a_number_is_noticed():
    changed = copy.deepcopy(TRACE)
    changed["expected"]["micro_batches"][3]["loss"] = float("nan")
    with pytest.raises(AssertionError, match="finite"):
        replay(changed, HERE / "trace_model")

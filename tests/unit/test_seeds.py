"""The shared random state is given back, whatever happens in between."""

import random

import numpy as np
import pytest
import torch

from sapo.seeds import random_state_restored


def drawn():
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def expected():
    with random_state_restored():
        seed_everything(3)
        yield drawn()


def test_a_guarded_block_does_not_move_the_random_state(expected):
    seed_everything(3)
    with random_state_restored():
        drawn()
        seed_everything(5)
    assert drawn() == expected


def test_an_error_in_a_guarded_block_does_not_move_the_random_state(expected):
    seed_everything(3)
    with pytest.raises(RuntimeError, match="inside"):
        seed_and_fail()
    assert drawn() == expected


def seed_and_fail():
    with random_state_restored():
        seed_everything(5)
        raise RuntimeError("inside")

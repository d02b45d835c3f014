"""The one source of randomness: seeds by explicit formula, and a guard for the state that libraries share."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on `parts` alone.

    All randomness of a run is drawn from such seeds: `parts` says what the draw concerns (run seed, purpose, epoch,
    row, draw), so nothing depends on batch composition, on the number of processes or on what was drawn before.

    Raises:
        ValueError: a part holds "/", which separates the parts: others would give the same seed.
    """
    for part in parts:
        if "/" in str(part):
            raise ValueError(f'derive_seed: part {part!r} holds "/", which separates the parts')
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Give Python, NumPy and torch (its CPU and its current CUDA device) their random state back, errors or not.

    For code that draws from, or seeds, the state that the training draws from.
    """
    # Seeds are derived by commands that start without torch.
    import numpy as np
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)

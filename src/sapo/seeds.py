"""The one source of randomness: seeds by explicit formula, and a guard for global random state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on `parts` alone.

    All randomness of a run comes from such seeds: `parts` name the draw (run seed, purpose, epoch, row, index), so
    nothing depends on batch composition, the number of processes or earlier draws.

    Raises:
        ValueError: a part contains the separator "/", so that other parts could give the same seed.
    """
    for part in parts:
        if "/" in str(part):
            raise ValueError(f'derive_seed: part {part!r} contains the separator "/"')
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (CPU and current accelerator), even after errors.

    For code that uses or seeds the global random state that training uses.
    """
    # Imported here: commands that start without torch derive seeds too.
    import numpy as np
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # MPS has one device, whose state torch cannot fork.
    kind = accelerator.type if accelerator is not None and accelerator.type != "mps" else "cuda"
    devices = [torch.accelerator.current_device_index()] if accelerator is not None and kind == accelerator.type else []
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)

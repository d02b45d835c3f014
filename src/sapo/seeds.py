"""The one source of randomness: seeds by explicit formula."""

from __future__ import annotations

import hashlib


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

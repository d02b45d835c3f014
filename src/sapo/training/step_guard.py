"""Optimizer steps whose loss or gradient is not finite: they change nothing, and too many in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from sapo.preference.pairs import Pair
from sapo.preference.replay_buffer import ReplayBuffer, Snapshot


@dataclass(frozen=True, slots=True)
class TrainedPair:
    """A pair of the current optimizer step and what it lost, in nats."""

    pair: Pair
    loss: float


class NonFiniteStepGuard:
    """Follows one optimizer step after another, and undoes in the buffer what a bad one did there.

    Args:
        buffer: of this process; None where pairs come from the data.
    """

    def __init__(self, buffer: ReplayBuffer[Pair] | None) -> None:
        self._buffer = buffer
        self._before: Snapshot[Pair] | None = None
        self.trained: list[TrainedPair] = []
        """The pairs of the current step, in the order of its micro-batches."""
        self.bad = False
        """Whether the last step that ended was bad."""
        self.in_a_row = 0
        """Bad steps up to and with the last that ended."""

    def begin(self) -> None:
        """A step begins."""
        self.trained = []
        self._before = None if self._buffer is None else self._buffer.snapshot()

    def note(self, pairs: Iterable[Pair], losses: Iterable[float]) -> None:
        """These pairs were learnt from in this step."""
        self.trained += [TrainedPair(pair, loss) for pair, loss in zip(pairs, losses, strict=True)]

    def end(self, accelerator: Accelerator, model: nn.Module) -> bool:
        """Before the optimizer acts: whether the step is bad on any process. If so the buffer is as it was before it.

        Args:
            accelerator: of the run; all processes take part.
            model: wrapped, with the gradients of the whole step.
        """
        finite = all(math.isfinite(one.loss) for one in self.trained)
        flags = torch.tensor([float(not finite), float(not _gradient_is_finite(accelerator, model))])
        if accelerator.num_processes > 1:
            flags = accelerator.reduce(flags.to(accelerator.device), "sum")
        self.bad = bool(flags.any())
        self.in_a_row = self.in_a_row + 1 if self.bad else 0
        if self.bad and self._buffer is not None and self._before is not None:
            self._buffer.undo(self._before)
        self._before = None
        return self.bad


def _gradient_is_finite(accelerator: Accelerator, model: Any) -> bool:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # DeepSpeed has already stepped, or refrained because of this very norm.
        norm = model.get_global_grad_norm()
        return norm is None or math.isfinite(norm)
    norm = torch.nn.utils.get_total_norm([w.grad for w in model.parameters() if w.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return bool(torch.isfinite(norm))


def describe(trained: Iterable[TrainedPair], tokenizer: Any) -> list[dict[str, Any]]:
    """Pairs and their losses as rows that a person can read and a program can use."""
    return [
        {
            "row": one.pair.row,
            "turn": one.pair.turn,
            "loss": one.loss if math.isfinite(one.loss) else str(one.loss),
            **{
                name: tokenizer.decode(ids)
                for name, ids in (
                    ("prompt", one.pair.prompt_ids),
                    ("chosen", one.pair.chosen_ids),
                    ("rejected", one.pair.rejected_ids),
                )
            },
            "prompt_ids": one.pair.prompt_ids,
            "chosen_ids": one.pair.chosen_ids,
            "rejected_ids": one.pair.rejected_ids,
        }
        for one in trained
    ]

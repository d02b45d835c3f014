"""Optimizer steps whose loss or gradient is not finite: they change nothing, and too many in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from sapo.errors import TrainingError
from sapo.preference.objectives import ReferenceLogps
from sapo.preference.pairs import Pair, PairSource
from sapo.preference.scoring import PairScores
from sapo.training.scorer import ScoredPairs


@dataclass(frozen=True, slots=True)
class TrainedPair:
    """A pair of the current optimizer step and its loss in nats."""

    pair: Pair
    loss: float


class NonFiniteStepGuard:
    """Follows one optimizer step after another, and undoes in the pair source what a step that is not finite did there.

    Args:
        source: of this process.
    """

    def __init__(self, source: PairSource) -> None:
        self._source = source
        self.trained: list[TrainedPair] = []
        """The pairs of the current step, in the order of its micro-batches."""
        self.scored: list[ScoredPairs] = []
        """The same with their scores, pass by pass."""
        self.nonfinite = False
        """Whether the loss or the gradient of the last step that ended was not finite."""
        self.in_a_row = 0
        """Such steps up to and with the last that ended."""

    def begin(self) -> None:
        """An optimizer step begins."""
        self.trained, self.scored = [], []
        self._source.begin_step()

    def note(self, scored: ScoredPairs, losses: Iterable[float], draws: Sequence[int] | None) -> None:
        """This step is trained on these pairs; `losses` in nats, `draws` as in `PairBatch`."""
        for pair, loss, count in zip(scored.pairs, losses, draws or [1] * len(scored.pairs), strict=True):
            self.trained += [TrainedPair(pair, loss)] * count
        # Without what is no pair's own, and without an anchor's hidden states.
        scores = PairScores(*(tensor.detach() for tensor in scored.scores[:4]))
        reference = scored.reference if isinstance(scored.reference, ReferenceLogps) else None
        self.scored.append(scored._replace(scores=scores, reference=reference))

    def end(self, accelerator: Accelerator, model: nn.Module) -> bool:
        """Before the optimizer acts: whether the step is not finite on any process. If so the source is as before it.

        Args:
            accelerator: of the run; all processes take part.
            model: wrapped, with the gradients of the whole step.
        """
        finite = all(math.isfinite(one.loss) for one in self.trained)
        flags = torch.tensor([float(not finite), float(not _gradient_is_finite(accelerator, model))])
        if accelerator.num_processes > 1:
            flags = accelerator.reduce(flags.to(accelerator.device), "sum")
        self.nonfinite = bool(flags.any())
        self.in_a_row = self.in_a_row + 1 if self.nonfinite else 0
        if self.nonfinite:
            self._source.undo()
        return self.nonfinite

    def trace(self) -> list[list[Any]]:
        """Row, turn, start of the segment and loss in nats of each pair of the current step, as JSON."""
        return [[one.pair.row, one.pair.turn, one.pair.segment.start, _number(one.loss)] for one in self.trained]

    def described(self, tokenizer: Any) -> list[dict[str, Any]]:
        """The pairs of the current step with their losses and texts, as JSON."""
        return [
            {
                "row": one.pair.row,
                "turn": one.pair.turn,
                "loss": _number(one.loss),
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
            for one in self.trained
        ]

    def error(self, step: int, file: Path) -> TrainingError:
        """Of a run that ends at `step` after too many such steps; `file` holds the pairs of the last."""
        return TrainingError(
            f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, up to step {step}; weights, "
            f"moving average and buffer are as before them, the pairs of the last one are in {file}. Lower the "
            "learning rate, leave these rows out, or resume in bfloat16 or float32 if this is float16."
        )


def _number(value: float) -> float | str:
    """JSON has no number for what is not finite."""
    return value if math.isfinite(value) else str(value)


def _gradient_is_finite(accelerator: Accelerator, model: Any) -> bool:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # DeepSpeed has already stepped, or refrained because of this very norm.
        norm = model.get_global_grad_norm()
        return norm is None or math.isfinite(norm)
    norm = torch.nn.utils.get_total_norm([w.grad for w in model.parameters() if w.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return bool(torch.isfinite(norm))

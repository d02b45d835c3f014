"""Pairs, and where they come from: the protocol of a pair source, and the sources that only read the data.

`self_play` has the source that generates.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from sapo.data.examples import Example, Turn
from sapo.preference.segments import Segment
from sapo.seeds import derive_seed

if TYPE_CHECKING:
    from sapo.preference.objectives import ReferenceLogps

SourceState: TypeAlias = "dict[str, dict[str, Tensor]]"
"""What one process's source keeps in a checkpoint: tensors by name, in parts by name."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected response to one prompt, as token ids.

    `segment` is the span B of `chosen_ids` that was rewritten, `rewritten` the span B' of `rejected_ids` that
    replaced it; everything before `segment.start` is shared. For rows that came with both responses, the two spans
    are what follows their common beginning.
    """

    row: int
    turn: int
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    segment: Segment
    rewritten: Segment

    @property
    def identical(self) -> bool:
        """Whether the opponent wrote the very tokens that it was to replace: such a pair carries no signal."""
        chosen, rejected = self.segment, self.rewritten
        return self.chosen_ids[chosen.start : chosen.stop] == self.rejected_ids[rejected.start : rejected.stop]

    @property
    def is_sft(self) -> bool:
        """Whether there is a chosen response and nothing beside it (`SFTSource`)."""
        return len(self.segment) == 0 and len(self.rewritten) == 0


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """The examples of a micro-batch that is yet to come."""

    examples: Sequence[Example]
    epoch: int
    step: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class GeneratedPairs:
    """Pairs made ahead of the micro-batch that will store them, and the step whose opponent wrote them."""

    pairs: tuple[Pair, ...]
    step: int


class PairSource:
    """Turns the dataloader's examples into the pairs that the policy is trained on now.

    `pairs` is all that a source must have. The rest is the life of a source that keeps something from step to step
    (pairs, text generated ahead, weights on an engine): empty here, to be overridden where it is needed. A step is
    `begin_step`, `prefetch`, one `pairs` for each micro-batch, then `undo` if the step changed nothing, and
    `opponent_moved`.
    """

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """Pairs for one micro-batch; never empty when `examples` is not."""
        raise NotImplementedError

    def evaluation_pairs(self, examples: Sequence[Example]) -> list[Pair]:
        """One pair for each example, from seeds that training never uses; nothing is kept."""
        return self.pairs(examples, epoch=-1, step=0, micro_batch=0)

    def begin(self, step: int, checkpoint: Path | None = None) -> None:
        """Training starts at `step`, perhaps from a checkpoint that `restore` has read; all processes take part."""

    def begin_step(self) -> None:
        """An optimizer step begins: what happens from here on may be undone."""

    def prefetch(self, pending: Sequence[PendingBatch], step: int) -> None:
        """Be told which micro-batches come next, those of `step` first."""

    def undo(self) -> None:
        """Take back what the step that has begun did to this source."""

    def opponent_moved(self, step: int) -> None:
        """Optimizer step number `step` is over and the opponent has followed it; all processes take part."""

    def ready(self, step: int) -> AbstractContextManager[None]:
        """Within it `evaluation_pairs` can be called, in a run or outside of one."""
        return nullcontext()

    def clear(self) -> None:
        """Forget what belongs to an earlier start of the run."""

    def reference_logps(self, pairs: Sequence[Pair], score: Callable[[list[Pair]], ReferenceLogps]) -> ReferenceLogps:
        """Log-probabilities of `pairs` under a reference that stands still.

        Args:
            pairs: what `pairs` has returned.
            score: computes those that are not known yet; called at most once.
        """
        return score(list(pairs))

    def reference_moved(self) -> None:
        """What `reference_logps` has seen is true no longer."""

    def history(self, pair: Pair, step: int) -> dict[str, int]:
        """For the report: `age` in steps and `draws` of a pair that is stored; else nothing."""
        return {}

    def state(self) -> SourceState:
        """What a checkpoint keeps of this process."""
        return {}

    def restore(
        self, states: Sequence[SourceState], *, vocabulary_size: int, share: tuple[int, int] | None = None
    ) -> None:
        """Continue from a checkpoint.

        Args:
            states: this process's own; with `share` those of all processes that wrote the checkpoint.
            vocabulary_size: token ids lie below it.
            share: (index, count) of this process where the number of processes has changed: take this part of all.

        Raises:
            ValueError, CheckpointError: no state that this source can have had.
        """

    def save(self, folder: Path, step: int) -> None:
        """Add files of its own to a checkpoint, after `state`."""

    def close(self) -> None:
        """Training has ended, as it should or not."""


def turn_of_epoch(example: Example, *, seed: int, epoch: int) -> Turn:
    """The reply of an example that is trained on in this epoch: the only one, or one drawn for each epoch."""
    turns = example.turns
    if len(turns) == 1:
        return turns[0]
    return random.Random(derive_seed(seed, "turn", epoch, example.row)).choice(turns)


class SFTSource(PairSource):
    """Good responses with nothing beside them: SFT on the same trainer, for comparison at equal steps."""

    def __init__(self, *, seed: int) -> None:
        self._seed = seed

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """One pair an example, of which only the chosen response counts."""
        return [sft_pair(example, turn_of_epoch(example, seed=self._seed, epoch=epoch)) for example in examples]


def sft_pair(example: Example, turn: Turn) -> Pair:
    """A response as a pair in which nothing is rewritten; see `Pair.is_sft`."""
    end = Segment(len(turn.response_ids), len(turn.response_ids))
    return Pair(example.row, turn.index, turn.prompt_ids, turn.response_ids, turn.response_ids, end, end)


class PairedData(PairSource):
    """Pairs of a preference dataset, as they are: plain offline DPO and ORPO on the same trainer."""

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """The examples' own chosen and rejected responses."""
        return [paired(example) for example in examples]


def paired(example: Example) -> Pair:
    """The pair of an example that has both responses.

    Raises:
        ValueError: the example has no rejected response.
    """
    turn = example.turns[-1]
    if turn.rejected_ids is None:
        raise ValueError(f"row {example.row} has no rejected response")
    shared = 0
    for chosen, rejected in zip(turn.response_ids, turn.rejected_ids, strict=False):
        if chosen != rejected:
            break
        shared += 1
    return Pair(
        row=example.row,
        turn=turn.index,
        prompt_ids=turn.prompt_ids,
        chosen_ids=turn.response_ids,
        rejected_ids=turn.rejected_ids,
        segment=Segment(shared, len(turn.response_ids)),
        rewritten=Segment(shared, len(turn.rejected_ids)),
    )

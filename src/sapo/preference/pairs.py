"""Pairs, the protocol of pair sources, and the sources that only read data.

`self_play` has the source that generates pairs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
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
"""A source's state of one process in a checkpoint: named parts of named tensors."""


_IDS: dict[int, int] = {}


def shared_ids(ids: Iterable[int]) -> tuple[int, ...]:
    """Token ids as integers that all pairs share: of its own, each takes as much memory again as three references."""
    return tuple(_IDS.setdefault(token, token) for token in ids)


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected response to one prompt.

    Attributes:
        row: row of the dataset, from 0.
        turn: index of the reply among the assistant messages of the row.
        prompt_ids: token ids of the prompt.
        chosen_ids: token ids of the response in the data, with its EOS token.
        rejected_ids: token ids of the other response; where there is none (`is_sft`) the chosen one again.
        segment: the regenerated span B of `chosen_ids`; everything before it is shared. For rows with both responses,
            what follows their common prefix.
        rewritten: the span B' of `rejected_ids` that replaced it.
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
        """Whether the opponent generated the original tokens: such a pair carries no signal."""
        chosen, rejected = self.segment, self.rewritten
        return self.chosen_ids[chosen.start : chosen.stop] == self.rejected_ids[rejected.start : rejected.stop]

    @property
    def is_sft(self) -> bool:
        """Whether there is only a chosen response (`SFTSource`)."""
        return len(self.segment) == 0 and len(self.rewritten) == 0


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """The examples of a future micro-batch."""

    examples: Sequence[Example]
    epoch: int
    step: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class GeneratedPairs:
    """Pairs generated ahead of their micro-batch, and the step of the opponent that generated them."""

    pairs: tuple[Pair, ...]
    step: int


class PairSource:
    """Turns the dataloader's examples into the pairs of the current step.

    Only `pairs` is required. The other methods are hooks for sources with state (stored pairs, text generated ahead,
    weights on an engine), and do nothing by default. A step is
    `begin_step`, `prefetch`, one `pairs` for each micro-batch, then `undo` if the step was skipped, and
    `opponent_moved`.
    """

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """Pairs for one micro-batch; not empty unless `examples` is."""
        raise NotImplementedError

    def evaluation_pairs(self, examples: Sequence[Example]) -> list[Pair]:
        """One pair for each example, from seeds that training never uses; nothing is stored."""
        return self.pairs(examples, epoch=-1, step=0, micro_batch=0)

    def begin(self, step: int, checkpoint: Path | None = None) -> None:
        """Start training at `step`, after `restore` if there is a checkpoint; collective over all processes."""

    def begin_step(self) -> None:
        """Begin an optimizer step that `undo` can revert."""

    def prefetch(self, pending: Sequence[PendingBatch], step: int) -> None:
        """Prefetch for the next micro-batches, those of `step` first."""

    def undo(self) -> None:
        """Revert the changes of the current step to this source."""

    def opponent_moved(self, step: int) -> None:
        """Called after step `step` and the opponent's update; collective over all processes."""

    def ready(self, step: int) -> AbstractContextManager[None]:
        """Context in which `evaluation_pairs` may be called, during a run or outside of one."""
        return nullcontext()

    def clear(self) -> None:
        """Discard state of an earlier start of the run."""

    def reference_logps(self, pairs: Sequence[Pair], score: Callable[[list[Pair]], ReferenceLogps]) -> ReferenceLogps:
        """Log-probabilities of `pairs` under a fixed reference.

        Args:
            pairs: pairs returned by `pairs`.
            score: computes missing values; called at most once.
        """
        return score(list(pairs))

    def reference_moved(self) -> None:
        """Invalidate the values of `reference_logps`."""

    def history(self, pair: Pair, step: int) -> dict[str, int]:
        """For the report: `age` in steps and `draws` of a stored pair; empty for others."""
        return {}

    def state(self) -> SourceState:
        """State of this process for a checkpoint."""
        return {}

    def restore(
        self, states: Sequence[SourceState], *, vocabulary_size: int, share: tuple[int, int] | None = None
    ) -> None:
        """Continue from a checkpoint.

        Args:
            states: state of this process; with `share`, those of all processes of the checkpoint.
            vocabulary_size: upper bound of token ids, exclusive.
            share: (index, count) of this process if the number of processes has changed.

        Raises:
            ValueError, CheckpointError: the state is invalid.
        """

    def save(self, folder: Path, step: int) -> None:
        """Add files to a checkpoint, after `state`."""

    def close(self) -> None:
        """Free resources at the end of training, also after errors."""


class SourceDecorator(PairSource):
    """Leaves everything to another source; a subclass changes what it is for."""

    def __init__(self, source: PairSource) -> None:
        self._source = source

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """The source's."""
        return self._source.pairs(examples, epoch=epoch, step=step, micro_batch=micro_batch)

    def begin(self, step: int, checkpoint: Path | None = None) -> None:
        """The source's."""
        self._source.begin(step, checkpoint)

    def evaluation_pairs(self, examples: Sequence[Example]) -> list[Pair]:
        """The source's."""
        return self._source.evaluation_pairs(examples)

    def begin_step(self) -> None:
        """The source's."""
        self._source.begin_step()

    def prefetch(self, pending: Sequence[PendingBatch], step: int) -> None:
        """The source's."""
        self._source.prefetch(pending, step)

    def undo(self) -> None:
        """The source's."""
        self._source.undo()

    def opponent_moved(self, step: int) -> None:
        """The source's."""
        self._source.opponent_moved(step)

    def ready(self, step: int) -> AbstractContextManager[None]:
        """The source's."""
        return self._source.ready(step)

    def clear(self) -> None:
        """The source's."""
        self._source.clear()

    def reference_logps(self, pairs: Sequence[Pair], score: Callable[[list[Pair]], ReferenceLogps]) -> ReferenceLogps:
        """The source's."""
        return self._source.reference_logps(pairs, score)

    def reference_moved(self) -> None:
        """The source's."""
        self._source.reference_moved()

    def history(self, pair: Pair, step: int) -> dict[str, int]:
        """The source's."""
        return self._source.history(pair, step)

    def state(self) -> SourceState:
        """The source's."""
        return self._source.state()

    def restore(
        self, states: Sequence[SourceState], *, vocabulary_size: int, share: tuple[int, int] | None = None
    ) -> None:
        """The source's."""
        self._source.restore(states, vocabulary_size=vocabulary_size, share=share)

    def save(self, folder: Path, step: int) -> None:
        """The source's."""
        self._source.save(folder, step)

    def close(self) -> None:
        """The source's."""
        self._source.close()


def turn_of_epoch(example: Example, *, seed: int, epoch: int) -> Turn:
    """The reply of an example to train on in this epoch: the only one, or a random one per epoch."""
    turns = example.turns
    if len(turns) == 1:
        return turns[0]
    return random.Random(derive_seed(seed, "turn", epoch, example.row)).choice(turns)


class SFTSource(PairSource):
    """Chosen responses only: SFT with the same trainer, for comparison at equal steps."""

    def __init__(self, *, seed: int) -> None:
        self._seed = seed

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """One pair per example, with only a chosen response."""
        return [sft_pair(example, turn_of_epoch(example, seed=self._seed, epoch=epoch)) for example in examples]


def sft_pair(example: Example, turn: Turn) -> Pair:
    """A response as a pair without a rejected side; see `Pair.is_sft`."""
    end = Segment(len(turn.response_ids), len(turn.response_ids))
    return Pair(example.row, turn.index, turn.prompt_ids, turn.response_ids, turn.response_ids, end, end)


class PairedData(PairSource):
    """Pairs of a preference dataset: offline DPO and ORPO with the same trainer."""

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """Chosen and rejected responses of the examples."""
        return [paired(example) for example in examples]


def paired(example: Example) -> Pair:
    """The pair of an example with both responses.

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

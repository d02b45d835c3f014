"""Where pairs come from: the model playing against its own moving average, or rows that already hold them.

From an example to a drawn batch, in the order of the published training step: choose a segment, let the opponent
write it anew, splice, store, draw.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sapo.config import SAPOConfig
from sapo.data.examples import Example, Turn
from sapo.generation.protocol import Generator
from sapo.preference.replay_buffer import ReplayBuffer
from sapo.preference.segments import PUBLISHED_TAIL_MARGIN, Segment, Suffix, choose_segment, cut_at_end, splice
from sapo.seeds import derive_seed

Record = Callable[[str, float], None]
"""Takes one observation of a metric: its name and its value."""


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


class PairSource(Protocol):
    """Turns the dataloader's examples into the pairs that the policy learns from now."""

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """Pairs for one micro-batch; never empty when `examples` is not."""
        ...


def _ignore(name: str, value: float) -> None:
    """Where nobody asks for metrics."""


@dataclass(frozen=True, slots=True)
class SelfPlaySettings:
    """How pairs are made; every field is an option of `SAPOConfig`, described there."""

    segment_length: float | None = 256
    tail_margin: int = PUBLISHED_TAIL_MARGIN
    suffix: Suffix = "keep"
    num_generations: int = 1
    generation_interval: int = 1
    skip_identical: bool = True
    max_new_tokens: int | None = None
    max_length: int | None = None
    replay_max_age: int | None = None


@dataclass(frozen=True, slots=True)
class _Draft:
    """A response whose segment is chosen and not yet rewritten."""

    row: int
    turn: Turn
    segment: Segment
    seed: int


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


class SelfPlay:
    """Pairs that the opponent makes from good responses (section 3.2 and algorithm 1 of the paper).

    Args:
        generator: lets the opponent write.
        buffer: this process's replay buffer.
        settings: see `SelfPlaySettings`.
        eos_ids: tokens that end a response.
        seed: the run's seed. What concerns an example is seeded by (seed, epoch, row, turn, draw), draws from the
            buffer by (seed, step, micro-batch, process); nothing else is random.
        batch_size: pairs drawn per micro-batch.
        process: index of this process.
        record: receives `self_play/*` and `replay/*` metrics.
        any_process: whether something holds for any of the processes. To be given when the generator needs all of
            them at once, as with sharded weights; by default each decides for itself.
        written_by: the step whose opponent writes at a given step; by default the opponent of that very step.
    """

    def __init__(
        self,
        generator: Generator,
        buffer: ReplayBuffer[Pair],
        settings: SelfPlaySettings,
        *,
        eos_ids: Collection[int],
        seed: int,
        batch_size: int,
        process: int = 0,
        record: Record = _ignore,
        any_process: Callable[[bool], bool] = bool,
        written_by: Callable[[int], int] = int,
    ) -> None:
        self.buffer = buffer
        self.pool: dict[tuple[int, int], GeneratedPairs] = {}
        self._generator = generator
        self._settings = settings
        self._end_ids = frozenset(eos_ids)
        self._seed = seed
        self._batch_size = batch_size
        self._process = process
        self._record = record
        self._any_process = any_process
        self._written_by = written_by

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """Rewrite `examples`, store the new pairs, and draw a batch from everything stored."""
        settings = self._settings
        if settings.replay_max_age is not None:
            self.buffer.expire(step - settings.replay_max_age)
        # An empty buffer collects out of turn: a step always has pairs.
        if self._due(step) or self._any_process(len(self.buffer) == 0):
            self.prefetch([PendingBatch(examples, epoch, step, micro_batch)], step, due=True)
            written = self.pool.pop((step, micro_batch))
            self._record("self_play/staleness", step - written.step)
            self._store(written.pairs, written.step)
        rng = random.Random(derive_seed(self._seed, "draw", step, micro_batch, self._process))
        drawn = self.buffer.draw(self._batch_size, rng)
        self._record("replay/size", len(self.buffer))
        self._record("replay/mean_age", self.buffer.mean_age(step))
        self._record("replay/mean_draws", self.buffer.mean_draws())
        return drawn

    def _due(self, step: int) -> bool:
        return step % self._settings.generation_interval == 0

    def prefetch(self, pending: Sequence[PendingBatch], step: int, *, due: bool = False) -> None:
        """Write the pairs of `pending` micro-batches in one call of the generator, and keep them until their turn.

        What is written already stays; so do micro-batches whose step passes its examples over, unless `due`. A row's
        text is drawn from the row's own seed, so that pooling changes when it is written and nothing else.
        """
        new = self.unwritten(pending, due=due)
        if new:
            self.pool.update(self.write(self._generator, new, self._written_by(step)))

    def unwritten(self, pending: Sequence[PendingBatch], *, due: bool = False) -> list[PendingBatch]:
        """Those of `pending` whose pairs are to be made and are not waiting yet."""
        return [c for c in pending if (due or self._due(c.step)) and (c.step, c.micro_batch) not in self.pool]

    def write(
        self, generator: Generator, pending: Sequence[PendingBatch], step: int
    ) -> dict[tuple[int, int], GeneratedPairs]:
        """The pairs of micro-batches, by step and micro-batch, in one call of `generator`; nothing is kept.

        Args:
            generator: lets the opponent write.
            pending: the micro-batches.
            step: number of optimizer steps that the opponent who writes them has followed.
        """
        drafts = [[d for example in c.examples for d in self._drafts(example, c.epoch)] for c in pending]
        pairs = iter(self._written(generator, itertools.chain.from_iterable(drafts)))
        return {
            (micro_batch.step, micro_batch.micro_batch): GeneratedPairs(tuple(itertools.islice(pairs, len(own))), step)
            for micro_batch, own in zip(pending, drafts, strict=True)
        }

    def rewrite(self, examples: Sequence[Example], *, epoch: int) -> list[Pair]:
        """One pair per example and generation, the buffer untouched."""
        return self._written(self._generator, (d for example in examples for d in self._drafts(example, epoch)))

    def _written(self, generator: Generator, chosen: Iterable[_Draft]) -> list[Pair]:
        drafts = list(chosen)
        written = generator.generate(
            [(*d.turn.prompt_ids, *d.turn.response_ids[: d.segment.start]) for d in drafts],
            [self._budget(d) for d in drafts],
            [d.seed for d in drafts],
        )
        return [self._pair(draft, replacement) for draft, replacement in zip(drafts, written, strict=True)]

    def _budget(self, draft: _Draft) -> int:
        """Most tokens that may replace the segment."""
        most = self._settings.max_new_tokens
        if most is None:
            return len(draft.segment)
        if self._settings.max_length is None:
            return most
        return min(most, self._settings.max_length - len(draft.turn.prompt_ids))

    def _drafts(self, example: Example, epoch: int) -> list[_Draft]:
        turn = turn_of_epoch(example, seed=self._seed, epoch=epoch)
        drafts = []
        for draw in range(self._settings.num_generations):
            what = (epoch, example.row, turn.index, draw)
            segment = choose_segment(
                len(turn.response_ids),
                self._settings.segment_length,
                random.Random(derive_seed(self._seed, "segment", *what)),
                tail_margin=self._settings.tail_margin,
            )
            drafts.append(_Draft(example.row, turn, segment, derive_seed(self._seed, "tokens", *what)))
        return drafts

    def _pair(self, draft: _Draft, written: Sequence[int]) -> Pair:
        replacement = cut_at_end(written[: self._budget(draft)], self._end_ids)
        rejected = splice(
            draft.turn.response_ids,
            draft.segment,
            replacement,
            eos_ids=self._end_ids,
            suffix=self._settings.suffix,
        )
        return Pair(
            row=draft.row,
            turn=draft.turn.index,
            prompt_ids=draft.turn.prompt_ids,
            chosen_ids=draft.turn.response_ids,
            rejected_ids=tuple(rejected),
            segment=draft.segment,
            rewritten=Segment(draft.segment.start, draft.segment.start + len(replacement)),
        )

    def _store(self, pairs: Sequence[Pair], step: int) -> None:
        stored = [pair for pair in pairs if not (self._settings.skip_identical and pair.identical)]
        if not stored and len(self.buffer) == 0:
            stored = list(pairs)
        for pair in stored:
            self.buffer.add(pair, step)
        for pair in pairs:
            ended = bool(pair.rejected_ids) and pair.rewritten.stop == len(pair.rejected_ids)
            self._record("self_play/identical_fraction", float(pair.identical))
            self._record("self_play/eos_fraction", float(ended and pair.rejected_ids[-1] in self._end_ids))
            self._record("self_play/rejected_length", len(pair.rejected_ids))
            self._record("self_play/segment_length", len(pair.segment))


def self_play(
    generator: Generator,
    args: SAPOConfig,
    *,
    eos_ids: Collection[int],
    record: Record = _ignore,
    any_process: Callable[[bool], bool] = bool,
    written_by: Callable[[int], int] = int,
) -> SelfPlay:
    """`SelfPlay` with an empty buffer, as the options of a run ask for it; see there."""
    return SelfPlay(
        generator,
        ReplayBuffer(args.replay_buffer_size, draw=args.replay_draw, replacement=args.replay_replacement),
        SelfPlaySettings(**{name: getattr(args, name) for name in SelfPlaySettings.__slots__}),
        eos_ids=eos_ids,
        seed=args.seed,
        batch_size=args.per_device_train_batch_size,
        process=args.process_index,
        record=record,
        any_process=any_process,
        written_by=written_by,
    )


def turn_of_epoch(example: Example, *, seed: int, epoch: int) -> Turn:
    """The reply of an example that is learnt from in this epoch: the only one, or one drawn anew in each."""
    turns = example.turns
    if len(turns) == 1:
        return turns[0]
    return random.Random(derive_seed(seed, "turn", epoch, example.row)).choice(turns)


class SFTSource:
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


class PairedData:
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

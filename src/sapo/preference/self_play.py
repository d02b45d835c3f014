"""The pair source that generates: the model plays against its own moving average.

From an example to a drawn batch, in the order of the published training step: choose a segment, let the opponent
regenerate it, splice, store, draw.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from sapo.data.examples import Example, Turn
from sapo.errors import CheckpointError
from sapo.generation.protocol import Generator
from sapo.preference.objectives import ReferenceLogps
from sapo.preference.pair_tensors import (
    checked_entries,
    entries_to_tensors,
    pool_from_tensors,
    pool_to_tensors,
    redistribute,
)
from sapo.preference.pairs import (
    GeneratedPairs,
    Pair,
    PairSource,
    PendingBatch,
    SourceState,
    shared_ids,
    turn_of_epoch,
)
from sapo.preference.reference_scores import ReferenceScores
from sapo.preference.replay_buffer import BufferEntry, ReplayBuffer, Snapshot
from sapo.preference.segments import PUBLISHED_TAIL_MARGIN, Segment, Suffix, choose_segment, splice, truncate_at_eos
from sapo.seeds import derive_seed

Record = Callable[[str, float], None]
"""Records one observation of a metric: name and value."""


def _ignore(name: str, value: float) -> None:
    """Discard a metric."""


@dataclass(frozen=True, slots=True)
class SelfPlaySettings:
    """Settings of pair generation; each field is an option of `SAPOConfig`, described there."""

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
    """A response with its segment, before regeneration."""

    row: int
    turn: Turn
    segment: Segment
    seed: int


class SelfPlay(PairSource):
    """Pairs that the opponent generates from chosen responses (section 3.2 and algorithm 1 of the paper).

    Args:
        generator: generates with the opponent.
        buffer: this process's replay buffer.
        settings: see `SelfPlaySettings`.
        eos_ids: EOS tokens.
        seed: the run's seed. Generation for an example is seeded by (seed, epoch, row, turn, draw), draws from the
            buffer by (seed, step, micro-batch, process); nothing else is random.
        batch_size: pairs drawn per micro-batch.
        process: index of this process.
        record: receives `self_play/*` and `replay/*` metrics.
        any_process: logical or over all processes. Required if the generator needs all of them at once, as with
            sharded weights; by default each process decides alone.
        opponent_step: maps a step to the number of optimizer steps in its opponent's weights; by default the step
            itself.
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
        opponent_step: Callable[[int], int] = int,
    ) -> None:
        self.buffer = buffer
        """Pairs to draw from."""
        self.pool: dict[tuple[int, int], GeneratedPairs] = {}
        """Pairs generated ahead, by (step, micro-batch)."""
        self._generator = generator
        self._settings = settings
        self._eos_ids = frozenset(eos_ids)
        self._seed = seed
        self._batch_size = batch_size
        self._process = process
        self._record = record
        self._any_process = any_process
        self._opponent_step = opponent_step
        self._scores = ReferenceScores(2 * buffer.capacity)
        self._before: tuple[Snapshot[Pair], dict[tuple[int, int], GeneratedPairs]] | None = None

    def pairs(self, examples: Sequence[Example], *, epoch: int, step: int, micro_batch: int) -> list[Pair]:
        """Regenerate segments of `examples`, store the new pairs, and draw a batch from the buffer."""
        settings = self._settings
        if settings.replay_max_age is not None:
            self.buffer.expire(step - settings.replay_max_age)
        # An empty buffer is filled at any step, so that a step always has pairs.
        if self._due(step) or self._any_process(len(self.buffer) == 0):
            self.prefetch([PendingBatch(examples, epoch, step, micro_batch)], step, due=True)
            generated = self.pool.pop((step, micro_batch))
            self._record("self_play/staleness", step - generated.step)
            self._store(generated.pairs, generated.step)
        rng = random.Random(derive_seed(self._seed, "draw", step, micro_batch, self._process))
        drawn = self.buffer.draw(self._batch_size, rng)
        self._record("replay/size", len(self.buffer))
        self._record("replay/mean_age", self.buffer.mean_age(step))
        self._record("replay/mean_draws", self.buffer.mean_draws())
        return drawn

    def _due(self, step: int) -> bool:
        return step % self._settings.generation_interval == 0

    def prefetch(self, pending: Sequence[PendingBatch], step: int, *, due: bool = False) -> None:
        """Generate the pairs of `pending` micro-batches in one call of the generator, and keep them for later.

        Existing pairs are kept; micro-batches of steps that skip generation get none, unless `due`. Each row has its
        own seed, so pooling changes only when its text is generated.
        """
        for key in [key for key in self.pool if key[0] < step]:
            del self.pool[key]  # of a step that was undone
        new = self.missing(pending, due=due)
        if new:
            self.pool.update(self.generate_pairs(self._generator, new, self._opponent_step(step)))

    def missing(self, pending: Sequence[PendingBatch], *, due: bool = False) -> list[PendingBatch]:
        """Micro-batches of `pending` whose pairs must still be generated."""
        return [p for p in pending if (due or self._due(p.step)) and (p.step, p.micro_batch) not in self.pool]

    def generate_pairs(
        self, generator: Generator, pending: Sequence[PendingBatch], step: int
    ) -> dict[tuple[int, int], GeneratedPairs]:
        """The pairs of micro-batches, by step and micro-batch, in one call of `generator`; nothing is stored.

        Args:
            generator: generates with the opponent.
            pending: the micro-batches.
            step: number of optimizer steps in the opponent's weights.
        """
        drafts = [[d for example in p.examples for d in self._drafts(example, p.epoch)] for p in pending]
        pairs = iter(self._regenerated(generator, itertools.chain.from_iterable(drafts)))
        return {
            (batch.step, batch.micro_batch): GeneratedPairs(tuple(itertools.islice(pairs, len(own))), step)
            for batch, own in zip(pending, drafts, strict=True)
        }

    def regenerate(self, examples: Sequence[Example], *, epoch: int) -> list[Pair]:
        """One pair per example and generation, without the buffer."""
        return self._regenerated(self._generator, (d for example in examples for d in self._drafts(example, epoch)))

    def evaluation_pairs(self, examples: Sequence[Example]) -> list[Pair]:
        """One pair for each example, generated by the current opponent; nothing is stored."""
        # Epoch -1: training never uses these seeds.
        return self.regenerate(examples, epoch=-1)[:: self._settings.num_generations]

    # ---- From step to step ----

    def begin_step(self) -> None:
        """Take a snapshot of the buffer and of the pairs generated ahead."""
        self._before = self.buffer.snapshot(), dict(self.pool)

    def undo(self) -> None:
        """Revert the step's additions to and draws from the buffer, and what it took of the pairs generated ahead."""
        if self._before is not None:
            buffer, pool = self._before
            self.buffer.undo(buffer)
            self.pool.clear()
            self.pool.update(pool)
            self._before = None

    def reference_logps(self, pairs: Sequence[Pair], score: Callable[[list[Pair]], ReferenceLogps]) -> ReferenceLogps:
        """As `PairSource.reference_logps`; cached while a pair is stored."""
        return self._scores.of(pairs, score, self.buffer.items)

    def reference_moved(self) -> None:
        """Remove all scores."""
        self._scores.clear()

    def clear(self) -> None:
        """Remove all scores, and pairs that an earlier start generated ahead."""
        self.pool.clear()
        self._scores.clear()

    def history(self, pair: Pair, step: int) -> dict[str, int]:
        """Steps since a stored pair was generated, and how often it was drawn."""
        for entry in self.buffer.entries():
            if entry.item is pair:
                return {"age": step - 1 - entry.step, "draws": entry.draws}
        return {}

    # ---- Checkpoints ----

    def state(self) -> SourceState:
        """Buffer, scores under the reference, and pairs generated ahead."""
        return {
            "replay_buffer": entries_to_tensors(self.buffer.entries()),
            "reference_scores": {"logps": self._scores.state(self.buffer.items())},
            "pool": pool_to_tensors(self.pool),
        }

    def restore(
        self, states: Sequence[SourceState], *, vocabulary_size: int, share: tuple[int, int] | None = None
    ) -> None:
        """Continue from `state()`; pairs generated ahead are generated again if the number of processes changed.

        Raises:
            CheckpointError: more pairs than the replay buffer holds.
        """
        stored = [_stored(state, vocabulary_size) for state in states]
        own = stored[0]
        if share is None:
            checked_entries(states[0]["pool"], vocabulary_size)
            self.pool = pool_from_tensors(states[0]["pool"])
        else:
            own = redistribute(stored, share[1], step=lambda kept: kept[0].step)[share[0]]
        if len(own) > self.buffer.capacity:
            raise CheckpointError(
                f"the checkpoint's replay buffers contain {len(own)} pairs per process, but replay_buffer_size is "
                f"{self.buffer.capacity}. With fewer processes, raise replay_buffer_size to match."
            )
        self.buffer.restore(entry for entry, _ in own)
        scores = torch.tensor([score for _, score in own], dtype=torch.float64).reshape(len(own), 2)
        self._scores.restore(self.buffer.items(), scores)

    # ---- One pair ----

    def _regenerated(self, generator: Generator, chosen: Iterable[_Draft]) -> list[Pair]:
        drafts = list(chosen)
        replacements = generator.generate(
            [(*d.turn.generation_ids, *d.turn.response_ids[: d.segment.start]) for d in drafts],
            [self._budget(d) for d in drafts],
            [d.seed for d in drafts],
        )
        return [self._pair(draft, replacement) for draft, replacement in zip(drafts, replacements, strict=True)]

    def _budget(self, draft: _Draft) -> int:
        """Maximum number of tokens that may replace the segment."""
        limit = self._settings.max_new_tokens
        if limit is None:
            return len(draft.segment)
        if self._settings.max_length is None:
            return limit
        return min(limit, self._settings.max_length - len(draft.turn.wider_prompt_ids))

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

    def _pair(self, draft: _Draft, generated: Sequence[int]) -> Pair:
        replacement = truncate_at_eos(generated[: self._budget(draft)], self._eos_ids)
        rejected = splice(
            draft.turn.response_ids,
            draft.segment,
            replacement,
            eos_ids=self._eos_ids,
            suffix=self._settings.suffix,
        )
        return Pair(
            row=draft.row,
            turn=draft.turn.index,
            prompt_ids=shared_ids(draft.turn.prompt_ids),
            chosen_ids=shared_ids(draft.turn.response_ids),
            rejected_ids=shared_ids(rejected),
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
            self._record("self_play/eos_fraction", float(ended and pair.rejected_ids[-1] in self._eos_ids))
            self._record("self_play/rejected_length", len(pair.rejected_ids))
            self._record("self_play/segment_length", len(pair.segment))


def _stored(state: SourceState, vocabulary_size: int) -> list[tuple[BufferEntry[Pair], list[float]]]:
    """Entries of a process's replay buffer, with their scores under the reference."""
    entries = checked_entries(state["replay_buffer"], vocabulary_size)
    return list(zip(entries, state["reference_scores"]["logps"].tolist(), strict=True))

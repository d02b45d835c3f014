"""What a run is measured against, fixed before its first step: pairs to evaluate on, and examples to follow."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sapo.data.examples import Example, collate_examples, dataset_digest
from sapo.preference.pairs import Pair, PairSource
from sapo.seeds import derive_seed


class EvaluationPairs:
    """Pairs of the evaluation sets, made once by the initial opponent from seeds of their own.

    Args:
        source: regenerates examples, or passes on the pairs that they hold.
        batch_size: examples regenerated together.
    """

    def __init__(self, source: PairSource, *, batch_size: int) -> None:
        self._source = source
        self._batch_size = batch_size
        self._digests: dict[int, tuple[Any, str]] = {}
        self.made: dict[str, list[Pair]] = {}
        """By the digest of the prepared dataset; kept in checkpoints."""

    def of(self, dataset: Any) -> dict[tuple[int, int], Pair]:
        """The pairs of a prepared dataset by (row, turn), made if they are not yet."""
        digest = self.digest(dataset)
        if digest not in self.made:
            made: list[Pair] = []
            for first in range(0, len(dataset), self._batch_size):
                rows = [dataset[index] for index in range(first, min(first + self._batch_size, len(dataset)))]
                made += self._source.evaluation_pairs(collate_examples(rows)["examples"])
            self.made[digest] = made
        first_turns = (turns[0] for turns in dataset["turn"])
        return dict(zip(zip(dataset["row"], first_turns, strict=True), self.made[digest], strict=True))

    def digest(self, dataset: Any) -> str:
        """The content of a prepared dataset as a hash, computed once."""
        if id(dataset) not in self._digests:
            # The dataset itself is kept too: its identity must not pass to another.
            self._digests[id(dataset)] = (dataset, dataset_digest(dataset))
        return self._digests[id(dataset)][1]


class ChosenProbe:
    """A few training examples whose chosen log-probability is followed through the run.

    Args:
        dataset: prepared training rows.
        size: examples to follow, at most.
        seed: of the run; decides which.
        logps: log-probability in nats of the last response of each example under the policy.
    """

    def __init__(
        self, dataset: Any, size: int, *, seed: int, logps: Callable[[Sequence[Example]], list[float]]
    ) -> None:
        self._dataset = dataset
        self._size = min(size, len(dataset))
        self._seed = seed
        self._logps = logps
        self.start: dict[str, list[float]] | None = None
        """`indices` and `logps` before the first step; kept in checkpoints. None before they are taken."""

    def begin(self) -> None:
        """Note where the examples stand, unless a checkpoint has told."""
        if self._size and self.start is None:
            rng = random.Random(derive_seed(self._seed, "probe"))
            indices = sorted(rng.sample(range(len(self._dataset)), self._size))
            self.start = {"indices": [float(i) for i in indices], "logps": self._logps(self._examples(indices))}

    def restore(self, start: dict[str, list[float]] | None) -> None:
        """Continue from the `start` of a checkpoint.

        Raises:
            ValueError: it is none.
        """
        if start is not None:
            indices, logps = list(start["indices"]), [float(value) for value in start["logps"]]
            known = range(len(self._dataset))
            if len(indices) != len(logps) or not indices or not all(index in known for index in indices):
                raise ValueError("the examples to follow are not of this dataset")
        self.start = start

    def change(self) -> tuple[float, float] | None:
        """Mean change since the start in nats per response and in nats per token; None where nothing is followed."""
        if self.start is None:
            return None
        examples = self._examples(self.start["indices"])
        changes = np.subtract(self._logps(examples), self.start["logps"])
        tokens = sum(len(example.turns[-1].response_ids) for example in examples)
        return float(np.mean(changes)), float(np.sum(changes)) / tokens

    def _examples(self, indices: Sequence[float]) -> list[Example]:
        found: list[Example] = collate_examples([self._dataset[int(index)] for index in indices])["examples"]
        return found


def as_list_of_datasets(datasets: Any) -> list[Any]:
    """The evaluation sets in what Trainer calls `eval_dataset`: none, one, or several by name."""
    several = datasets.values() if isinstance(datasets, Mapping) else [datasets]
    return [dataset for dataset in several if dataset is not None]

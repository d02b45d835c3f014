"""What a run is measured against, fixed before its first step: pairs to evaluate on, and examples to follow."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from sapo.data.examples import Example, collate_examples, dataset_digest
from sapo.data.fingerprints import trained_on
from sapo.errors import ConfigurationError
from sapo.preference.pairs import Pair, PairSource
from sapo.seeds import derive_seed

logger = logging.get_logger(__name__)


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
        """The pairs of a prepared dataset by (row, turn), made if they are not yet.

        Raises:
            ConfigurationError: there is none.
        """
        if dataset is None:
            raise ConfigurationError("eval_dataset is missing: there is nothing to evaluate on.")
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


DEFAULT_PROBE = 16
"""Maximum number of examples that are followed where no number is asked for."""
_LEAST_PROBE, _PROBED_SHARE, _PROBED_PER_PAIR = 4, 40, 16
"""By default at least so many, at most one in so many of the pairs that the run trains on, and this many pairs trained
on between two looks at one example: the forward pass of an example takes an eighth of the time of a pair's step."""


class ChosenProbe:
    """A few training examples whose chosen log-probability is followed through the run.

    Args:
        dataset: prepared training rows.
        size: examples to follow, at most, at every log line; None for as many and as often as takes about 1% of the
            time. The rule counts pairs, not seconds, so that a run logs the same whatever the machine does.
        pairs: that a step trains on, on this process.
        seed: of the run; decides which.
        logps: log-probability in nats of the last response of each example under the policy.
    """

    def __init__(
        self,
        dataset: Any,
        size: int | None,
        *,
        pairs: int,
        seed: int,
        logps: Callable[[Sequence[Example]], list[float]],
    ) -> None:
        if isinstance(dataset, Mapping):
            raise ConfigurationError(
                f"train_dataset holds several datasets ({', '.join(dataset)}). Pass one of them, or join them "
                "with datasets.concatenate_datasets."
            )
        self._dataset = dataset
        self._wanted, self._pairs = size, pairs
        self._seed = seed
        self._logps = logps
        self.start: dict[str, list[float]] | None = None
        """`indices` and `logps` before the first step, and the `step` of the last look; kept in checkpoints. None
        before they are taken."""

    def begin(self, max_steps: int) -> None:
        """Note where the examples stand, unless a checkpoint has told."""
        size = self._wanted
        if size is None:
            size = min(DEFAULT_PROBE, max(_LEAST_PROBE, max_steps * self._pairs // _PROBED_SHARE))
        size = min(size, len(self._dataset))
        if size and self.start is None:
            rng = random.Random(derive_seed(self._seed, "probe"))
            indices = sorted(rng.sample(range(len(self._dataset)), size))
            logps = self._logps(self._examples(indices))
            self.start = {"indices": [float(i) for i in indices], "logps": logps, "step": [0.0]}

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
            start = {"indices": indices, "logps": logps, "step": [float(step) for step in start.get("step", [0.0])]}
        self.start = start

    def change(self, step: int, *, due: bool) -> tuple[float, float] | None:
        """Mean change since the start in nats per response and in nats per token.

        Args:
            step: of the log line.
            due: look in any case: this is the last step, or the run may end because of what is seen.

        Returns:
            None where nothing is followed, or it is too soon to look again.
        """
        if self.start is None:
            return None
        apart = math.ceil(_PROBED_PER_PAIR * len(self.start["indices"]) / self._pairs)
        if self._wanted is None and not due and step - self.start["step"][-1] < apart:
            return None
        self.start["step"] = [float(step)]
        examples = self._examples(self.start["indices"])
        changes = np.subtract(self._logps(examples), self.start["logps"])
        tokens = sum(len(example.turns[-1].response_ids) for example in examples)
        return float(np.mean(changes)), float(np.sum(changes)) / tokens

    def _examples(self, indices: Sequence[float]) -> list[Example]:
        found: list[Example] = collate_examples([self._dataset[int(index)] for index in indices])["examples"]
        return found


def compared_sets(datasets: Any, train: Any) -> list[Any]:
    """As `as_list_of_datasets`, with a warning of rows that are in `train`, where that is given, too."""
    found = as_list_of_datasets(datasets)
    for dataset in found if train is not None else ():
        for line in trained_on(train, dataset):
            logger.warning(line.removeprefix("warning: "))
    return found


def as_list_of_datasets(datasets: Any) -> list[Any]:
    """The evaluation sets in what Trainer calls `eval_dataset`: none, one, or several by name."""
    several = datasets.values() if isinstance(datasets, Mapping) else [datasets]
    return [dataset for dataset in several if dataset is not None]


def evaluation_set(datasets: Any, asked: Any = None) -> Any:
    """What `evaluate` measures on: `asked`, or one of what Trainer calls `eval_dataset` by its name, or all of them.

    Raises:
        ConfigurationError: none has that name.
    """
    if not isinstance(asked, str):
        return datasets if asked is None else asked
    if isinstance(datasets, Mapping) and asked in datasets:
        return datasets[asked]
    known = f"there are {', '.join(sorted(datasets))}" if isinstance(datasets, Mapping) else "none has a name"
    raise ConfigurationError(f"evaluate: no evaluation set is called {asked}; {known}.")

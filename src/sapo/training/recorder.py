"""What the report needs that nothing else keeps: a sample of pairs, and what the run runs on.

Which pairs: with n = `report_pairs`, S = (n - 4) // 8 and T = the steps of the run, snapshots are taken at the steps
ceil(j T / S) for j = 0 ... S. Each holds 4 followed prompts, and from j = 1 on the first 4 pairs that the step trained
on, on the first process, with the scores that it computed for them: at most n in all. The followed prompts are the same
at each snapshot (of 16 training rows, sampled by (seed, "followed"), four whose responses are rather short); the
opponent regenerates the same segment of each with the same random numbers (epoch -1), so that what changes from one
snapshot to the next is the opponent and nothing else. They cost time that nothing else needs: where `report_pairs` is
unset, n is 200 and they are in F + 1 snapshots, evenly spaced, F the largest divisor of S that leaves 300 pairs or more
to train on from one to the next, and in none of a shorter run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sapo.data.examples import Example, collate_examples
from sapo.preference.objectives import ReferenceLogps
from sapo.preference.pair_loss import pair_loss
from sapo.preference.pairs import Pair, PairSource
from sapo.preference.scoring import PairScores
from sapo.preference.self_replay import is_replayed
from sapo.report.page import write_report
from sapo.runs.files import keep_json_lines, write_atomically
from sapo.runs.folder import RunFolder
from sapo.runs.layout import PAIRS_FILE, REPORT_FILE, RUN_FILE
from sapo.runs.metrics import CHOSEN_LOGP, LOSS, MARGIN, REJECTED_LOGP
from sapo.runs.origin import origin, package_versions
from sapo.seeds import derive_seed
from sapo.training.context import RunContext
from sapo.training.scorer import PairScorer, ScoredPairs
from sapo.training.tracking import log_pairs
from sapo.weights.sharding import global_numel

FOLLOWED = 4
"""Prompts that are regenerated at each snapshot."""
TRAINED = 4
"""Pairs trained on that are kept at each snapshot."""
DEFAULT_PAIRS = 200
"""Pairs kept where no number is asked for."""
_PAIRS_BETWEEN = 300
"""By default this many pairs are trained on between two snapshots with followed prompts: of small batches each costs
up to a step's time, and this is 1% of the steps' time at four pairs a step."""
_SHARE_OF_TIME = 50
"""A report is refreshed only when this many times its own duration has passed since the last."""
_ADAPTER = re.compile(r"\.(lora_|modules_to_save\.|token_adapter\.|trainable_tokens_)")
"""In the names of weights that peft adds to a model."""


def snapshot_steps(max_steps: int, pairs: int) -> set[int]:
    """The steps at which pairs are kept, 0 (before the first) included; none if `pairs` is 0."""
    return _spaced(max_steps, _snapshots(pairs))


def followed_steps(max_steps: int, pairs: int | None, pairs_per_step: int) -> set[int]:
    """Those of the steps with a snapshot at which prompts are regenerated; `pairs` is `report_pairs`."""
    snapshots = _snapshots(DEFAULT_PAIRS if pairs is None else pairs)
    if pairs is None:
        most = max_steps * pairs_per_step // _PAIRS_BETWEEN
        snapshots = max((n for n in range(1, snapshots + 1) if snapshots % n == 0 and n <= most), default=0)
    return _spaced(max_steps, snapshots)


def _snapshots(pairs: int) -> int:
    return (pairs - FOLLOWED) // (FOLLOWED + TRAINED)


def _spaced(max_steps: int, snapshots: int) -> set[int]:
    return {math.ceil(j * max_steps / snapshots) for j in range(snapshots + 1)} if snapshots > 0 else set()


def loaded_step(args: TrainingArguments, state: TrainerState) -> int | None:
    """The step whose checkpoint was loaded when the run ended; None if the last step's models are the result."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    return int(Path(state.best_model_checkpoint).name.rsplit("-", 1)[1])


class RunRecorder(TrainerCallback):
    """Keeps pairs.jsonl and run.json while a run goes on, and writes its report now and then and at its end.

    Args:
        context: of the run.
        run_folder: takes the files, and notes a report that could not be written.
        source: regenerates the followed prompts, and knows the history of pairs.
        scorer: scores what is kept.
        dataset: prepared training rows.
        trained: returns the pairs of the last step as they were scored, pass by pass.
        stop_reason: returns why the run ended early, or None.
    """

    def __init__(
        self,
        context: RunContext,
        run_folder: RunFolder,
        source: PairSource,
        scorer: PairScorer,
        dataset: Any,
        trained: Callable[[], Sequence[ScoredPairs]],
        stop_reason: Callable[[], str | None],
    ) -> None:
        self._context = context
        self._source = source
        self._scorer = scorer
        self._dataset = dataset
        self._trained = trained
        self._stop_reason = stop_reason
        self._run_folder = run_folder
        self._steps: set[int] = set()
        self._followed_steps: set[int] = set()
        self._followed: list[int] = []
        self._refreshed, self._took = 0.0, 0.0

    @property
    def _folder(self) -> Path:
        return self._run_folder.path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Note what runs; drop pairs of steps that will be run again; keep the followed prompts as they start."""
        run = self._context.args
        kept = 0 if run.pair_source == "none" else run.report_pairs
        self._steps = snapshot_steps(state.max_steps, DEFAULT_PAIRS if kept is None else kept)
        pairs_per_step = run.per_device_train_batch_size * run.gradient_accumulation_steps
        self._followed_steps = followed_steps(state.max_steps, kept, pairs_per_step)
        self._followed = self._choose_followed()
        if state.is_world_process_zero:
            self._write_run(_describe(self._context, len(self._dataset), state))
            step = state.global_step
            # Nothing of another run where this one starts afresh.
            keep_json_lines(
                self._folder / PAIRS_FILE, lambda rows: [row for row in rows if step and row["step"] <= step]
            )
        if state.global_step == 0 and 0 in self._followed_steps:
            self._take(0)
        self._refreshed = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep pairs and refresh the report, when they are due, unless a signal ends the run now."""
        if control.should_training_stop and state.global_step < state.max_steps:
            return
        if state.global_step in self._steps:
            self._take(state.global_step)
        every = self._context.args.report_steps
        if every and state.global_step % every == 0 and state.is_world_process_zero:
            began = time.perf_counter()
            if began - self._refreshed >= _SHARE_OF_TIME * self._took:
                self._write_report()
                self._refreshed = time.perf_counter()
                self._took = self._refreshed - began

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write the report."""
        if not state.is_world_process_zero:
            return
        run = json.loads((self._folder / RUN_FILE).read_text(encoding="utf-8"))
        ended = {"ended": _now(), "steps": state.global_step, "stopped": self._stop_reason()}
        self._write_run(run | ended | {"loaded_step": loaded_step(args, state)})
        self._write_report()

    def _write_report(self) -> None:
        # The models are not saved yet: no report is worth their loss.
        self._run_folder.attempt(REPORT_FILE, lambda: write_report(self._folder / REPORT_FILE, [self._folder]))

    def _write_run(self, run: dict[str, Any]) -> None:
        write_atomically(self._folder / RUN_FILE, json.dumps(run, indent=1))

    def _take(self, step: int) -> None:
        """Write the pairs of a snapshot: all processes score the followed prompts, and the first keeps its own."""
        followed = [(pair, values) for part in self._score_followed(step) for pair, values in self._values(part)]
        if not self._context.world.first:
            return
        trained = [(pair, values) for part in self._trained() for pair, values in self._values(part)] if step else []
        rows = [
            {"step": step, "kind": kind, **texts_of(pair, self._context.tokenizer), **values}
            | (self._source.history(pair, step) if kind == "trained" else {})
            for kind, kept in (("followed", followed), ("trained", trained[:TRAINED]))
            for pair, values in kept
        ]
        log_pairs(self._context.args.report_to, rows, step)
        with (self._folder / PAIRS_FILE).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    def _choose_followed(self) -> list[int]:
        """The second quarter by length of a sample of rows: what they cost is bounded, and they say something."""
        rows = self._dataset
        rng = random.Random(derive_seed(self._context.args.seed, "followed"))
        sample = rng.sample(range(len(rows)), min(4 * FOLLOWED, len(rows)))
        responses = {place: len(self._example(place).turns[-1].response_ids) for place in sample}
        by_length = sorted(sample, key=lambda place: (responses[place], place))
        first = len(by_length) // 4
        return sorted(by_length[first : first + FOLLOWED])

    def _example(self, place: int) -> Example:
        example: Example = collate_examples([self._dataset[place]])["examples"][0]
        return example

    def _score_followed(self, step: int) -> Iterable[ScoredPairs]:
        """The followed prompts with segments of the current opponent, where they are due."""
        if step not in self._followed_steps:
            return
        pairs = self._source.evaluation_pairs([self._example(place) for place in self._followed])
        args = self._context.args
        size = args.pairs_per_forward or args.per_device_train_batch_size
        for first in range(0, len(pairs), size):
            part = pairs[first : first + size]
            yield ScoredPairs(part, *self._scorer.scores_of(part))

    def _values(self, scored: ScoredPairs) -> Iterable[tuple[Pair, dict[str, Any]]]:
        """Loss, rewards and log-probabilities of each pair, as the training logs them, and of the reference."""
        for place, pair in enumerate(scored.pairs):
            if is_replayed(pair):
                continue
            one = slice(place, place + 1)
            own = PairScores(*(tensor[one] for tensor in scored.scores[:4]))
            before = None
            if isinstance(scored.reference, ReferenceLogps):
                before = ReferenceLogps(scored.reference.chosen_logps[one], scored.reference.rejected_logps[one])
            metrics = pair_loss(own, before, self._context.args).metrics
            found = {
                "loss": metrics[LOSS.name],
                "margin": metrics[MARGIN.name],
                "chosen_logp": metrics[CHOSEN_LOGP.name],
                "rejected_logp": metrics[REJECTED_LOGP.name],
            }
            if before is not None:
                found["reference_chosen_logp"] = before.chosen_logps.item()
                found["reference_rejected_logp"] = before.rejected_logps.item()
            yield pair, {name: round(value, 5) if math.isfinite(value) else None for name, value in found.items()}


def texts_of(pair: Pair, tokenizer: Any) -> dict[str, Any]:
    """A pair as text, each response in three parts: before the segment, the segment, after it.

    The parts of a response joined are its text: it is decoded as a whole and cut, since a token decoded alone may lose
    a space or half a character.
    """

    def parts(ids: tuple[int, ...], start: int, stop: int) -> list[str]:
        text = tokenizer.decode([*pair.prompt_ids, *ids])
        cuts = [0]
        for count in (0, start, stop):
            head = tokenizer.decode([*pair.prompt_ids, *ids[:count]])
            cuts.append(max(cuts[-1], _shared(head, text)))
        return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]

    prompt, *chosen = parts(pair.chosen_ids, pair.segment.start, pair.segment.stop)
    _, *rejected = parts(pair.rejected_ids, pair.rewritten.start, pair.rewritten.stop)
    return {
        "row": pair.row,
        "turn": pair.turn,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "tokens": [len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)],
        "segment_tokens": [len(pair.segment), len(pair.rewritten)],
        "identical": pair.identical,
    }


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    if other.startswith(one):
        return len(one)
    return next(place for place, (a, b) in enumerate(zip(one + "\0", other + "\1", strict=False)) if a != b)


def _describe(context: RunContext, rows: int, state: TrainerState) -> dict[str, Any]:
    """Model, data, machine and versions of a run that begins."""
    policy = context.roles.policy()
    args = context.args
    # Without the adapters, of which a model may hold two: the policy's and the opponent's.
    base = [weight for name, weight in policy.named_parameters() if not _ADAPTER.search(name)]
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    named = getattr(torch.get_device_module(args.device), "get_device_name", None)
    gpu = named(args.device) if named is not None and args.device.type != "cpu" else None
    return {
        "model": str(policy.config._name_or_path) or type(policy).__name__,
        "parameters": sum(map(global_numel, base)),
        "trained_parameters": sum(map(global_numel, trained)),
        "adapter": context.roles.is_adapter,
        "dtype": str(base[0].dtype).removeprefix("torch."),
        "training_rows": rows,
        "max_steps": state.max_steps,
        "first_step": state.global_step,
        "processes": args.world_size,
        "device": gpu or str(args.device),
        "started": _now(),
        **origin(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": package_versions(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

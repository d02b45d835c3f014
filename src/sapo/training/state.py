"""The part of a run's state that Trainer does not know, and what a checkpoint must agree with: saved and restored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict

from sapo.data.chat_template import template_digest
from sapo.data.fingerprints import changed_rows, fingerprints
from sapo.errors import CheckpointError
from sapo.preference.pair_tensors import checked_entries, entries_to_tensors
from sapo.preference.pairs import PairSource
from sapo.preference.replay_buffer import BufferEntry
from sapo.runs import checkpoint as parts
from sapo.runs import untrusted
from sapo.runs.tensors import read_tensors, write_tensors
from sapo.training.agreement import check_processes
from sapo.training.context import RunContext
from sapo.training.log import TrainingLog
from sapo.training.probes import ChosenProbe, EvaluationPairs
from sapo.weights.opponent import POLICY_ADAPTER, base_digest, saves_embeddings
from sapo.weights.sharding import global_numel, sharding_of, zero_stage

_ROWS = "rows"
"""The part of a checkpoint that has the fingerprints of the training rows."""
_FREE_WITH_PROCESSES = [
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "replay_buffer_size",
]
"""May change together with the number of processes, as long as the batch of an optimizer step stays the same."""


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run keeps from step to step, beside the policy, the optimizer and the rest that Trainer saves.

    Attributes:
        context: of the run; its roles hold opponent and reference.
        accelerator: of the run.
        source: of pairs.
        log: averages since the last log line.
        eval_pairs: the fixed pairs of evaluations.
        probe: the examples that are followed; None without.
        dataset: the prepared training rows; None without.
        known_turns: their fingerprints, once they have been computed.
    """

    context: RunContext
    accelerator: Accelerator
    source: PairSource
    log: TrainingLog
    eval_pairs: EvaluationPairs
    probe: ChosenProbe | None
    dataset: Any
    known_turns: list[Any] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree with: options, data, model."""
        args = self.context.args
        facts = args.resume_facts()
        facts["global_batch_size"] = (
            args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
        )
        facts["sharding"] = sharding_of(self.accelerator)
        facts["dataset"] = self.eval_pairs.digest(self.dataset)
        if args.chat_template_path is not None:
            # By its content: the same template may lie elsewhere when the run resumes.
            facts["chat_template_path"] = template_digest(self.context.tokenizer)
        digest = self.context.roles.start_digest()
        if digest is not None:
            facts["start_model"] = digest
        base = base_digest(self.context.roles.policy())
        if base is not None:
            facts["base_weights"] = base
        facts["parameters"] = sum(map(global_numel, self.context.roles.policy().parameters()))
        return facts

    def check_processes(self, folder: Path) -> None:
        """Make sure that all processes train the same run and write in `folder`; see `sapo.training.agreement`."""
        with self.context.world.agreeing():
            check_processes(self.context, folder, self.dataset, self.eval_pairs.digest(self.dataset))

    def check(self, folder: Path) -> None:
        """Make sure that a checkpoint is complete, belongs to this run and cannot run code.

        Raises:
            CheckpointError: what is wrong with it.
        """
        with self.context.world.agreeing(), untrusted.reading(folder):
            parts.verify(folder)
            saved, current = dict(parts.read_state(folder)["facts"]), self.facts()
            same = saved.get("world_size") == current["world_size"]
            words = {"base_weights": "the weights of the base model have changed since then"}
            if "base_weights" not in saved:
                current.pop("base_weights", None)
            if saved.get("dataset") != current["dataset"] and (folder / f"{_ROWS}.safetensors").is_file():
                words["dataset"] = changed_rows(read_tensors(folder, _ROWS)["turns"].numpy(), self._turns())
            parts.compare_facts(folder, saved, current, free=() if same else _FREE_WITH_PROCESSES, words=words)
            if not same and zero_stage(self.accelerator):
                raise CheckpointError(
                    f"{folder}: DeepSpeed's optimizer state is sharded for {saved.get('world_size')} processes. Resume "
                    "with as many, or train with FSDP2, whose state can be sharded again."
                )
            untrusted.inspect(folder)
            if self.context.roles.is_adapter:
                _check_adapter(self.context.roles.policy(), folder)

    def save(self, folder: Path, step: int) -> None:
        """Add to a checkpoint what Trainer does not know; all processes take part."""
        folder.mkdir(parents=True, exist_ok=True)
        world = self.context.world
        for part, tensors in self.source.state().items():
            write_tensors(folder, f"{part}_{world.process}", tensors)
        self.source.save(folder, step)
        parts.write_json(folder, f"sapo_process_{world.process}.json", self.log.state())
        full = {role: shadow.full() for role, shadow in self.context.roles.kept().items()}
        if not world.first:
            return
        for role, tensors in full.items():
            write_tensors(folder, role, tensors)
        write_tensors(folder, _ROWS, {"turns": torch.from_numpy(self._turns())})
        for digest, pairs in self.eval_pairs.made.items():
            entries = [BufferEntry(pair, 0, 0) for pair in pairs]
            write_tensors(folder, f"eval_pairs_{digest}", entries_to_tensors(entries))
        parts.write_json(
            folder,
            parts.STATE_FILE,
            {
                "format": parts.FORMAT,
                "facts": self.facts(),
                "probe": self.probe.start if self.probe is not None else None,
                "eval_pairs": sorted(self.eval_pairs.made),
            },
        )

    def restore(self, folder: Path) -> None:
        """Take over from a verified checkpoint what Trainer does not know.

        Raises:
            CheckpointError: a part is missing, damaged or of other shapes.
        """
        with untrusted.reading(folder):
            state, world = parts.read_state(folder), self.context.world
            self.restore_copies(folder)
            processes = int(state["facts"]["world_size"])
            resized = processes != world.size
            sources = range(processes) if resized else [world.process]
            names = list(self.source.state())
            if names:
                self.source.restore(
                    [{name: read_tensors(folder, f"{name}_{process}") for name in names} for process in sources],
                    vocabulary_size=self._vocabulary_size,
                    share=(world.process, world.size) if resized else None,
                )
            # Metrics are summed over all processes: it does not matter which of them has them.
            logged = sources if world.first or not resized else []
            self.log.restore([parts.read_json(folder, f"sapo_process_{process}.json") for process in logged])
            if self.probe is not None:
                self.probe.restore(state["probe"])
            for digest in state["eval_pairs"]:
                if not re.fullmatch("[0-9a-f]+", digest):
                    raise ValueError(f"{digest!r} is not the digest of a dataset")
                tensors = read_tensors(folder, f"eval_pairs_{digest}")
                entries = checked_entries(tensors, self._vocabulary_size)
                self.eval_pairs.made[digest] = [entry.item for entry in entries]

    def restore_copies(self, folder: Path) -> None:
        """Put opponent and reference back as a checkpoint has them.

        Raises:
            CheckpointError: one is missing, damaged or of other shapes.
        """
        for role, shadow in self.context.roles.kept().items():
            try:
                shadow.restore(read_tensors(folder, role))
            except ValueError as error:
                raise CheckpointError(f"{folder / role}.safetensors: {error}.") from error

    def _turns(self) -> Any:
        if not self.known_turns:
            self.known_turns.append(fingerprints(self.dataset))
        return self.known_turns[0]

    @property
    def _vocabulary_size(self) -> int:
        return int(self.context.model_config.get_text_config().vocab_size)


def best_checkpoint_beside(folder: Path, best: str | None) -> str | None:
    """The best checkpoint as one beside `folder`, wherever the run folder was when it was saved; None if it is gone."""
    if best is None:
        return None
    here = folder.parent / Path(best).name
    return str(here) if (here / parts.MANIFEST_FILE).is_file() else None


def other_weights(names: Sequence[str]) -> CheckpointError:
    """The error of a checkpoint whose weights have other names than the model's."""
    return CheckpointError(
        f"the checkpoint's weights are not this model's: {len(names)} names differ, such as {names[0]}."
    )


def _check_adapter(policy: Any, folder: Path) -> None:
    """Peft fills in what an adapter lacks, and says nothing."""
    embeddings = saves_embeddings(policy, POLICY_ADAPTER)
    own = set(get_peft_model_state_dict(policy, adapter_name=POLICY_ADAPTER, save_embedding_layers=embeddings))
    different = sorted(own ^ set(read_tensors(folder, "adapter_model")))
    if different:
        raise other_weights(different)

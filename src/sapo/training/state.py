"""The part of a run's state that Trainer does not know, and what a checkpoint must agree with: saved and restored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict

from sapo.errors import CheckpointError
from sapo.options import resume_facts
from sapo.preference.pairs import Pair, SelfPlay
from sapo.preference.replay_buffer import BufferEntry
from sapo.runs import checkpoint as parts
from sapo.runs import untrusted
from sapo.weights.opponent import POLICY_ADAPTER, ShadowModel
from sapo.weights.sharding import global_numel, sharding_of, zero_stage

if TYPE_CHECKING:
    from sapo.training.trainer import SAPOTrainer

_FREE_WITH_PROCESSES = [
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "replay_buffer_size",
]
"""May change together with the number of processes, as long as the batch of an optimizer step stays the same."""


def facts(trainer: SAPOTrainer) -> dict[str, Any]:
    """What a checkpoint must agree with: options, data, model."""
    facts = resume_facts(trainer.args)
    facts["global_batch_size"] = (
        trainer.args.world_size * trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    )
    facts["sharding"] = sharding_of(trainer.accelerator)
    facts["dataset"] = trainer.eval_pairs.digest(trainer.train_dataset)
    facts["parameters"] = sum(map(global_numel, trainer.policy().parameters()))
    return facts


def check(trainer: SAPOTrainer, folder: Path) -> None:
    """Make sure that a checkpoint is whole, belongs to this run and cannot run code.

    Raises:
        CheckpointError: what is wrong with it.
    """
    parts.verify(folder)
    with untrusted.reading(folder):
        saved, current = dict(parts.read_state(folder)["facts"]), facts(trainer)
        same = saved.get("world_size") == current["world_size"]
        parts.compare_facts(folder, saved, current, free=() if same else _FREE_WITH_PROCESSES)
        if not same and zero_stage(trainer.accelerator):
            raise CheckpointError(
                f"{folder}: DeepSpeed's optimizer state is cut for {saved.get('world_size')} processes. Resume with "
                "as many, or train with FSDP2, whose state can be cut anew."
            )
        untrusted.inspect(folder)
        if trainer.is_adapter():
            _check_adapter(trainer.policy(), folder)


def _check_adapter(policy: Any, folder: Path) -> None:
    """Peft fills in what an adapter lacks, and says nothing."""
    own = set(get_peft_model_state_dict(policy, adapter_name=POLICY_ADAPTER))
    different = sorted(own ^ set(parts.read_tensors(folder, "adapter_model")))
    if different:
        raise other_weights(different)


def other_weights(names: Sequence[str]) -> CheckpointError:
    """The error of a checkpoint whose weights have other names than the model's."""
    return CheckpointError(
        f"the checkpoint's weights are not this model's: {len(names)} names differ, such as {names[0]}."
    )


def save(trainer: SAPOTrainer, folder: Path) -> None:
    """Add to a checkpoint what Trainer does not know."""
    folder.mkdir(parents=True, exist_ok=True)
    process = trainer.args.process_index
    if trainer.engine is not None and isinstance(trainer.source, SelfPlay):
        trainer.engine.drain(trainer.source)
        trainer.engine.save(folder, trainer.state.global_step)
    if isinstance(trainer.source, SelfPlay):
        entries = trainer.source.buffer.entries()
        parts.write_tensors(folder, f"replay_buffer_{process}", parts.entries_to_tensors(entries))
        scores = trainer.reference_scores.state(trainer.source.buffer.items())
        parts.write_tensors(folder, f"reference_scores_{process}", {"logps": scores})
        parts.write_tensors(folder, f"pool_{process}", parts.pool_to_tensors(trainer.source.pool))
    parts.write_json(folder, f"sapo_process_{process}.json", trainer.training_log.state())
    whole = {part: weights.whole() for part, weights in _frozen(trainer).items()}
    if not trainer.args.should_save:
        return
    for part, tensors in whole.items():
        parts.write_tensors(folder, part, tensors)
    for digest, pairs in trainer.eval_pairs.made.items():
        entries = [BufferEntry(pair, 0, 0) for pair in pairs]
        parts.write_tensors(folder, f"eval_pairs_{digest}", parts.entries_to_tensors(entries))
    parts.write_json(
        folder,
        parts.STATE_FILE,
        {
            "format": parts.FORMAT,
            "facts": facts(trainer),
            "probe": trainer.probe.start if trainer.probe is not None else None,
            "eval_pairs": sorted(trainer.eval_pairs.made),
        },
    )


def restore(trainer: SAPOTrainer, folder: Path) -> None:
    """Take over from a verified checkpoint what Trainer does not know.

    Raises:
        CheckpointError: a part is missing, damaged or of other shapes.
    """
    with untrusted.reading(folder):
        state = parts.read_state(folder)
        process = trainer.args.process_index
        for part, weights in _frozen(trainer).items():
            try:
                weights.restore(parts.read_tensors(folder, part))
            except ValueError as error:
                raise CheckpointError(f"{folder / part}.safetensors: {error}.") from error
        processes = state["facts"]["world_size"]
        if isinstance(trainer.source, SelfPlay):
            _restore_play(trainer, folder, trainer.source, processes)
        sources = [process]
        if processes != trainer.args.world_size:
            # Metrics are summed over all processes: it does not matter which of them has them.
            sources = list(range(processes)) if process == 0 else []
        trainer.training_log.restore([parts.read_json(folder, f"sapo_process_{one}.json") for one in sources])
        if trainer.probe is not None:
            trainer.probe.restore(state["probe"])
        for digest in state["eval_pairs"]:
            if not re.fullmatch("[0-9a-f]+", digest):
                raise ValueError(f"{digest!r} is not the digest of a data set")
            entries = _entries(trainer, parts.read_tensors(folder, f"eval_pairs_{digest}"))
            trainer.eval_pairs.made[digest] = [entry.item for entry in entries]
        _relocate_best_checkpoint(trainer, folder)


def _relocate_best_checkpoint(trainer: SAPOTrainer, folder: Path) -> None:
    """The best checkpoint is one beside `folder`, wherever the run folder lay when it was written."""
    best = trainer.state.best_model_checkpoint
    if best is not None:
        here = folder.parent / Path(best).name
        trainer.state.best_model_checkpoint = str(here) if (here / parts.MANIFEST_FILE).is_file() else None


def _restore_play(trainer: SAPOTrainer, folder: Path, source: SelfPlay, processes: int) -> None:
    """Buffer, scores and pairs written ahead of this process, from those of as many processes as there were."""
    own = trainer.args.process_index
    if processes == trainer.args.world_size:
        stored = _stored(trainer, folder, own)
        pool = parts.read_tensors(folder, f"pool_{own}")
        _entries(trainer, pool)
        source.pool = parts.pool_from_tensors(pool)
    else:
        # Pairs written ahead belong to batches cut otherwise; they are written again.
        everyone = [_stored(trainer, folder, process) for process in range(processes)]
        stored = parts.redistribute(everyone, trainer.args.world_size, step=lambda kept: kept[0].step)[own]
    if len(stored) > source.buffer.capacity:
        raise CheckpointError(
            f"{folder}: its replay buffers hold {len(stored)} pairs for each process, and replay_buffer_size is "
            f"{source.buffer.capacity}. With fewer processes, raise replay_buffer_size to match."
        )
    source.buffer.restore(entry for entry, _ in stored)
    scores = torch.tensor([score for _, score in stored], dtype=torch.float64).reshape(len(stored), 2)
    trainer.reference_scores.restore(source.buffer.items(), scores)


def _frozen(trainer: SAPOTrainer) -> dict[str, ShadowModel]:
    frozen = {}
    if trainer.opponent is not None:
        frozen["opponent"] = trainer.opponent
    if trainer.reference is not None and trainer.reference is not trainer.opponent:
        frozen["reference"] = trainer.reference
    return {part: weights for part, weights in frozen.items() if weights.tensors()}


def _stored(trainer: SAPOTrainer, folder: Path, process: int) -> list[tuple[BufferEntry[Pair], list[float]]]:
    """What a process had in its replay buffer, each with its scores under the reference."""
    entries = _entries(trainer, parts.read_tensors(folder, f"replay_buffer_{process}"))
    scores = parts.read_tensors(folder, f"reference_scores_{process}")["logps"].tolist()
    return list(zip(entries, scores, strict=True))


def _entries(trainer: SAPOTrainer, tensors: Mapping[str, torch.Tensor]) -> list[BufferEntry[Pair]]:
    """Pairs of a checkpoint, as a run with this model can have made them.

    Raises:
        ValueError: it cannot.
    """
    if any(tensor.dtype != torch.int64 for tensor in tensors.values()):
        raise ValueError("pairs are kept as whole numbers")
    vocabulary = int(trainer.policy().config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    for field in ("prompt_ids", "chosen_ids", "rejected_ids"):
        tokens = tensors[field]
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise ValueError(f"{field} holds tokens that the model does not know")
    entries = parts.entries_from_tensors(tensors)
    for entry in entries:
        if not (_is_valid(entry.item) and entry.step >= 0 and entry.draws >= 0):
            raise ValueError(f"an entry of row {entry.item.row} is not one that a replay buffer held")
    return entries


def _is_valid(pair: Pair) -> bool:
    """Whether both responses are there, and the two spans lie in them after a common beginning."""
    own, new = pair.segment, pair.rewritten
    inside = 0 <= own.start <= own.stop <= len(pair.chosen_ids) and new.start <= new.stop <= len(pair.rejected_ids)
    shared = own.start == new.start and pair.chosen_ids[: own.start] == pair.rejected_ids[: own.start]
    return bool(inside and shared and pair.prompt_ids and pair.chosen_ids and pair.rejected_ids)

"""The run folder: models, checkpoints, metrics, the resolved configuration. Nothing in it is ever half written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import logging

from sapo.errors import CheckpointError, ConfigurationError, TrainingError, brief, process_lost
from sapo.runs import checkpoint as parts
from sapo.runs.files import keep_json_lines, write_atomically
from sapo.runs.layout import (
    BAD_PAIRS_FILE,
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    OPPONENT_FOLDER,
    RECIPE_FILE,
    REPLIES_PATTERN,
    REPORT_FILES,
    RETENTION_PART,
    SELF_REPLAY_FILE,
    TRACE_FILE,
)
from sapo.runs.lock import check_unlocked, is_lost, locked
from sapo.runs.metrics import LOSS, RUNTIME
from sapo.runs.world import World

logger = logging.get_logger(__name__)

_TRACE_BYTES = 16 * 2**20
"""Beyond this the trace is set aside as `.old` in place of an earlier one, so that it stays bounded."""
_EARLY = (
    METRICS_FILE, TRACE_FILE.format(process="*") + "*",
    *(form.format(name) for name in (CONFIG_FILE, RECIPE_FILE, *REPORT_FILES) for form in ("{}", ".{}.*partial")),
)  # fmt: skip
"""What a run writes before its first checkpoint."""
_KEPT = (f"{RETENTION_PART}.safetensors", SELF_REPLAY_FILE, REPLIES_PATTERN)
"""What it generates once, before its first step."""
STAGING = ".saving"
"""In the run folder: where models and checkpoints are written before they get their names."""
_OLD = ".old"
_LOST = "was moved, removed or taken over by another run while this one wrote in it"


class RunFolder:
    """The output folder of one run, which need not exist; the first process of `world` writes."""

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self._world = world
        self.staging: Path | None = None
        """Where a checkpoint is being written; None in between."""
        self.lost: Path | None = None
        """Where the folder was before it was moved, removed or taken over; since then `path` is another."""
        self._measured = False
        """Whether `append_metrics` has begun the folder: an evaluation before the run."""
        self.failed: list[str] = []
        """What `attempt` could not write, and why."""

    # ---- Beginning ----

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes out of the folder; the first process of a run holds the lock."""
        return locked(self.path) if self._world.first else nullcontext()

    def find_checkpoint(self, wanted: str | bool | None) -> Path | None:
        """The checkpoint to resume from: none, a path, with `true` the newest in this folder, with `auto` that if
        any.
        """
        if wanted in (None, False, "false", "False"):
            return None
        self._recover()
        if wanted in (True, "true", "True", "auto"):
            newest = get_last_checkpoint(str(self.path)) if self.path.is_dir() else None
            # All resume from what the first finds, or begin afresh: a network may be late to show it to the others.
            newest = self._world.first_decides(newest)
            with self._world.agreeing():
                if newest is None and wanted != "auto":
                    raise CheckpointError(
                        f"{self.path}: no checkpoint to resume from. Leave resume_from_checkpoint out to start afresh."
                    )
            return self.path / Path(newest).name if newest is not None else None
        if self._world.first:
            _settle(Path(str(wanted)))
        self._world.barrier()
        with self._world.agreeing():
            if not Path(str(wanted)).is_dir():
                raise CheckpointError(f"{wanted}: no such checkpoint folder. Give a checkpoint-N folder, or true.")
        return Path(str(wanted))

    def home_of(self, file: str, checkpoint: Path, otherwise: str) -> Path:
        """The run folder that holds `file`: this one, or that of the checkpoint which is resumed.

        Raises:
            CheckpointError: neither does; `otherwise` says what the file is for, and the way out.
        """
        for home in (self.path, checkpoint.parent):
            if (home / file).is_file():
                return home
        raise CheckpointError(f"{checkpoint}: its run folder lacks {file}{otherwise}")

    def _recover(self) -> None:
        """Finish or undo what a crash while saving has left half done."""
        if self._world.first:
            if self.path.is_dir():
                check_renames(self.path)
            for left in [self.path / STAGING, *self.path.glob(f"{parts.REMOVING}*")]:
                shutil.rmtree(left, ignore_errors=True)
            for left in self.path.glob(".*.partial"):
                left.unlink()
            for old in [*self.path.glob(f".{PREFIX_CHECKPOINT_DIR}-*{_OLD}"), _aside(self.path / OPPONENT_FOLDER)]:
                _settle(old.with_name(old.name.removeprefix(".").removesuffix(_OLD)))
        self._world.barrier()

    def start_afresh(self, *, overwrite: bool, restarted: bool) -> None:
        """Make sure that an earlier run is neither mixed with this one nor lost; see `check_output_dir`."""
        with self._world.agreeing():
            if self._world.first:
                check_output_dir(self.path, overwrite=overwrite, restarted=restarted or self._measured)
                check_renames(self.path)
        if not self._world.first:
            return
        for old in [
            *self.path.glob(f"*{PREFIX_CHECKPOINT_DIR}-*"),
            self.path / OPPONENT_FOLDER,
            _aside(self.path / OPPONENT_FOLDER),
            self.path / STAGING,
        ]:
            shutil.rmtree(old, ignore_errors=True)
        per_process = [name.format(process="*") for name in (TRACE_FILE, BAD_PAIRS_FILE)]
        for pattern in (METRICS_FILE, *REPORT_FILES, *_KEPT, *per_process):
            for file in self.path.glob(f"{pattern}*"):
                # What this trainer has measured before the run belongs to it.
                if not (self._measured and file.name == METRICS_FILE):
                    file.unlink()
        self._measured = False

    @contextmanager
    def undone_unless(self, begun: Callable[[], bool]) -> Iterator[None]:
        """Leave nothing of a run that fails before it has `begun`: the next start finds the folder as this one did."""
        try:
            yield
        except Exception:
            if self._world.first and not begun():
                for pattern in (*_EARLY, *_KEPT):
                    for file in self.path.glob(pattern):
                        file.unlink()
            raise

    def begin(self, step: int, options: dict[str, Any]) -> None:
        """Write the resolved `options`, and drop metrics of steps after `step`, which will be run again."""
        if not self._world.first:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / CONFIG_FILE, yaml.safe_dump(options, sort_keys=True))
        for file in [self.path / METRICS_FILE, *self.path.glob(TRACE_FILE.format(process="*") + "*")]:
            keep_json_lines(file, partial(_until, step, once=file.name == METRICS_FILE))

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        """Write recipe.yaml, which reproduces the run."""
        if self._world.first:
            write_atomically(self.path / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=True, allow_unicode=True))

    def append_metrics(self, line: str) -> None:
        """Add one line to metrics.jsonl; raises as `append_trace`."""
        self._leave_if_lost()
        self._measured |= not self.path.is_dir() or not any(self.path.iterdir())
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / METRICS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def append_trace(self, step: int, pairs: Sequence[Sequence[Any]]) -> None:
        """Note which pairs a step trained on: [row, turn, start of the segment, loss in nats] of each.

        Raises:
            TrainingError: several processes have lost their folder.
        """
        self._leave_if_lost()
        file = self.path / TRACE_FILE.format(process=self._world.process)
        if file.exists() and file.stat().st_size > _TRACE_BYTES:
            file.replace(file.with_name(f"{file.name}{_OLD}"))
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "pairs": pairs}) + "\n")

    def _leave_if_lost(self) -> None:
        """Write beside the folder from now on if it is no longer this run's; `lost_error` tells the user."""
        if self.lost is not None or not (is_lost(self.path) if self._world.first else not self.path.is_dir()):
            return
        if self._world.size > 1:
            raise TrainingError(f"{self.path} {_LOST}. Move it back, and continue with --resume_from_checkpoint true.")
        self.lost, self.path = self.path, self.path.with_name(f"{self.path.name}.rescued")
        self.path.mkdir(parents=True, exist_ok=True)

    def lost_error(self, step: int) -> TrainingError:
        """Of a run that ends since its folder is lost, after `step` was saved."""
        saved = self.path / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        return TrainingError(
            f"{self.lost} {_LOST}. Step {step} is saved: continue with --resume_from_checkpoint {saved} and the "
            "--output_dir of your choice."
        )

    def write_bad_pairs(self, rows: Sequence[dict[str, Any]]) -> Path:
        """Write pairs with their texts and losses; returns the file."""
        file = self.path / BAD_PAIRS_FILE.format(process=self._world.process)
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
        return file

    # ---- Checkpoints ----

    def save_checkpoint(self, step: int, write: Callable[[], None], finish: Callable[[Path, Path], None]) -> Path:
        """Let `write` fill a staging folder, seal it, and rename it to `checkpoint-N`; all processes take part.

        Args:
            step: N.
            write: writes `staging`/checkpoint-N.
            finish: before the checkpoint is sealed: given the folder in staging and its place.

        Raises:
            CheckpointError: it cannot be written; nothing half written is left.
        """
        self._leave_if_lost()
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self.staging = self.path / STAGING
        try:
            if self._world.first:
                shutil.rmtree(self.staging, ignore_errors=True)
            self._world.barrier()
            # Another process may still write in it.
            with writing(self.path / name, self.staging if self._world.first else None):
                write()
                self._world.barrier()
        finally:
            staging, self.staging = self.staging, None
        finish(staging / name, self.path / name)
        if self._world.first:
            readable(*(staging / name).iterdir())
            parts.seal(staging / name)
            replace_folder(staging / name, self.path / name)
            shutil.rmtree(staging, ignore_errors=True)
        self._world.barrier()
        return self.path / name

    # ---- Files that are not worth a run ----

    def attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write something that is not worth losing the rest for: a failure is a warning, and kept in `failed`."""
        try:
            write()
        except Exception as error:  # noqa: BLE001 - whatever it is
            self.failed.append(f"{what} ({type(error).__name__}: {brief(error)})")
            logger.warning(f"{self.path}: could not write {self.failed[-1]}")


def check_output_dir(path: Path, *, overwrite: bool, restarted: bool = False) -> None:
    """Refuse to start afresh over an earlier run, where nothing can be written, or where another process writes.

    Args:
        path: of the run folder.
        overwrite: whether anything may be replaced.
        restarted: whether what a run leaves before its first checkpoint may be.

    Raises:
        ConfigurationError: says what is there.
    """
    try:
        link = path.readlink() if path.is_symlink() and not path.exists() else None
    except OSError as error:
        raise ConfigurationError(f"output_dir={path}: {error.strerror}. Name another folder.") from error
    if link is not None:
        raise ConfigurationError(
            f"output_dir={path} is a link to {link}, which is not there. Make that folder, or name another."
        )
    if path.exists() and not path.is_dir():
        raise ConfigurationError(f"output_dir={path} is a file. Name a folder.")
    _check_writable(path)
    check_unlocked(path)
    present = sorted(file.name for file in path.iterdir() if file.name != LOCK_FILE) if path.is_dir() else []
    if restarted:
        present = [name for name in present if not any(fnmatch(name, pattern) for pattern in (*_EARLY, ".rehearsal-*"))]
    if present and not overwrite:
        raise ConfigurationError(
            f"output_dir={path} is not empty (it holds {present[0]}). Choose another, continue with "
            "--resume_from_checkpoint true, or replace it with --overwrite_output_dir."
        )


def check_renames(path: Path) -> None:
    """Refuse a run folder in which folders cannot be renamed, before anything is trained.

    A checkpoint gets its name when it is complete. Mounts of object stores have no folders, and many refuse.
    """
    probe, moved = path / ".rename-probe", path / ".rename-probe-moved"
    try:
        probe.mkdir(parents=True, exist_ok=True)
        (probe / "file").write_bytes(b"")
        probe.rename(moved)
        reason = "" if (moved / "file").is_file() and not probe.exists() else "what was in it did not move"
    except OSError as error:
        reason = brief(error)
    finally:
        for left in (probe, moved):
            shutil.rmtree(left, ignore_errors=True)
    if reason:
        raise CheckpointError(
            f"output_dir={path}: folders cannot be renamed there ({reason}), as in a mounted bucket, and a checkpoint "
            "is renamed when it is complete. Use a local disk, and copy checkpoints to the bucket as "
            "`sapo recipes cluster/sky.yaml` does."
        )


def _check_writable(path: Path) -> None:
    """Ask whether files can be made in `path` without making anything: a run that is refused leaves no folder."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ConfigurationError(f"output_dir={path}: {there} is a file. Name another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigurationError(f"output_dir={path}: no permission to write in {there}. Name a folder of yours.")
    if there == path:
        return
    probe = there / f".sapo-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise ConfigurationError(
            f"output_dir={path}: a folder cannot be made in {there} ({error.strerror}). Name another folder."
        ) from error


def readable(*paths: Path) -> None:
    """Give files the permissions that the umask asks for: safetensors makes them readable by their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in paths:
        if file.is_file():
            file.chmod(0o666 & ~umask)


def replace_folder(new: Path, target: Path) -> None:
    """Put the complete folder `new` where `target` is; a crash at any point leaves one of the two for `_settle`."""
    _settle(target)
    if target.exists():
        target.rename(_aside(target))
    new.rename(target)
    _settle(target)


def _settle(target: Path) -> None:
    """After a replacement, whole or cut short: remove the old folder, or put it back where the new one is missing."""
    old = _aside(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(target)


def _aside(target: Path) -> Path:
    # Hidden: `model.old` beside `model` is what a person calls an own copy.
    return target.with_name(f".{target.name}{_OLD}")


@contextmanager
def writing(target: Path, staging: Path | None) -> Iterator[None]:
    """Tell of a full disk in one line, and leave nothing half written: `staging` is removed, if it is given."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch tells of a full disk by a RuntimeError, as of much else.
        lost = process_lost(error) is not None
        of_disk = not isinstance(error, RuntimeError) or "writ" in str(error) or "unexpected pos" in str(error)
        if not (lost or of_disk):
            raise
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if lost:
            raise
        raise CheckpointError(
            f"{target} cannot be written ({brief(error)}); what was there is as it was. Make room, "
            "then continue with --resume_from_checkpoint true."
        ) from error


def _until(step: int, rows: list[dict[str, Any]], *, once: bool) -> list[dict[str, Any]]:
    """The rows up to `step`; with `once` the last one of a kind: a run may have been there twice."""
    kept = [row for row in rows if row["step"] <= step]
    return list({_kind_of(row): row for row in kept}.values()) if once else kept


def _kind_of(row: dict[str, Any]) -> tuple[object, ...]:
    """What two lines of metrics have in common of which the later one counts: step, and what was measured."""
    for name in (LOSS.name, RUNTIME.name):
        if name in row:
            return row["step"], name
    return row["step"], *sorted(row)

"""State shared by the suites of one command: options, models (one in memory at a time), finished parts, output."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sapo.data.chat_template import read_chat_template, template_digest
from sapo.errors import ConfigurationError
from sapo.evaluation.judge import JudgeOptions
from sapo.evaluation.store import FinishedParts
from sapo.evaluation.targets import LoadedModel, Target, borrowed_tokenizer, check_target, fingerprint, load_target
from sapo.generation.sampling import Sampling
from sapo.weights.description import load_template_tokenizer
from sapo.weights.loading import default_device


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `sapo evaluate`; `sapo evaluate --help` says what each means."""

    models: list[str]
    suite: str
    start: str | None
    output_dir: str
    limit: int | None
    seed: int
    device: str
    dtype: str
    batch_size: int
    chat_template_path: str | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    dataset_name: str | None
    dataset_split: str
    max_length: int
    prompts: str | None
    tasks: list[str] | None
    task_data: str | None
    apply_chat_template: str
    mt_bench_dir: str | None
    alpaca_eval_data: str | None
    judge_prompt: str | None
    judge_orders: str
    judge: JudgeOptions | None

    def sampling(self, usual: Sampling) -> Sampling:
        """`usual` with what the options set."""
        return Sampling(
            usual.temperature if self.temperature is None else self.temperature,
            usual.top_k if self.top_k is None else self.top_k,
            usual.top_p if self.top_p is None else self.top_p,
        )


class Session:
    """One run of `sapo evaluate`.

    Args:
        options: options of the command.
        targets: the models, the start model first.
        say: prints a line for the user.
        begin: called when a model is ready.

    Attributes:
        folder: of the results.
        fingerprints: identity of each model's weights and tokenizer, by the model's name.
        template: chat template that replaces the models' own; None for theirs.

    Raises:
        ConfigurationError: the folder is a file.
        ModelError: one of the models is not there, or not complete.
    """

    def __init__(
        self, options: EvaluateOptions, targets: list[Target], say: Callable[[str], None], begin: Callable[[], None]
    ) -> None:
        self.options = options
        self.targets = targets
        self.say = say
        self._begin = begin
        self.folder = Path(options.output_dir)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigurationError(f"output_dir={self.folder} is a file. Use a folder.")
        for target in targets:
            check_target(target)
        self.fingerprints = {target.name: fingerprint(target) for target in targets}
        path = options.chat_template_path
        self.template = None if path is None else read_chat_template(path, load_template_tokenizer)
        borrowed = {} if path else {target.name: borrowed_tokenizer(target) for target in targets}
        self._digests = {name: template_digest(one) for name, one in borrowed.items() if one is not None}
        self._loaded: tuple[str, LoadedModel] | None = None

    @property
    def device(self) -> str:
        """Device of the models."""
        if self.options.device != "auto":
            return self.options.device
        return default_device().type

    def parts(self, *names: str) -> FinishedParts:
        """The finished parts in a file of the output folder."""
        return FinishedParts(self.folder.joinpath(*names))

    def load(self, target: Target) -> LoadedModel:
        """A model, loaded at its first use; the previous one is freed."""
        if self._loaded is None or self._loaded[0] != target.name:
            self.release()
            self.say(f"Loading {target.path}")
            loaded = load_target(
                target,
                device=self.device,
                dtype=self.options.dtype,
                chat_template_path=self.options.chat_template_path,
            )
            self._loaded = (target.name, loaded)
            self._begin()
        return self._loaded[1]

    def release(self) -> None:
        """Free the model in memory."""
        self._loaded = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()

    def identity(self, target: Target) -> dict[str, str]:
        """What every part made with this model depends on."""
        dtype, template = self.options.dtype, self._digests.get(target.name, "")
        if self.template is not None:
            template = self.template.text
        return {"model": self.fingerprints[target.name], "dtype": dtype, "chat_template": template}

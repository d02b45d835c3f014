"""The tree of exceptions.

Every error that a user can cause is a `SapoError` whose message is one line: what clashed, where, and the way out.
The command line prints that line and exits with status 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from typing import Any

from sapo.text.escape import visible

EXTRAS = {
    "bitsandbytes": "quantization",
    "deepspeed": "deepspeed",
    "gguf": "gguf",
    "immutabledict": "evaluation",
    "langdetect": "evaluation",
    "lm_eval": "evaluation",
    "nltk": "evaluation",
    "openai": "judge",
    "trackio": "tracking",
    "vllm": "vllm",
}
"""Packages that this one imports only when they are asked for, with the extra that installs each."""


def yaml_fault(error: Any) -> str:
    """What follows a file's name where its YAML is wrong, on one line: PyYAML's own text quotes the line below a caret.

    Args:
        error: a `yaml.MarkedYAMLError`.
    """
    line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
    return f"{line}: not valid YAML ({brief(error.problem)})"


def brief(text: object, limit: int = 300) -> str:
    """Text of an error or a file on one line of at most `limit` printable characters, to quote in a message."""
    text = " ".join(str(text).split())
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return visible(text)


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """What an error adds to a mistyped name: the most similar of the `known` ones, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; nearest: {close[0]}" if close else ""


class SapoError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigurationError(SapoError, ValueError):
    """Options that are invalid, unknown, or incompatible with each other or with this machine."""


class DatasetError(SapoError, ValueError):
    """A dataset that is missing, malformed, or without usable rows."""


class TokenizerError(SapoError, ValueError):
    """A tokenizer that lacks what the data requires: a chat template, an EOS token, a stable prefix."""


class ModelError(SapoError, ValueError):
    """A model folder that is missing, incomplete, or incompatible with the tokenizer or the machine."""


class CheckpointError(SapoError, RuntimeError):
    """A checkpoint that is incomplete, damaged, or of another configuration."""


class TrainingError(SapoError, RuntimeError):
    """A run that cannot continue: non-finite numbers, or another process that failed."""


class GenerationError(SapoError, RuntimeError):
    """A generation engine that is unavailable, serves other weights, or returns an invalid response."""


class EvaluationError(SapoError, RuntimeError):
    """An evaluation that cannot continue: a missing package or file, or a judge that fails."""


class RepeatedError(SapoError):
    """What ends this process of a run and the first process reports: the command line prints nothing more."""


ANOTHER_PORT = "Choose another: --main_process_port with --accelerate_config, --master_port with torchrun."
_GLOO = "gloo/transport"
"""In its messages, of which torch makes a bare RuntimeError."""
_LOST = ("DistBackendError", "DistNetworkError", "DistStoreError")


def process_lost(error: BaseException) -> SapoError | None:
    """What to say of an error of torch.distributed: another process has ended, or does not answer, or the port at which
    they meet is in use; None of other errors.

    Args:
        error: any; torch's own are known by their names, since torch is not imported for this.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or isinstance(error, SapoError):
        return None
    if type(error).__name__ not in _LOST and _GLOO not in text:
        return None
    if "EADDRINUSE" in text or "already in use" in text:
        return ConfigurationError(
            f"the port at which the processes meet is in use ({brief(error, 160)}). {ANOTHER_PORT}"
        )
    if "imed out" in text or "imeout" in text:
        return TrainingError(
            f"another process of this run did not answer in time ({brief(error, 160)}). Raise --ddp_timeout if it was "
            "at work; else its own message, if it left one, tells why."
        )
    return TrainingError(
        "another process of this run has ended; its own message, if it left one, tells why. Continue from the newest "
        "checkpoint with --resume_from_checkpoint auto."
    )


def is_installed(package: str) -> bool:
    """Whether a package can be found; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        # Its entry in `sys.modules` is None: somebody forbids it.
        return False


def pip_line(package: str) -> str:
    """The command that installs a package: with its extra of this one, so that the version fits; else by its name."""
    return f'pip install "sapo-llm[{EXTRAS[package]}]"' if package in EXTRAS else f"pip install {package}"


def require(what: str, *packages: str, error: type[SapoError] = ConfigurationError) -> None:
    """Check that packages are installed before what needs them begins.

    Args:
        what: needs them, such as "optim=adamw_8bit".
        packages: their names, as imported.
        error: type of the error.

    Raises:
        SapoError: one is missing; the message has the command that installs it.
    """
    missing = [package for package in packages if not is_installed(package)]
    if missing:
        lines = list(dict.fromkeys(map(pip_line, missing)))
        raise error(f"{what}: {', '.join(missing)} not installed. Run: {' && '.join(lines)}")

"""The tree of exceptions.

Every error that a user can cause is a `SapoError` whose message is one line: what clashed, where, and the way out.
The command line prints that line and exits with status 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from sapo.text.escape import visible


def brief(text: object, limit: int = 300) -> str:
    """Text of an error or a file on one line of at most `limit` printable characters, to quote in a message."""
    text = " ".join(str(text).split())
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return visible(text)


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

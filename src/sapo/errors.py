"""The tree of exceptions.

Every error that a user can cause is a `SapoError` whose message is one line: what clashed, where, and the way out.
The command line prints that line and exits with status 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from sapo.text import visible


def brief(said: object, most: int = 300) -> str:
    """What an error or a file says, to be quoted in a message: one line of at most `most` printable characters."""
    text = " ".join(str(said).split())
    text = text if len(text) <= most else text[: most - 3] + "..."
    return visible(text)


class SapoError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigurationError(SapoError, ValueError):
    """Options that are wrong, unknown, or clash with one another or with this machine."""


class DatasetError(SapoError, ValueError):
    """A dataset that is missing, malformed, or of which nothing can be used."""


class TokenizerError(SapoError, ValueError):
    """A tokenizer that lacks what the data needs: a chat template, an end token, a stable prefix."""


class ModelError(SapoError, ValueError):
    """A model folder that is missing, incomplete, or does not fit the tokenizer or the machine."""


class CheckpointError(SapoError, RuntimeError):
    """A checkpoint that lacks a part, is damaged, or belongs to another configuration."""


class TrainingError(SapoError, RuntimeError):
    """A run that cannot go on: numbers that are not finite, or another process that failed."""


class GenerationError(SapoError, RuntimeError):
    """An engine that writes for the opponent and does not answer, serves other weights, or answers what cannot be."""


class EvaluationError(SapoError, RuntimeError):
    """An evaluation that cannot go on: a missing package or file, a judge that does not answer, answers of no use."""

"""A generator that returns scripted replies: the fake for tests of everything above generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from sapo.errors import ConfigurationError
from sapo.generation.protocol import check_request

Reply: TypeAlias = Sequence[Sequence[int]]
ReplyFunction: TypeAlias = Callable[[list[list[int]], list[int], list[int]], Reply]


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """The arguments of one call of `generate`, described at `Generator.generate`."""

    contexts: list[list[int]]
    max_new_tokens: list[int]
    seeds: list[int]


class ScriptedGenerator:
    """A `Generator` without a model: returns replies from a script and records its calls.

    Args:
        script: the replies of successive calls (each a list of token lists, one per row), or a function of (contexts,
            max_new_tokens, seeds) that returns such a reply.

    Attributes:
        calls: one `GenerateCall` per call.
    """

    def __init__(self, script: Sequence[Reply] | ReplyFunction) -> None:
        self._script = script
        self.calls: list[GenerateCall] = []

    def generate(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Return the script's next reply; see `Generator.generate`.

        Raises:
            ConfigurationError: the request violates the contract, the script has no more replies, or a reply does not
                match the request (missing rows, budget exceeded).
        """
        check_request(contexts, max_new_tokens, seeds)
        call = GenerateCall([list(context) for context in contexts], list(max_new_tokens), list(seeds))
        number = len(self.calls)
        self.calls.append(call)
        if callable(self._script):
            reply = self._script(call.contexts, call.max_new_tokens, call.seeds)
        elif number < len(self._script):
            reply = self._script[number]
        else:
            raise ConfigurationError(
                f"call {number}: the script has only {len(self._script)} replies; add one, or pass a function"
            )
        if len(reply) != len(contexts):
            raise ConfigurationError(
                f"call {number}: the script has {len(reply)} rows for {len(contexts)} contexts; add one per context"
            )
        for row, (tokens, budget) in enumerate(zip(reply, max_new_tokens, strict=True)):
            if len(tokens) > budget:
                raise ConfigurationError(
                    f"call {number}, row {row}: the reply has {len(tokens)} tokens, the budget is {budget}; "
                    "shorten the reply"
                )
        return [list(tokens) for tokens in reply]

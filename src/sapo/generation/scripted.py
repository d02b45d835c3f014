"""A generator that says what it is told: the fake for tests of everything above generation."""

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
    """The arguments of one call of `generate`."""

    contexts: list[list[int]]
    max_new_tokens: list[int]
    seeds: list[int]


class ScriptedGenerator:
    """A `Generator` without a model: it answers from a script and keeps what it was asked.

    Args:
        script: either the replies of successive calls (each one a list of token lists, one a row), or a
            function of (contexts, max_new_tokens, seeds) that returns such a reply.

    Attributes:
        calls: what it was asked, one `GenerateCall` a call.
    """

    def __init__(self, script: Sequence[Reply] | ReplyFunction) -> None:
        self._script = script
        self.calls: list[GenerateCall] = []

    def generate(
        self, contexts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Answer with the script's next reply; see `Generator.generate`.

        Raises:
            ConfigurationError: a request that breaks the contract, a script that has run out, or a reply that
                does not fit the request (rows missing, budget exceeded): a fake must not lie about the
                contract.
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
                f"call {number}: the script gives {len(reply)} rows for {len(contexts)} contexts; give one a context"
            )
        for row, (tokens, budget) in enumerate(zip(reply, max_new_tokens, strict=True)):
            if len(tokens) > budget:
                raise ConfigurationError(
                    f"call {number}, row {row}: the reply has {len(tokens)} tokens, the budget is {budget}; "
                    "shorten the reply"
                )
        return [list(tokens) for tokens in reply]

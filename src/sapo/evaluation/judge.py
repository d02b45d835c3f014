"""Verdicts from any OpenAI-compatible endpoint: each one paid for once, kept as it arrives, within a budget."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sapo.errors import ConfigurationError, EvaluationError, brief, require
from sapo.evaluation.store import FinishedParts
from sapo.runs.files import facts_digest

if TYPE_CHECKING:
    import openai

_CHARACTERS_PER_TOKEN = 4
"""For the estimate before the first call; the judge's own tokenizer is not known."""
_LONGEST_WAIT = 60.0
"""Seconds between two attempts, at most, unless the server asks for more."""
_SECONDS_A_LINE = 30.0
"""Between two lines on how many verdicts there are."""


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """Which judge is asked, and how hard.

    Attributes:
        model: name of the judge at the endpoint.
        base_url: of the endpoint, such as http://127.0.0.1:8000/v1; None for OpenAI's own.
        key_env: environment variable that holds the key; it is read from nowhere else.
        max_calls: requests sent in this command, repeated ones included; None for no limit.
        workers: requests under way at once.
        timeout: seconds for an answer.
        retries: attempts after the first, for a request that may succeed when it is sent again.
        calls_per_minute: requests started per minute at most; None for no limit.
        input_price: USD per 1M tokens of prompt, for the estimate.
        output_price: USD per 1M tokens of answer.
        first_wait: seconds before the first repetition; doubles with each.

    Raises:
        ConfigurationError: a value out of range.
    """

    model: str
    base_url: str | None = None
    key_env: str = "OPENAI_API_KEY"
    max_calls: int | None = None
    workers: int = 8
    timeout: float = 120.0
    retries: int = 6
    calls_per_minute: float | None = None
    input_price: float | None = None
    output_price: float | None = None
    first_wait: float = 1.0

    def __post_init__(self) -> None:
        for name in ("workers", "timeout", "calls_per_minute"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"judge_{name}={value}: must be above 0.")
        if self.base_url and not self.base_url.startswith(("http://", "https://")):
            raise ConfigurationError(f"judge_base_url={self.base_url}: must begin with http:// or https://.")


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One question to the judge.

    Attributes:
        messages: of the conversation.
        max_tokens: of its answer.
        temperature: of its sampling.
        top_logprobs: log-probabilities wanted for each token of the answer; 0 for none.
        label: what errors call it; no part of its identity.
    """

    messages: tuple[tuple[str, str], ...]
    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int = 0
    label: str = ""

    def key(self, options: JudgeOptions) -> str:
        """What tells this question to this judge from any other."""
        return facts_digest(
            judge=options.model,
            base_url=options.base_url or "",
            messages=[list(message) for message in self.messages],
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_logprobs=self.top_logprobs,
        )


@dataclass
class JudgeTally:
    """What a command asked of the judge.

    Attributes:
        sent: requests sent.
        repeated: of these, those sent again after a failure.
        answered: verdicts received.
        reused: verdicts that were there already.
        left: questions that the budget did not allow.
        refused: labels of questions that the judge refuses for good, with the reason.
    """

    sent: int = 0
    repeated: int = 0
    answered: int = 0
    reused: int = 0
    left: int = 0
    refused: dict[str, str] = field(default_factory=dict)


class _BudgetSpent(Exception):  # noqa: N818 - never leaves this module
    """No further request may be sent."""


class _Stopped(Exception):  # noqa: N818 - never leaves this module
    """Given up since another question failed; the failure is that one's."""


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """The judge will never answer this question."""


class Judge:
    """Asks the judge, keeping each answer as it arrives.

    Args:
        options: which judge.
        parts: where answers are kept; questions answered there are not asked again.
        say: takes lines for the user.

    Raises:
        ConfigurationError: no key for OpenAI's own endpoint.
        EvaluationError: the package openai is missing.
    """

    def __init__(self, options: JudgeOptions, parts: FinishedParts, say: Callable[[str], None]) -> None:
        self.options = options
        self.parts = parts
        self.tally = JudgeTally()
        """What was asked so far."""
        self._say = say
        self._key = os.environ.get(options.key_env, "")
        if not self._key and options.base_url is None:
            raise ConfigurationError(
                f"no key for the judge: set the environment variable {options.key_env}, or name an endpoint that needs "
                "none with --judge_base_url."
            )
        require(f"judge_model={options.model}", "openai", error=EvaluationError)
        self._client: openai.OpenAI
        self._lock = threading.Lock()
        self._not_before = 0.0
        self._next_start = 0.0
        self._said: set[str] = set()
        self._stop = threading.Event()

    def _connect(self) -> openai.OpenAI:
        import openai

        # Servers of one's own ask for no key, but the client does.
        return openai.OpenAI(
            api_key=self._key or "none", base_url=self.options.base_url, max_retries=0, timeout=self.options.timeout
        )

    def begin(self) -> None:
        """Count from zero for another model; what the budget has paid for stays."""
        self.tally = JudgeTally(sent=self.tally.sent, answered=self.tally.answered)

    def estimate(self, requests: Sequence[JudgeRequest]) -> list[str]:
        """What asking `requests` will cost at most, for the user to read before the first call."""
        new = {request.key(self.options): request for request in requests}
        there = len(new)
        new = {key: request for key, request in new.items() if key not in self.parts}
        characters = sum(len(text) for request in new.values() for _, text in request.messages)
        tokens_in = characters // _CHARACTERS_PER_TOKEN
        tokens_out = sum(request.max_tokens for request in new.values())
        line = (
            f"Judge {self.options.model}: {len(new)} calls ({there - len(new)} of {there} verdicts are there already), "
            f"about {tokens_in:,} tokens in, at most {tokens_out:,} out"
        )
        if self.options.input_price is not None and self.options.output_price is not None:
            cost = (tokens_in * self.options.input_price + tokens_out * self.options.output_price) / 1e6
            line += f": at most about ${cost:.2f}"
        lines = [line + "."]
        if self.options.max_calls is not None and len(new) > self.options.max_calls - self.tally.sent:
            lines.append(
                f"max_judge_calls={self.options.max_calls} does not reach: the results will be incomplete, and the "
                "same command with a larger one completes them."
            )
        return lines

    def ask(self, requests: Sequence[JudgeRequest]) -> dict[str, dict[str, Any]]:
        """Answers by key of request; those that the budget or the judge itself did not allow are missing.

        The first question is asked alone, so that a wrong key, name or address costs one call.

        Raises:
            EvaluationError: the judge cannot be reached, refuses the key or the first question, or fails in spite of
                all retries. What was answered until then is kept.
        """
        wanted = {request.key(self.options): request for request in requests}
        found = {key: record for key in wanted if (record := self.parts.get(key)) is not None}
        self.tally.reused += len(found)
        pending = [(key, request) for key, request in wanted.items() if key not in found]
        self._stop.clear()
        if pending:
            with self._connect() as self._client, suppress(_BudgetSpent):
                if self.tally.answered == 0:
                    key, request = pending.pop(0)
                    try:
                        found[key] = self._answer(key, request)
                    except _Refused as error:
                        raise EvaluationError(f"{self._where()} refuses the first question: {error}") from error
                self._ask_many(pending, found)
        self.tally.left += sum(key not in found for key in wanted) - len(
            {request.label for key, request in wanted.items() if key not in found} & self.tally.refused.keys()
        )
        return found

    def _ask_many(self, pending: list[tuple[str, JudgeRequest]], found: dict[str, dict[str, Any]]) -> None:
        failure: BaseException | None = None
        queue, total, said_at = iter(pending), len(found) + len(pending), time.monotonic()
        with ThreadPoolExecutor(self.options.workers) as pool:
            under_way: dict[Future[dict[str, Any]], tuple[str, JudgeRequest]] = {}
            try:
                while True:
                    # Handed out one by one: what is under way when a failure comes is all there is to wait for.
                    while failure is None and len(under_way) < self.options.workers:
                        following = next(queue, None)
                        if following is None:
                            break
                        under_way[pool.submit(self._answer, *following)] = following
                    if not under_way:
                        break
                    for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                        key, request = under_way.pop(done)
                        error = done.exception()
                        if error is None:
                            found[key] = done.result()
                            if time.monotonic() - said_at > _SECONDS_A_LINE:
                                said_at = time.monotonic()
                                self._say(f"{len(found)} of {total} verdicts")
                        elif isinstance(error, _Refused):
                            self.tally.refused[request.label] = str(error)
                        elif not isinstance(error, _Stopped) and (failure is None or isinstance(failure, _BudgetSpent)):
                            failure = error
                            self._stop.set()
            except KeyboardInterrupt:
                self._stop.set()
                raise
        if failure is not None:
            raise failure

    def _answer(self, key: str, request: JudgeRequest) -> dict[str, Any]:
        """Ask one question until it is answered, and keep the answer."""
        import openai

        reason = ""
        for attempt in range(self.options.retries + 1):
            if attempt and self._stop.is_set():
                raise _Stopped
            self._wait_for_turn()
            self._count(repeated=attempt > 0)
            try:
                record = _record(self._send(request), request)
            except openai.APIStatusError as error:
                reason = self._scrubbed(f"HTTP {error.status_code}: {_message(error)}")
                if error.status_code in (401, 403):
                    raise EvaluationError(
                        f"{self._where()} refuses the key in {self.options.key_env} ({reason}). {self._kept()}"
                    ) from None
                if error.status_code == 404:
                    raise EvaluationError(
                        f"{self._where()} has no such model or address ({reason}). Check --judge_model and "
                        f"--judge_base_url. {self._kept()}"
                    ) from None
                if error.status_code < 500 and error.status_code not in (408, 409, 425, 429):
                    raise _Refused(reason) from None
                asked = error.response.headers.get("retry-after")
                self._back_off(attempt, key, reason, asked, shared=error.status_code == 429)
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                reason = self._scrubbed(f"{type(cause).__name__}: {cause}")
                if isinstance(error, openai.APITimeoutError):
                    reason = (
                        f"no answer in {self.options.timeout:g} s; a slow server needs a larger --judge_timeout, or "
                        f"fewer --judge_workers than {self.options.workers}"
                    )
                self._back_off(attempt, key, reason)
            except (ValueError, openai.APIError) as error:
                # A body that is no JSON, or JSON of another shape.
                reason = self._scrubbed(f"an answer that cannot be read: {error}")
                self._back_off(attempt, key, reason)
            else:
                kept = self.parts.add(key, record)
                with self._lock:
                    self.tally.answered += 1
                return kept
        raise EvaluationError(
            f"{self._where()} did not answer in {self.options.retries + 1} attempts (last: {reason}). {self._kept()}"
        )

    def _send(self, request: JudgeRequest) -> Any:
        logprobs: dict[str, Any] = (
            {"logprobs": True, "top_logprobs": request.top_logprobs} if request.top_logprobs else {}
        )
        return self._client.chat.completions.create(
            model=self.options.model,
            messages=[{"role": role, "content": text} for role, text in request.messages],  # type: ignore[misc]
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            **logprobs,
        )

    def _count(self, *, repeated: bool) -> None:
        with self._lock:
            if self.options.max_calls is not None and self.tally.sent >= self.options.max_calls:
                raise _BudgetSpent
            self.tally.sent += 1
            self.tally.repeated += repeated

    def _wait_for_turn(self) -> None:
        """Wait until the server wants to hear from us again, and until the rate allows another request."""
        while True:
            with self._lock:
                now = time.monotonic()
                start = max(self._not_before, self._next_start)
                if start <= now:
                    if self.options.calls_per_minute:
                        self._next_start = now + 60.0 / self.options.calls_per_minute
                    return
            if self._stop.wait(min(start - now, 1.0)):
                return

    def _back_off(self, attempt: int, key: str, reason: str, asked: str | None = None, *, shared: bool = False) -> None:
        if attempt >= self.options.retries:
            return
        with self._lock:
            new = reason not in self._said
            self._said.add(reason)
        if new:
            self._say(f"Asking again: {reason}.")
        pause = min(_LONGEST_WAIT, self.options.first_wait * 2**attempt)
        # Spread, so that requests turned away together do not come back together.
        pause *= random.Random(f"{key}/{attempt}").uniform(0.5, 1.0)
        pause = max(pause, _seconds(asked))
        if shared:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + pause)
        else:
            self._stop.wait(pause)

    def _where(self) -> str:
        return f"the judge {self.options.model} at {self.options.base_url or 'the default endpoint'}"

    def _kept(self) -> str:
        return f"{len(self.parts)} verdicts are kept in {self.parts.file}; the same command continues from them."

    def _scrubbed(self, text: str) -> str:
        """Servers quote the key they refuse, send whole pages and control characters: none belongs on a terminal."""
        line = " ".join(text.split())
        if self._key:
            line = line.replace(self._key, "***")
            for length in (8, 4):
                # Some quote only its ends.
                line = line.replace(self._key[:length], "***") if len(self._key) > 12 else line
                line = line.replace(self._key[-length:], "***") if len(self._key) > 12 else line
        return brief(line, 200)


def _seconds(asked: str | None) -> float:
    """A Retry-After header in seconds; 0 where it is missing or a date."""
    try:
        return max(0.0, min(float(asked or 0), 600.0))
    except ValueError:
        return 0.0


def _message(error: openai.APIStatusError) -> str:
    body: object = error.body
    if isinstance(body, Mapping) and body.get("message"):
        return str(body["message"])
    return error.message


def _record(completion: Any, request: JudgeRequest) -> dict[str, Any]:
    """What is kept of an answer; a `ValueError` if it is not a chat completion."""
    from openai.types.chat import ChatCompletion

    if not isinstance(completion, ChatCompletion) or not completion.choices:
        raise ValueError(f"not a chat completion but {type(completion).__name__}")
    choice = completion.choices[0]
    message: Any = choice.message
    if message is None or (message.content is None and not request.top_logprobs):
        raise ValueError("a chat completion without content")
    record: dict[str, Any] = {
        "text": message.content or "",
        "finish_reason": choice.finish_reason,
        "judge": completion.model,
        "tstamp": time.time(),
    }
    if completion.usage is not None:
        record["usage"] = {
            "prompt_tokens": completion.usage.prompt_tokens,
            "completion_tokens": completion.usage.completion_tokens,
        }
    if request.top_logprobs:
        content = choice.logprobs.content if choice.logprobs is not None else None
        record["top_logprobs"] = [[top.token, top.logprob] for top in content[0].top_logprobs] if content else None
    json.dumps(record)
    return record

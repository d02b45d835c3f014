"""A Modelfile for Ollama: its template is derived from what the chat template renders, and proved against it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

_SYSTEM, _USER, _ANSWER, _AGAIN, _LAST = "Sapsystem", "Sapquestion", "Sapanswer", "Sapagain", "Saplast"
_CONVERSATIONS = (
    ((("user", _USER),), True),
    ((("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN)), True),
    ((("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN), ("assistant", _LAST)), False),
    ((("system", _SYSTEM), ("user", _USER)), True),
    ((("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN)), True),
)
"""Conversations that the derived template must render like the chat template, and whether a reply is asked for."""


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template writes around each message.

    Attributes:
        system: before and after a system message.
        user: before and after the user's.
        assistant: before and after a reply.
        default_system: system message that is added where none is given; or an empty string.
        bos: BOS token at the start, which llama.cpp adds by itself; or an empty string.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    default_system: str
    bos: str

    def render(self, messages: Sequence[tuple[str, str]], *, reply: bool) -> str:
        """The text of a conversation, as Ollama will make it."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        if self.default_system and messages[0][0] != "system":
            messages = [("system", self.default_system), *messages]
        text = "".join(f"{around[role][0]}{content}{around[role][1]}" for role, content in messages)
        return self.bos + text + (self.assistant[0] if reply else "")

    def template(self) -> str:
        """The same in Ollama's template language."""
        (so, sc), (uo, uc), (ao, ac) = self.system, self.user, self.assistant
        return (
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{so}{{{{ .Content }}}}{sc}'
            f'{{{{ else if eq .Role "user" }}}}{uo}{{{{ .Content }}}}{uc}'
            f'{{{{ else if eq .Role "assistant" }}}}{ao}{{{{ .Content }}}}{ac}{{{{ end }}}}{{{{ end }}}}{ao}'
        )


def find_turns(tokenizer: Any) -> Turns | None:
    """Read from a few renderings what a chat template writes around messages; None if it is not that simple."""
    if tokenizer.chat_template is None:
        return None
    try:
        turns = _derived(tokenizer)
        proved = turns is not None and all(
            turns.render(messages, reply=reply) == _rendered(tokenizer, messages, reply=reply)
            for messages, reply in _CONVERSATIONS
        )
    except (jinja2.TemplateError, ValueError):
        # A template that refuses a role, or leaves out a message.
        return None
    return turns if proved else None


def _derived(tokenizer: Any) -> Turns | None:
    asked = (("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN))
    before, rest = _rendered(tokenizer, asked, reply=True).split(_USER)
    to_answer, rest = rest.split(_ANSWER)
    to_user, tail = rest.split(_AGAIN)
    _, user_close = _rendered(tokenizer, asked, reply=False).split(_AGAIN)
    _, answer_close = _rendered(tokenizer, (*asked, ("assistant", _LAST)), reply=False).split(_LAST)
    lead, after_system = _rendered(tokenizer, (("system", _SYSTEM), ("user", _USER)), reply=True).split(_SYSTEM)
    between, _ = after_system.split(_USER)
    if not (to_answer.startswith(user_close) and to_user.startswith(answer_close) and tail == to_answer):
        return None
    user_open, answer_open = to_user.removeprefix(answer_close), to_answer.removeprefix(user_close)
    if not user_open or not between.endswith(user_open) or not before.endswith(user_open):
        return None
    system_close, first = between.removesuffix(user_open), before.removesuffix(user_open)
    bos = tokenizer.bos_token or ""
    bos = bos if bos and lead.startswith(bos) and not user_open.startswith(bos) else ""
    system_open = lead.removeprefix(bos)
    first = first.removeprefix(bos)
    default = first.removeprefix(system_open).removesuffix(system_close) if first else ""
    return Turns((system_open, system_close), (user_open, user_close), (answer_open, answer_close), default, bos)


def _rendered(tokenizer: Any, messages: Sequence[tuple[str, str]], *, reply: bool) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], add_generation_prompt=reply, tokenize=False
    )
    return text


def modelfile(weights: str, tokenizer: Any, generation: Any, eos_ids: frozenset[int]) -> tuple[str, bool]:
    """The text of a Modelfile, and whether the chat template could be converted.

    Args:
        weights: what FROM names: a GGUF file, or "." for the folder.
        tokenizer: of the model.
        generation: its generation configuration.
        eos_ids: tokens that end a reply.
    """
    lines = [f"FROM {weights}"]
    turns = find_turns(tokenizer)
    markers = "" if turns is None else "".join((*turns.system, *turns.user, *turns.assistant))
    if turns is None or "{{" in markers or '"""' in markers + turns.default_system:
        turns = None
        lines += [
            "# This model's chat template has no simple form in Ollama's language, so the prompt is sent as it is.",
            "# Render it with the tokenizer's template, and call Ollama's API with raw: true.",
            'TEMPLATE """{{ .Prompt }}"""',
        ]
    else:
        lines.append(f'TEMPLATE """{turns.template()}"""')
        if turns.default_system:
            lines.append(f'SYSTEM """{turns.default_system}"""')
    lines += [f"PARAMETER stop {json.dumps(tokenizer.decode([end]), ensure_ascii=False)}" for end in sorted(eos_ids)]
    if generation.do_sample:
        named = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
        named |= {"repetition_penalty": "repeat_penalty"}
        for name, parameter in named.items():
            value = getattr(generation, name)
            if value is not None:
                lines.append(f"PARAMETER {parameter} {value}")
    return "\n".join(lines) + "\n", turns is not None

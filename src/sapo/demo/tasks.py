"""Three instruction tasks with verifiable answers, and their tokenizer.

    sort 5307291    -> 0123579                     5 to 9 digits in ascending order
    count abcabba   -> a3,b3,c1                    how often each letter occurs
    add 58+67       -> 8+7+0=15;5+6+1=12>125       the sum, each column with its carry written out

Rows are conversations in a format of `sapo.data`, plus the name of the task.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Final, TypedDict

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sapo.seeds import derive_seed

ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789 +-=:;,>?|"
PAD, EOS, USER, ASSISTANT, UNKNOWN = "<pad>", "<eos>", "<user>", "<assistant>", "<unk>"
MAX_PROMPT_TOKENS: Final = 20
MAX_REPLY_TOKENS: Final = 44
"""Fits the longest prompt (`count` 9 letters: 17 tokens) and reply (4-digit `add`: 42), with roles and EOS token."""

# Each reply ends with the EOS token, and directly follows the assistant token: the generation prompt is therefore an
# exact prefix of the full conversation. The generation marks let other
# tools (trl's assistant_only_loss) find the reply.
CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}<user>{{ message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}<assistant>"
    "{%- generation -%}{{ message['content'] }}<eos>{%- endgeneration -%}"
    "{%- else -%}{{ raise_exception('the demo model knows the roles user and assistant only') }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)

_HELDOUT_ONE_IN: Final = 5
_DIGITS: Final = "0123456789"
_COUNTED: Final = "abc"

RIGHT_SHARE: Final = 0.35
OFF_MODE_SHARE: Final = 0.45
"""Fractions that `corrupt` keeps correct and answers in off-mode; the rest have one wrong digit."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Row(TypedDict):
    """One question with its correct answer and its task."""

    messages: list[Message]
    task: str


def prompt_of(row: Row) -> str:
    """The question of `row`."""
    return row["messages"][0]["content"]


def answer_of(row: Row) -> str:
    """The reply of `row`: correct, unless `corrupt` changed it."""
    return row["messages"][-1]["content"]


def correct(row: Row, text: str) -> bool:
    """Whether `text` exactly matches the correct reply to `row`."""
    return text == solve(prompt_of(row))


def solve(prompt: str) -> str:
    """The correct reply to `prompt`."""
    task, _, question = prompt.partition(" ")
    return _SOLUTIONS[task](question)


def make_rows(count: int, seed: int, exclude: Collection[str] = (), *, heldout: bool = False) -> list[Row]:
    """`count` rows with distinct prompts but those of `exclude`, cycling through the tasks; longer lists begin alike.

    A hash of the prompt decides whether it is held out (one in five), so training and evaluation rows never share one,
    for any seeds and counts.
    """
    rng = random.Random(seed)
    seen = set(exclude)
    names = list(_QUESTIONS)
    rows: list[Row] = []
    while len(rows) < count:
        task = names[len(rows) % len(names)]
        prompt = f"{task} {_QUESTIONS[task](rng)}"
        if prompt in seen or is_heldout(prompt) != heldout:
            continue
        seen.add(prompt)
        rows.append(_row(task, prompt, solve(prompt)))
    return rows


def heldout_rows(count: int) -> list[Row]:
    """`count` rows whose prompts no training row has; always the same rows."""
    return make_rows(count, seed=4, heldout=True)


def is_heldout(prompt: str) -> bool:
    """Whether `prompt` is held out for evaluation."""
    return derive_seed("demo", "heldout", prompt) % _HELDOUT_ONE_IN == 0


def corrupt(row: Row, rng: random.Random) -> Row:
    """`row` with a reply of mixed quality: 35% correct, 45% off-mode, 20% with one wrong digit.

    The off-mode is a consistent error (descending order, number before letter, ignored carries): a habit that training
    on a few clean rows reduces but does not remove, and that preference optimization should fix.
    """
    answer = answer_of(row)
    kind = rng.random()
    if kind < RIGHT_SHARE:
        return row
    if kind < RIGHT_SHARE + OFF_MODE_SHARE:
        return _row(row["task"], prompt_of(row), _OFF_MODES[row["task"]](prompt_of(row).partition(" ")[2]))
    index = rng.choice([position for position, character in enumerate(answer) if character.isdigit()])
    slip = (int(answer[index]) + rng.choice((1, 9))) % 10
    return _row(row["task"], prompt_of(row), f"{answer[:index]}{slip}{answer[index + 1 :]}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of `ALPHABET`, and one each for padding, EOS, roles and unknown."""
    tokens = [PAD, EOS, USER, ASSISTANT, UNKNOWN, *ALPHABET]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_PROMPT_TOKENS + MAX_REPLY_TOKENS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _row(task: str, prompt: str, answer: str) -> Row:
    messages: list[Message] = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "task": task}


def _draw_text(rng: random.Random, letters: str) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(5, 9)))


def _draw_sum(rng: random.Random) -> str:
    digits = rng.randint(2, 4)
    low, high = 10 ** (digits - 1), 10**digits - 1
    return f"{rng.randint(low, high)}+{rng.randint(low, high)}"


def _add(question: str, *, carrying: bool) -> str:
    """Column addition from the right, written out; without `carrying` every carry is taken as 0."""
    left, right = question.split("+")
    columns: list[str] = []
    result = ""
    carry = 0
    for upper, lower in zip(reversed(left), reversed(right), strict=True):
        column = int(upper) + int(lower) + carry
        columns.append(f"{upper}+{lower}+{carry}={column}")
        result = f"{column % 10}{result}"
        carry = column // 10 if carrying else 0
    # The leftmost column is always complete, even without carrying.
    return f"{';'.join(columns)}>{column}{result[1:]}"


def _count(question: str, pattern: str) -> str:
    return ",".join(pattern.format(letter=letter, times=question.count(letter)) for letter in _COUNTED)


_QUESTIONS: Final[dict[str, Callable[[random.Random], str]]] = {
    "sort": lambda rng: _draw_text(rng, _DIGITS),
    "count": lambda rng: _draw_text(rng, _COUNTED),
    "add": _draw_sum,
}
_SOLUTIONS: Final[dict[str, Callable[[str], str]]] = {
    "sort": lambda question: "".join(sorted(question)),
    "count": lambda question: _count(question, "{letter}{times}"),
    "add": lambda question: _add(question, carrying=True),
}
_OFF_MODES: Final[dict[str, Callable[[str], str]]] = {
    "sort": lambda question: "".join(sorted(question, reverse=True)),
    "count": lambda question: _count(question, "{times}{letter}"),
    "add": lambda question: _add(question, carrying=False),
}

TRAIN_ROWS: Final = make_rows(600, seed=3)
"""The clean rows of the brief SFT; self-play uses only these rows too."""

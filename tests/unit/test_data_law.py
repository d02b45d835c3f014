"""The law of all shapes: kept rows, counted drops and listed columns together hold the input's texts, each as often."""

import itertools
import json
import re
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, collate_examples
from sapo.data.prepare import prepare_dataset
from sapo.errors import DatasetError, TokenizerError
from tests.prepared import CHATML
from tests.tiny import byte_tokenizer

TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
CALLS = CHATML.replace(
    "m['content']",
    "m['content'] + (m['tool_calls'] | tojson if m['tool_calls'] is defined else '')",
)
TOKENIZERS = {
    "chat": byte_tokenizer(CHATML),
    "plain": byte_tokenizer(),
    "tools": byte_tokenizer(TOOLS + CHATML),
    "calls": byte_tokenizer(TOOLS + CALLS),
    "start": byte_tokenizer("{{ bos_token }}" + CHATML, bos=True),
}
WORD = re.compile(r"w\d+q")
FORMS = ("{}", "{} and four more words", "  {}\n", "one {} two", "## {}", "{}.", "[{}]", "Assistant: {}", "{}!")


def words(value):
    return Counter(WORD.findall(json.dumps(value)))


class Rows:
    """Draws rows in which every word is written once, but for what a shape repeats."""

    def __init__(self, draw):
        self.draw = draw
        self._numbers = itertools.count()

    def one_of(self, *choices):
        return self.draw(st.sampled_from(choices))

    def text(self, *, empty=True):
        if empty and self.draw(st.integers(0, 11)) == 0:
            return self.one_of("", " ", None)
        return self.one_of(*FORMS).format(f"w{next(self._numbers)}q")

    def message(self, kind, role):
        content = self.text()
        if kind == "sharegpt":
            made = {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content}
        elif kind == "parts" and content is not None:
            made = {"role": role, "content": [{"type": "text", "text": content}]}
        else:
            made = {"role": role, "content": content}
        if kind == "calls" and role == "assistant":
            arguments = {"k": self.text(empty=False)}
            call = {"name": "f", "arguments": self.one_of(arguments, json.dumps(arguments))}
            made["tool_calls"] = [{"type": "function", "function": call}]
        mark = self.one_of({}, {}, {}, {}, {"weight": 0}, {"train": True}, {"train": 0}, "thought", "nested")
        if mark == "thought":
            mark = {"thought": self.text(empty=False)}
        elif mark == "nested":
            mark = {"scores": {"note": [self.text(empty=False)], "value": 3}}
        return made | mark

    def talk(self, *, end="assistant", kind=None):
        kind = kind or self.one_of("plain", "sharegpt", "parts", "calls")
        roles = ["user", "assistant"] * self.one_of(1, 1, 2, 3)
        if self.one_of(False, True):
            roles.insert(0, "system")
        if end == "user":
            roles.pop()
        elif self.draw(st.integers(0, 7)) == 0:
            roles += self.one_of(["user"], ["tool"], ["user", "user"])
        return [self.message(kind, role) for role in roles]

    def stored(self, value):
        return json.dumps(value) if self.one_of(*[False] * 9, True) else value

    def sides(self):
        """Two conversations that differ in their last message, mostly; and what both of them say, once."""
        kind = self.one_of("plain", "sharegpt", "calls")
        prompt = self.talk(end="user", kind=kind)
        other = prompt if self.one_of(*[True] * 9, False) else self.talk(end="user", kind=kind)
        chosen, rejected = (self.message(kind, "assistant") for _ in range(2))
        said = [*prompt, chosen, rejected, *([] if other is prompt else other)]
        return prompt, [*prompt, chosen], [*other, rejected], said

    def row(self, shape):
        """A row, and the texts that it says: once what the shape repeats."""
        text = self.text
        match shape:
            case "messages" | "conversations" | "conversation" | "dialogue":
                row = {shape: self.stored(self.talk())}
            case "prompt_beside":
                talk = [{"role": "user", "content": text(empty=False)}, {"role": "assistant", "content": text()}]
                return {"prompt": talk[0]["content"], "messages": talk}, talk
            case "completion":
                row = {"prompt": text(), "completion": text()}
            case "mixed":
                row = {"prompt": self.one_of(text(), self.stored(self.talk(end="user"))), "completion": text()}
                row = {"prompt": row["prompt"], "completion": self.one_of(row["completion"], self.talk()[-1:])}
            case "repeated":
                prompt, chosen, _, _ = self.sides()
                return {"prompt": prompt, "completion": self.stored(chosen)}, chosen
            case "alpaca":
                row = {"instruction": text(), "input": text(), "output": text()}
            case "question":
                row = {"question": text(), "answer": text()}
            case "response":
                row = {"query": text(), "response": text()}
            case "chosen":
                prompt = self.one_of(text(), self.talk(end="user"))
                row = {"prompt": prompt, "chosen": text(), "rejected": text()}
            case "whole" | "spin":
                _, chosen, rejected, said = self.sides()
                names = ("chosen", "rejected") if shape == "whole" else ("real", "generated")
                return dict(zip(names, (self.stored(chosen), rejected), strict=True)), said
            case "whole_and_prompt":
                prompt, chosen, rejected, said = self.sides()
                return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, said
            case "openai":
                prompt, chosen, rejected, said = self.sides()
                sides = {"preferred_output": chosen[-1:], "non_preferred_output": rejected[-1:]}
                return {"input": {"messages": prompt}, **sides}, [*prompt, chosen[-1], rejected[-1]]
            case "texts":
                prompt = f"\n\nHuman: {text(empty=False)}\n\nAssistant:"
                replies = [f" {text()}" for _ in range(2)]
                row = {"chosen": prompt + replies[0], "rejected": prompt + replies[1]}
                return self.one_of(row, {"prompt": prompt, **row}), [prompt, *replies]
            case "orca":
                row = {"question": text(), "chosen": text(), "rejected": text()}
            case "sharegpt":
                row = {"conversations": self.talk(end="user", kind="sharegpt"), "chosen": text(), "rejected": text()}
            case "ratings":
                replies = [{"response": text(empty=False), "score": self.one_of(0, 1, 2)} for _ in range(3)]
                row = {"instruction": text(), "completions": replies[: self.one_of(1, 2, 3)]}
            case "text":
                start = self.one_of("Human: {}\nAssistant: {}", "<|im_start|>user\n{}<|im_start|>assistant\n{}", "{}{}")
                row = {"text": start.format(text(), text())}
            case _:
                raise AssertionError(shape)
        return row, row

    def extras(self):
        names = self.draw(st.lists(st.sampled_from(EXTRAS), max_size=2, unique=True))
        text = self.text
        made = {
            "history": lambda: self.one_of([], [[text(empty=False), text(empty=False)]]),
            "tools": lambda: [{"name": text(empty=False)}],
            "documents": lambda: [{"text": text(empty=False)}],
            "images": lambda: [text(empty=False)],
            "meta": lambda: {"inner": {"deep": [text()]}},
            "chat_template_kwargs": lambda: {"note": text(empty=False)},
            "id": lambda: 7,
            "weight": lambda: self.one_of(0, 1, 1, 0.5),
            "label": lambda: self.one_of(True, True, False),
        }
        return {name: made.get(name, text)() for name in names}


SHAPES = (
    "messages", "conversations", "conversation", "dialogue", "prompt_beside", "completion", "mixed", "repeated",
    "alpaca", "question", "response", "chosen", "whole", "spin", "whole_and_prompt", "openai", "texts", "orca",
    "sharegpt", "ratings", "text",
)  # fmt: skip
EXTRAS = (
    "system", "System", "sys_prompt", "context", "history", "tools", "documents", "images", "image_path", "note",
    "meta", "chat_template_kwargs", "id", "weight", "label", "passage", "response_b",
)  # fmt: skip


@st.composite
def data(draw):
    """Rows of one shape or of two, some of them twice; and the texts of each."""
    rows = Rows(draw)
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2))
    made = []
    for _ in range(draw(st.integers(1, 3))):
        row, said = rows.row(rows.one_of(*shapes))
        extras = {name: value for name, value in rows.extras().items() if name not in row}
        made.append((row | extras, words(said) + words(extras)))
    return made + made[: draw(st.integers(0, 1))]


def messages_of(row, leave_out=()):
    """The conversations of a row, but for those of columns that are left out."""
    found = []
    for name, value in row.items():
        if name in leave_out:
            continue
        value = json.loads(value) if isinstance(value, str) and value[:2] == "[{" else value
        value = value.get("messages", value) if isinstance(value, dict) else value
        found.append([item for item in value if isinstance(item, dict)] if isinstance(value, list) else [])
    return found


def listed(row, report):
    """Words of a row in the columns, and parts of columns, that the report lists as unused."""
    found = Counter()
    for name in report.columns.unused:
        column, _, part = name.partition(".")
        if name in row:
            found += words(row[name])
        elif name.startswith("completions ("):
            found += words(row.get("completions"))
        elif column == "messages":
            for message in itertools.chain(*messages_of(row)):
                found += words(message.get(part))
        elif part:
            found += words((row.get(column) or {}).get(part))
    return found


@settings(max_examples=250, deadline=None)
@given(data(), st.sampled_from(sorted(TOKENIZERS)), st.sampled_from(["last", "random", "all"]), st.booleans())
def test_the_texts_of_rows_are_kept_counted_or_listed_each_as_often_as_it_is_there(rows, name, turns, paired):
    tokenizer = TOKENIZERS[name]
    options = DataOptions(4096, 2048, assistant_turns=turns, paired=paired)
    given_rows = [json.loads(json.dumps(row)) for row, _ in rows]
    try:
        prepared, report = prepare_dataset(
            given_rows, tokenizer, options, eos_ids=eos_token_ids(tokenizer, None), source="x", count_faults=True
        )
    except (DatasetError, TokenizerError):
        return  # of all rows: nothing is trained on
    kept = {}
    for example in collate_examples(list(prepared))["examples"]:
        kept.setdefault(example.row, []).extend(example.turns)
    dropped = Counter(number - 1 for numbers in report.dropped_rows.values() for number in numbers)
    trailing = {
        number - 1
        for what, numbers in report.noted_rows.items()
        if what == "messages after the last reply are left out"
        for number in numbers
    }
    refused = {number - 1 for numbers in report.faults.rows.values() for number in numbers}
    assert report.rows == len(rows)
    for number, (row, said) in enumerate(rows):
        if number not in kept:
            assert dropped[number] or number in refused
            continue
        assert number not in refused
        texts = [[tokenizer.decode(ids) for ids in turn_texts(turn)] for turn in kept[number]]
        # A later reply's prompt holds the earlier replies.
        found = words(texts[-1])
        assert not found - said, "a text is trained on twice, or is of no row"
        assert all(not words(one) - found for one in texts[:-1])
        rest = said - found - listed(row, report)
        if rest:
            # Replies after the last that is trained on are counted one by one, with what was asked before them.
            after = [
                talk[last_of(talk, texts) + 1 :]
                for talk in messages_of(row, report.columns.unused)
                if last_of(talk, texts) is not None
            ]
            assert not rest - words(after), "a text is neither trained on nor counted nor listed"
            left_out = [message for message in itertools.chain(*after) if role(message) == "assistant"]
            assert dropped[number] >= len(left_out)
            assert left_out or number in trailing
    for column, count in report.columns.unused.items():
        assert 0 < count <= len(rows), column


def turn_texts(turn):
    return [[*turn.prompt_ids, *turn.response_ids], turn.rejected_ids or ()]


def role(message):
    return {"gpt": "assistant"}.get(message.get("role", message.get("from")), message.get("role"))


def last_of(talk, texts):
    """Index of the last message of a conversation whose text is trained on."""
    spoken = words(texts)
    return max((i for i, message in enumerate(talk) if words(contents(message)) & spoken), default=None)


def contents(message):
    return [message.get("content"), message.get("value"), message.get("tool_calls")]

"""Conversations, and rows prepared with a template of ChatML."""

from sapo.data.encoding import eos_token_ids
from sapo.data.examples import DataOptions, collate_examples
from sapo.data.prepare import prepare_dataset

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WIDE = DataOptions(max_length=4096, max_prompt_length=2048)


def talk(*texts, system=None):
    roles = ("user", "assistant")
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


def prepare(rows, tokenizer, options=WIDE, *, source="train.jsonl"):
    prepared, report = prepare_dataset(rows, tokenizer, options, eos_ids=eos_token_ids(tokenizer, None), source=source)
    return collate_examples(list(prepared))["examples"], report


def texts_of(turn, tokenizer):
    return tokenizer.decode(list(turn.prompt_ids)), tokenizer.decode(list(turn.response_ids))

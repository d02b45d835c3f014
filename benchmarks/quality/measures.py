"""What a model is measured by: likelihood of held-out responses, and what it writes itself."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.preference.batches import collate_responses
from sapo.preference.scoring import frozen, summed_logps
from sapo.seeds import derive_seed

Tokens = tuple[int, ...]
Right = Callable[[int, Sequence[int]], bool]


def measure(
    folder, examples: Sequence[tuple[Tokens, Tokens]], *, temperatures, room: int, right: Right | None = None, batch=100
) -> dict[str, float]:
    """Measure the model in `folder` on (prompt, response) pairs of token ids.

    Args:
        folder: of the model and its tokenizer.
        examples: held-out pairs.
        temperatures: of plain ancestral sampling, one reply a prompt from a seed of its own; 0 for greedy.
        room: tokens that a reply may have.
        right: whether a reply answers the example of this number; None where no answer is right or wrong.
        batch: rows at a time.

    Returns:
        `nll` in nats per response token, and for each temperature T: `end@T` share of replies that end within `room`;
        `length@T` mean reply over mean response; `repeat@T` share of 4-grams of a reply that it has had before;
        `distinct4@T` different 4-grams of all replies per 4-gram, over the same of the responses;
        `distance2@T` and `distance4@T` total variation between the n-grams of replies and of responses; `right@T`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    end = tokenizer.eos_token_id
    found = {"nll": _nll(model, examples, batch)}
    for temperature in temperatures:
        generator = TransformersGenerator(
            lambda: nullcontext(model),
            Sampling(temperature, 0, 1.0),
            eos_ids=[end],
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
            batch_size=batch,
        )
        seeds = [derive_seed("quality", "reply", row) for row in range(len(examples))]
        replies = generator.generate([prompt for prompt, _ in examples], [room] * len(examples), seeds)
        found |= {f"{name}@{temperature:g}": value for name, value in _describe(replies, examples, end).items()}
        if right is not None:
            shares = [right(row, reply) for row, reply in enumerate(replies)]
            found[f"right@{temperature:g}"] = sum(shares) / len(shares)
    return found


def _nll(model, examples, batch) -> float:
    total, tokens = 0.0, 0
    with frozen(model):
        for first in range(0, len(examples), batch):
            part = examples[first : first + batch]
            rows = collate_responses([(p, r, len(r)) for p, r in part], pad_token_id=0)
            logps, lengths = summed_logps(model, rows)
            total, tokens = total - float(logps.double().sum()), tokens + int(lengths.sum())
    return total / tokens


def _describe(replies, examples, end) -> dict[str, float]:
    responses = [response for _, response in examples]
    count = len(replies)
    return {
        "end": sum(bool(reply) and reply[-1] == end for reply in replies) / count,
        "length": sum(map(len, replies)) / sum(map(len, responses)),
        "repeat": sum(_repeated(reply) for reply in replies) / count,
        "distinct4": _distinct(replies, 4) / _distinct(responses, 4),
        "distance2": _distance(replies, responses, 2),
        "distance4": _distance(replies, responses, 4),
    }


def _grams(tokens: Sequence[int], n: int) -> list[Tokens]:
    return [tuple(tokens[place : place + n]) for place in range(len(tokens) - n + 1)]


def _repeated(tokens: Sequence[int], n: int = 4) -> float:
    grams = _grams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _distinct(texts, n: int) -> float:
    grams = [gram for tokens in texts for gram in _grams(tokens, n)]
    return len(set(grams)) / max(1, len(grams))


def _distance(one, other, n: int) -> float:
    """Total variation between the distributions of n-grams, between 0 and 1."""
    counts = [Counter(gram for tokens in texts for gram in _grams(tokens, n)) for texts in (one, other)]
    totals = [max(1, sum(count.values())) for count in counts]
    return 0.5 * sum(abs(counts[0][g] / totals[0] - counts[1][g] / totals[1]) for g in counts[0] | counts[1])

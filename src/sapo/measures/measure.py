"""A model's likelihood of held-out responses, its own samples, and their comparison."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import nn

from sapo.data.examples import Turn
from sapo.generation.forward import frozen
from sapo.generation.protocol import Generator
from sapo.measures.intervals import HALVES, RESAMPLES, Estimate, bootstrap_ratio, over_halves
from sapo.measures.text import distinct, jensen_shannon, ngram_counts, reply_values, seq_rep, without_end
from sapo.preference.batches import batches_by_length
from sapo.preference.scoring import summed_logps
from sapo.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """How responses are sampled and scored; every number but the seed is at least 1.

    Attributes:
        max_new_tokens: maximum tokens of a sampled response; without an EOS token by then it counts as not ended.
        max_length: maximum tokens of prompt plus response, at most the model's context length.
        batch_size: responses scored together.
        seed: seed of the samples; each row's seed derives from it and the row number.
    """

    max_new_tokens: int = 256
    max_length: int = 2048
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of one held-out row.

    Attributes:
        row: row number in the dataset.
        data_logp: log-probability of the data's response, nats.
        data_tokens: its number of tokens, including the EOS token.
        own: the model's own sample, including the EOS token if there is one.
        own_logp: log-probability of it, nats.
        opponent_logp: log-probability of the opponent's sample, nats; None without an opponent.
        opponent_tokens: its number of tokens.
    """

    row: int
    data_logp: float
    data_tokens: int
    own: tuple[int, ...]
    own_logp: float
    opponent_logp: float | None = None
    opponent_tokens: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Measured:
        """From JSON."""
        return cls(**{**stored, "own": tuple(stored["own"])})


def sample_responses(
    generator: Generator, rows: Sequence[int], turns: Sequence[Turn], options: LocalOptions
) -> list[tuple[int, ...]]:
    """One response per prompt; a row's randomness depends only on its number and the seed.

    A prompt that fills the context gets an empty response.
    """
    budgets = [max(0, min(options.max_new_tokens, options.max_length - len(turn.prompt_ids))) for turn in turns]
    seeds = [derive_seed(options.seed, "local", row, turn.index) for row, turn in zip(rows, turns, strict=True)]
    return [tuple(tokens) for tokens in generator.generate([turn.prompt_ids for turn in turns], budgets, seeds)]


def score_responses(
    model: nn.Module,
    turns: Sequence[Turn],
    responses: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int,
) -> list[float]:
    """Log-probability in nats of each response after its prompt; 0 for an empty one."""
    # An empty response has nothing to score.
    scored = [place for place, response in enumerate(responses) if len(response)]
    rows = [(turns[place].prompt_ids, responses[place]) for place in scored]
    logps, device = [0.0] * len(responses), next(model.parameters()).device
    with frozen(model):
        for places, batch in batches_by_length(rows, pad_token_id=pad_token_id, batch_size=batch_size):
            for place, logp in zip(places, summed_logps(model, batch.to(device))[0].tolist(), strict=True):
                logps[scored[place]] = logp
    return logps


def measure(
    policy: Callable[[], AbstractContextManager[nn.Module]],
    generator: Generator,
    rows: Sequence[int],
    turns: Sequence[Turn],
    options: LocalOptions,
    *,
    pad_token_id: int,
    opponent: Sequence[Sequence[int]] | None = None,
) -> list[Measured]:
    """Sample and score one response per row.

    Args:
        policy: opens a context that yields the model to measure.
        generator: generates with that model.
        rows: row numbers.
        turns: their prompts and responses.
        options: lengths, batch size, seed.
        pad_token_id: pads the rows.
        opponent: the opponent's samples, one per row.
    """
    own = sample_responses(generator, rows, turns, options)
    with policy() as model:

        def scored(responses: Sequence[Sequence[int]]) -> list[float]:
            return score_responses(model, turns, responses, pad_token_id=pad_token_id, batch_size=options.batch_size)

        data_logps, own_logps = scored([turn.response_ids for turn in turns]), scored(own)
        other_logps = scored(opponent) if opponent is not None else None
    return [
        Measured(
            row,
            data_logps[place],
            len(turns[place].response_ids),
            own[place],
            own_logps[place],
            None if other_logps is None else other_logps[place],
            None if opponent is None else len(opponent[place]),
        )
        for place, row in enumerate(rows)
    ]


def row_values(one: Measured, eos_ids: Collection[int]) -> dict[str, float]:
    """What a row adds to measures of the local suite, by their names, without undefined ones; `nll` is a sum."""
    values = {"nll": -one.data_logp, **reply_values(one.own, eos_ids)}
    repeated = seq_rep(without_end(one.own, eos_ids))
    if repeated is not None:
        values["seq_rep_4"] = repeated
    values["prefers_data_to_own"] = wins(one.data_logp - one.own_logp)
    if one.own:
        values["gap_to_own"] = one.data_logp / one.data_tokens - one.own_logp / len(one.own)
    return values


def summarize(
    measured: Sequence[Measured],
    responses: Sequence[Sequence[int]],
    eos_ids: frozenset[int],
    *,
    max_new_tokens: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
    halves: int = HALVES,
) -> dict[str, Estimate]:
    """All measures of the local suite by name, without undefined ones (no example long enough).

    Args:
        measured: one per row.
        responses: the data's responses in the same order.
        eos_ids: EOS tokens.
        max_new_tokens: maximum tokens of the samples, also applied when counting ended responses of the data.
        seed: seed of the resampling.
        resamples: number of bootstrap resamples; 0 for values without errors.
        halves: number of random halvings for corpus statistics.
    """
    found: dict[str, Estimate | None] = {}
    bootstrap = partial(bootstrap_ratio, seed=seed, resamples=resamples)

    def mean(name: str, values: Sequence[float | None]) -> None:
        found[name] = bootstrap([value for value in values if value is not None])

    rows = [row_values(one, eos_ids) for one in measured]
    bare = [without_end(one.own, eos_ids) for one in measured]
    bare_data = [without_end(tokens, eos_ids) for tokens in responses]
    found["nll"] = bootstrap([row["nll"] for row in rows], [one.data_tokens for one in measured])
    mean("ended", [row["ended"] for row in rows])
    mean("ended_data", [float(len(t) <= max_new_tokens and t[-1] in eos_ids) for t in responses])
    mean("length", [row["length"] for row in rows])
    mean("length_data", [float(len(tokens)) for tokens in responses])
    found["length_ratio"] = bootstrap([len(one.own) for one in measured], [len(t) for t in responses])
    mean("seq_rep_4", [row.get("seq_rep_4") for row in rows])
    mean("seq_rep_4_data", [seq_rep(tokens) for tokens in bare_data])
    mean("loops", [row["loops"] for row in rows])
    found |= _corpus(bare, bare_data, partial(over_halves, len(rows), seed=seed, halves=halves))
    found |= _gap("own", measured, [one.own_logp for one in measured], [len(one.own) for one in measured], bootstrap)
    faced = [one for one in measured if one.opponent_logp is not None]
    others = [one.opponent_logp or 0.0 for one in faced]
    found |= _gap("opponent", faced, others, [one.opponent_tokens or 0 for one in faced], bootstrap)
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _corpus(
    own: Sequence[Sequence[int]], data: Sequence[Sequence[int]], halved: Callable[..., Estimate | None]
) -> dict[str, Estimate | None]:
    """Variety and distance, on halves of the rows so that model and data have equal sample sizes."""
    found: dict[str, Estimate | None] = {}
    for n in (1, 2, 3):
        # Equally many n-grams of both, because variety falls with the amount of text.
        limit = min(sum(max(0, len(tokens) - n + 1) for tokens in corpus) for corpus in (own, data)) // 3
        for name, corpus in ((f"distinct_{n}", own), (f"distinct_{n}_data", data)):
            found[name] = halved(
                lambda half, _, corpus=corpus, n=n, limit=limit: distinct([corpus[i] for i in half], n, limit=limit),
            )
    for n in (1, 2):
        for name, corpus in ((f"ngram_distance_{n}", own), (f"ngram_distance_{n}_data", data)):
            found[name] = halved(
                lambda half, rest, corpus=corpus, n=n: jensen_shannon(
                    ngram_counts([corpus[i] for i in half], n),
                    ngram_counts([data[place] for place in rest], n),
                ),
            )
    return found


def _gap(
    name: str,
    measured: Sequence[Measured],
    logps: Sequence[float],
    lengths: Sequence[int],
    bootstrap: Callable[..., Estimate | None],
) -> dict[str, Estimate | None]:
    """How often, and by how much, the data's response is preferred to another; ties count half."""
    summed = [one.data_logp - logp for one, logp in zip(measured, logps, strict=True)]
    each = [
        one.data_logp / one.data_tokens - logp / length
        for one, logp, length in zip(measured, logps, lengths, strict=True)
        if length
    ]
    return {
        f"prefers_data_to_{name}": bootstrap([wins(value) for value in summed]),
        f"prefers_data_to_{name}_per_token": bootstrap([wins(value) for value in each]),
        f"gap_to_{name}": bootstrap(each),
    }


def wins(difference: float) -> float:
    """1 for a preference, 0 for the opposite, a half for none."""
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0

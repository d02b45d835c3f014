"""Log-probabilities of pairs under the policy and the reference, laid out as the run asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from sapo.data.examples import Example
from sapo.errors import ConfigurationError
from sapo.generation.forward import frozen
from sapo.preference.batches import Layout, PairBatch, batches_by_length, collate_pairs, split_pairs
from sapo.preference.objectives import ReferenceLogps
from sapo.preference.pairs import Pair, PairSource
from sapo.preference.scoring import PairScores, heads_disagree, prepare_shared_layout, score, summed_logps
from sapo.preference.token_distributions import Anchor, hidden_at, score_sft
from sapo.training.context import RunContext
from sapo.weights.sharding import zero_stage

logger = logging.get_logger(__name__)

Pass = tuple[Sequence[Pair], PairBatch]
"""The pairs of one forward pass, and their rows on the device."""
ReferenceScores = ReferenceLogps | Anchor | None
"""Of a pass: what the loss needs of the reference."""


class ScoredPairs(NamedTuple):
    """The pairs of a pass with their scores `[B]` under policy and reference; no gradients."""

    pairs: Sequence[Pair]
    scores: PairScores
    reference: ReferenceScores


class PairScorer:
    """Scores pairs with the roles of a run.

    Args:
        context: of the run.
        accelerator: of the run.
        model: returns the policy as it computes, with its wrappers.
    """

    def __init__(self, context: RunContext, accelerator: Any, model: Callable[[], nn.Module]) -> None:
        self._context = context
        self._model = model
        self._accelerator = accelerator
        self._layout: Layout | None = None
        self._compared = False
        # Processes that gather weights or spread gradients in each pass need equally many; the published likelihood
        # counts padding.
        together = context.roles.sharded or zero_stage(accelerator) > 0
        self._equal_passes = together or context.args.nll_scope == "all"
        if context.roles.sharded and context.args.kl_weight:
            raise ConfigurationError(
                f"kl_weight={context.args.kl_weight} with sharded weights is not supported. Leave it out, or use LoRA "
                "with --accelerate_config multi_gpu or zero2; self-replay (replay_share) works with all of them."
            )

    # ---- Layout ----

    @property
    def layout(self) -> Layout:
        """The layout of all batches, found out on the models themselves at its first use.

        Raises:
            ConfigurationError: layout=shared, and a model cannot share prefixes.
        """
        if self._layout is None:
            reason = self._unsupported_reason()
            args = self._context.args
            if reason is not None and args.layout == "shared":
                raise ConfigurationError(f"layout=shared: {reason}. Set layout to auto or plain.")
            if reason is not None and args.layout == "auto" and args.nll_scope != "all":
                logger.warning(f"The plain layout is used, in which prompts are computed twice: {reason}.")
            self._layout = "shared" if reason is None else "plain"
        return self._layout

    def _unsupported_reason(self) -> str | None:
        args, roles, fused = self._context.args, self._context.roles, self.fused_head
        if args.layout == "plain" or args.nll_scope == "all":
            return "it is not asked for"
        modules: list[AbstractContextManager[nn.Module]] = [nullcontext(self._model())]
        if roles.reference is not None and roles.reference.own_module:
            modules.append(roles.reference.using())
        for opened in modules:
            with opened as model, roles.autocast():
                reason = prepare_shared_layout(model, fused_lm_head=fused)
            if reason is not None:
                return reason
        return None

    def collate(self, pairs: Sequence[Pair]) -> PairBatch:
        """Rows of `pairs` on the device of the run."""
        args = self._context.args
        batch = collate_pairs(
            pairs,
            pad_token_id=self._context.pad_token_id,
            suffix=args.suffix,
            layout=self.layout,
            score_shared=args.scores_shared,
            all_positions=args.nll_scope == "all",
        )
        return batch.to(args.device)

    def passes(self, pairs: Sequence[Pair]) -> list[Pass]:
        """`pairs` of a micro-batch divided into forward passes of `pairs_per_forward` and `tokens_per_forward`.

        A pair that was drawn several times is computed once, and `PairBatch.draws` tells how often it counts.
        """
        args = self._context.args
        draws = Counter(id(pair) for pair in pairs)
        # Where passes must be equally many on all processes, their number follows from that of the pairs.
        merged = not self._equal_passes and len(draws) < len(pairs)
        distinct = list({id(pair): pair for pair in pairs}.values()) if merged else pairs
        split = partial(
            split_pairs,
            distinct,
            args.pairs_per_forward,
            layout=self.layout,
            tokens=args.tokens_per_forward,
            equal_passes=self._equal_passes,
        )
        parts = split()
        if args.tokens_per_forward is not None and self._equal_passes and args.world_size > 1:
            # Lengths differ from process to process; all take as many passes as the one that needs most.
            wanted = self._accelerator.gather(torch.tensor([len(parts)], device=args.device))
            parts = split(least=int(wanted.max()))
        passes: list[Pass] = [(part, self.collate(part)) for part in parts]
        if merged:
            passes = [(part, replace(batch, draws=tuple(draws[id(pair)] for pair in part))) for part, batch in passes]
        return passes

    # ---- Scores ----

    @property
    def fused_head(self) -> bool:
        """Whether scores come from trl's fused head, which is compared with the model's own at its first use.

        Raises:
            ConfigurationError: fused_lm_head=true, and it gives other scores.
        """
        args, roles = self._context.args, self._context.roles
        if self._compared or not roles.fused_head:
            return roles.fused_head
        self._compared = True
        with roles.autocast():
            reason = heads_disagree(self._model())
        if reason is None:
            return True
        if args.fused_lm_head:
            raise ConfigurationError(f"fused_lm_head=true: {reason}. Leave the option out.")
        logger.warning(f"Log-probabilities come from the gathered head, which takes more memory: {reason}.")
        roles.fused_head = False
        return False

    def policy_scores(self, model: nn.Module, batch: PairBatch, reference: ReferenceScores) -> PairScores:
        """What the loss needs of the policy on a batch; with an anchor, its divergence from it too.

        Args:
            model: the policy, with its wrappers.
            batch: on the device.
            reference: result of `reference_logps` for this batch.
        """
        args, fused = self._context.args, self.fused_head
        by_probability = args.token_weighting == "probability"  # noqa: S105
        if args.objective == "sft" and (args.kl_weight or by_probability):
            anchor = reference if isinstance(reference, Anchor) else None
            return score_sft(model, batch, anchor, by_probability=by_probability, fused_lm_head=fused)
        return score(model, batch, fused_lm_head=fused)

    def reference_logps(self, passes: Sequence[Pass], source: PairSource | None = None) -> list[ReferenceScores]:
        """Log-probabilities under the reference, of each pass; a sharded one is gathered once for all of them.

        With objective=sft, its hidden states instead: see `Anchor`.

        Args:
            passes: what is scored; all processes take part in equally many.
            source: keeps the scores of pairs that are drawn again; None where nothing is to be kept.
        """
        roles = self._context.roles
        if roles.reference is None:
            return [None] * len(passes)
        moving, fused = roles.reference is roles.opponent, self.fused_head
        using = roles.reference.using
        with roles.autocast(), using() as model, frozen(model):
            found: list[ReferenceScores] = []
            for pairs, batch in passes:
                if self._context.args.objective == "sft":
                    found.append(Anchor(hidden_at(model, batch), using))
                    continue

                def compute(missing: list[Pair], pairs: Sequence[Pair] = pairs, batch: PairBatch = batch) -> Any:
                    own = batch if len(missing) == len(pairs) else self.collate(missing)
                    scores = score(model, own, fused_lm_head=fused)
                    return ReferenceLogps(scores.chosen_logps, scores.rejected_logps)

                if moving or source is None:
                    found.append(compute(list(pairs)))
                else:
                    found.append(source.reference_logps(pairs, compute).to(self._context.args.device))
        return found

    def scores_of(self, pairs: Sequence[Pair]) -> tuple[PairScores, ReferenceScores]:
        """Scores under policy and reference, in one pass without gradients; all processes take part."""
        batch = self.collate(pairs)
        (reference,) = self.reference_logps([(pairs, batch)])
        with self._context.roles.autocast(), frozen(self._model()) as model:
            return self.policy_scores(model, batch, reference), reference

    def response_logps(self, examples: Sequence[Example]) -> list[float]:
        """Log-probability in nats of the last response of each example under the policy."""
        context, logps = self._context, dict[int, float]()
        turns = [(example.turns[-1].prompt_ids, example.turns[-1].response_ids) for example in examples]
        size = 2 * context.args.per_device_train_batch_size
        for places, batch in batches_by_length(turns, pad_token_id=context.pad_token_id, batch_size=size):
            with context.roles.autocast(), frozen(self._model()) as model:
                rows = batch.to(context.args.device)
                sums = summed_logps(model, rows, fused_lm_head=self.fused_head)[0].tolist()
            logps |= dict(zip(places, sums, strict=True))
        return [logps[place] for place in range(len(examples))]

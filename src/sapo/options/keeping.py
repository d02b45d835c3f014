"""Options that measure or keep what the start of a run could do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from sapo.options.declare import declared, time_fraction

_objective = partial(declared, section="Objective")
_replay = partial(declared, section="Self-replay")
_evaluation = partial(declared, section="Evaluation", resume="free")


@dataclass
class KeepOptions:
    """Fields of `SAPOConfig` with their declarations; `OwnOptions` has the others."""

    kl_weight: float = _objective(
        0.0,
        "Anchor for SFT: weight of KL(start || policy) per token over the full vocabulary, added to the loss "
        "(published: 0.05 to 0.1).",
        low=0,
        needs="objective=sft",
    )
    token_weighting: Literal["none", "probability"] = _objective(
        "none",
        "Weight of each token in the SFT loss: none, or the token's own probability, without its gradient (dynamic "
        "fine-tuning; with kl_weight, anchored SFT).",
        needs="objective=sft",
    )
    label_smoothing: float = _objective(
        0.0,
        "Assumed probability that the labels of a pair are swapped (conservative DPO).",
        low=0,
        high=0.5,
        needs="loss_type=sigmoid",
    )
    nce_shift: float = _objective(
        0.0, "Added to beta times each log-ratio (SPACE: minus log mu; GSIL: 2).", needs="loss_type=nce"
    )
    nce_negative_weight: float = _objective(
        1.0, "Weight of the rejected response's term (SPACE: mu).", low=0, needs="loss_type=nce"
    )
    replay_share: float = _replay(
        0.0,
        "Share of each batch that is self-replay: the start's own replies to other prompts, trained on as they are and "
        "never against a rejected response. They come on top of per_device_train_batch_size.",
        low=0,
        high=0.9,
    )
    replay_dataset_name: str | None = _replay(
        None,
        "Rows for self-replay, as sapo generate --self_replay writes them: file, folder or Hub id. Unset: the start "
        "replies to 102 shipped prompts before the first step.",
        needs="replay_share",
    )
    replay_max_new_tokens: int = _replay(
        128, "Maximum number of tokens of the start's replies to the shipped prompts.", low=1, needs="replay_share"
    )

    eval_retention: bool = _evaluation(
        False,
        "At evaluations also log retention/...: how far the policy has moved from its start on general prompts and on "
        "training prompts (exact KL per token), and its gain on evaluation rows.",
        needs="eval_strategy=steps or epoch",
    )
    eval_retention_size: int = _evaluation(
        48,
        "Number of general prompts, of training prompts and of evaluation rows that eval_retention measures on.",
        low=1,
        needs="eval_retention",
    )
    eval_retention_max_time_fraction: float = time_fraction(
        0.1,
        "eval_retention",
        ", the start's replies before the first step not counted; the rest waits for a later evaluation.",
    )
    retention_kl_limit: float | None = _evaluation(
        0.1,
        "Warn when retention/kl_general exceeds this many nats per token; none for no warning.",
        low=0,
        needs="eval_retention",
    )

"""SAPO: Self-Augmented Preference Optimization (arXiv 2405.20830).

Align a language model from good conversations alone: training makes its own rejected answers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sapo._version import __version__

if TYPE_CHECKING:
    from sapo.config import SAPOConfig
    from sapo.errors import (
        CheckpointError,
        ConfigurationError,
        DatasetError,
        EvaluationError,
        GenerationError,
        ModelError,
        SapoError,
        TokenizerError,
        TrainingError,
    )
    from sapo.generation.protocol import Generator
    from sapo.preference.objectives import dpo_loss, orpo_loss, sequence_logps
    from sapo.preference.pairs import Pair, PairedData, PairSource
    from sapo.preference.replay_buffer import ReplayBuffer
    from sapo.preference.segments import Segment, choose_segment, splice
    from sapo.preference.self_play import SelfPlay
    from sapo.training.trainer import SAPOTrainer

_HOMES = {
    "SAPOConfig": "sapo.config",
    "SAPOTrainer": "sapo.training.trainer",
    "Generator": "sapo.generation.protocol",
    "Pair": "sapo.preference.pairs",
    "PairSource": "sapo.preference.pairs",
    "PairedData": "sapo.preference.pairs",
    "ReplayBuffer": "sapo.preference.replay_buffer",
    "Segment": "sapo.preference.segments",
    "SelfPlay": "sapo.preference.self_play",
    "choose_segment": "sapo.preference.segments",
    "dpo_loss": "sapo.preference.objectives",
    "orpo_loss": "sapo.preference.objectives",
    "sequence_logps": "sapo.preference.objectives",
    "splice": "sapo.preference.segments",
    "CheckpointError": "sapo.errors",
    "ConfigurationError": "sapo.errors",
    "DatasetError": "sapo.errors",
    "EvaluationError": "sapo.errors",
    "GenerationError": "sapo.errors",
    "ModelError": "sapo.errors",
    "SapoError": "sapo.errors",
    "TokenizerError": "sapo.errors",
    "TrainingError": "sapo.errors",
}

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DatasetError",
    "EvaluationError",
    "GenerationError",
    "Generator",
    "ModelError",
    "Pair",
    "PairSource",
    "PairedData",
    "ReplayBuffer",
    "SAPOConfig",
    "SAPOTrainer",
    "SapoError",
    "Segment",
    "SelfPlay",
    "TokenizerError",
    "TrainingError",
    "__version__",
    "choose_segment",
    "dpo_loss",
    "orpo_loss",
    "sequence_logps",
    "splice",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `sapo --help` should not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sapo' has no attribute {name!r}")

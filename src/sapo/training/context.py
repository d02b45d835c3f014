"""What the parts of a run share: handed to each of them in place of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sapo.config import SAPOConfig
from sapo.generation.decoding import TransformersGenerator
from sapo.generation.sampling import Sampling
from sapo.runs.world import World
from sapo.weights.roles import Roles


@dataclass(frozen=True, slots=True)
class RunContext:
    """The fixed facts of a run.

    Attributes:
        args: every option.
        tokenizer: the model's.
        eos_ids: tokens that end a response.
        pad_token_id: fills rows; never attended to.
        world: the processes.
        roles: policy, opponent and reference.
        look: called before each new token; raises if the run ends now.
    """

    args: SAPOConfig
    tokenizer: Any
    eos_ids: frozenset[int]
    pad_token_id: int
    world: World
    roles: Roles
    look: Callable[[], None]

    @property
    def model_config(self) -> Any:
        """The policy's configuration."""
        return self.roles.policy().config

    @property
    def sampling(self) -> Sampling:
        """How the opponent samples."""
        return Sampling(self.args.temperature, self.args.top_k, self.args.top_p)

    def generator(
        self,
        weights: Callable[[], AbstractContextManager[nn.Module]],
        sampling: Sampling,
        batch_size: int | None,
    ) -> TransformersGenerator:
        """Generates in this process with the model that `weights` opens, such as `roles.opponent_module`."""
        return TransformersGenerator(
            weights,
            sampling,
            eos_ids=self.eos_ids,
            pad_token_id=self.pad_token_id,
            batch_size=batch_size,
            look=self.look,
        )

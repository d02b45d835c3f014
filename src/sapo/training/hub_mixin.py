"""The methods of `transformers.Trainer` that push to the Hub: once, at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sapo.config import SAPOConfig
from sapo.hub.publish import create_repository, push_run
from sapo.runs.folder import RunFolder
from sapo.weights.source import holds_model


class HubMixin:
    """Trainer mixin for the Hub: pushes at the end of a run; checkpoints are not pushed."""

    args: SAPOConfig
    run_folder: RunFolder
    hub_model_id: str | None
    is_world_process_zero: Callable[[], bool]
    save_model: Callable[..., None]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository before training, so that a wrong name or token fails early.

        Raises:
            ConfigurationError: the Hub refuses or is unreachable.
        """
        if self.is_world_process_zero():
            self.hub_model_id = create_repository(
                self.args.hub_model_id or Path(self.args.output_dir or "").absolute().name,
                token=token or self.args.hub_token,
                private=self.args.hub_private_repo if private is None else private,
            )

    def push_to_hub(
        self, commit_message: str | None = "End of training", *, token: str | None = None, revision: str | None = None
    ) -> Any:
        """Push the models of the run folder; save them first if needed.

        Args:
            commit_message: message of the commit.
            token: token with write permission. Default: `hub_token`, or the one of `hf auth login`.
            revision: branch. Default: `hub_revision`, or main.

        Returns:
            The Hub's commit information; None on all processes but the first.

        Raises:
            ConfigurationError: the Hub refuses or is unreachable.
        """
        folder = self.run_folder.path
        if not holds_model(folder):
            self.save_model()
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        return push_run(
            folder,
            str(self.hub_model_id),
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            message=commit_message or "End of training",
            opponent=self.args.push_opponent_to_hub,
        )

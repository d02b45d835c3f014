"""Push a run to the Hub: policy, tokenizer, model card and curves, and optionally the opponent.

Nothing else is uploaded: not checkpoints, and not pairs.jsonl, traces or the report, which contain training data.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from sapo.config import SAPOConfig
from sapo.errors import ConfigurationError, brief
from sapo.hub.card import write_card
from sapo.runs.folder import RunFolder
from sapo.runs.layout import CARD_FILE, CURVES_FILE

_MODEL = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"]
_TOKENIZER = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "*.model",
]


def uploaded(*, opponent: bool) -> list[str]:
    """Patterns of the pushed files; `*` matches into subfolders, so every folder is listed explicitly."""
    patterns = [*_MODEL, *_TOKENIZER, CARD_FILE, CURVES_FILE]
    return [*patterns, *(f"opponent/{pattern}" for pattern in (*_MODEL, *_TOKENIZER))] if opponent else patterns


_KEPT = [".*", "checkpoint-*", "*.jsonl", "report.html", "run.json", "optimizer*", "training_args.bin"]


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
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir or "").absolute().name
        api = HfApi(token=token or self.args.hub_token)
        with_private = self.args.hub_private_repo if private is None else private
        self.hub_model_id = _asked(
            "create the repository", lambda: api.create_repo(name, private=with_private, exist_ok=True).repo_id
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
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            self.save_model()
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        name = str(self.hub_model_id)
        write_card(folder, name)
        api = HfApi(token=token or self.args.hub_token)
        opponent = self.args.push_opponent_to_hub
        return _asked(
            f"push (the complete run is in {folder})",
            lambda: api.upload_folder(
                repo_id=name,
                folder_path=str(folder),
                commit_message=commit_message or "End of training",
                revision=revision or self.args.hub_revision,
                allow_patterns=uploaded(opponent=opponent),
                ignore_patterns=[*_KEPT, *([] if opponent else ["opponent/*"])],
            ),
        )


def _asked(what: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, httpx2.HTTPError) as error:
        raise ConfigurationError(
            f"push_to_hub: cannot {what}: {brief(error)}. Log in with `hf auth login`, or set --hub_token, and check "
            "--hub_model_id."
        ) from error

"""Push a run to the hub: the policy, its tokenizer, card and curves, and the opponent if asked for.

Nothing else of the run folder leaves the machine: checkpoints stay, and so do pairs.jsonl, the traces and the report,
for they hold texts of the training data.
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
    """Patterns of the files that are pushed; in them `*` reaches into folders, so every folder is named or left out."""
    patterns = [*_MODEL, *_TOKENIZER, CARD_FILE, CURVES_FILE]
    return [*patterns, *(f"opponent/{pattern}" for pattern in (*_MODEL, *_TOKENIZER))] if opponent else patterns


_KEPT = [".*", "checkpoint-*", "*.jsonl", "report.html", "run.json", "optimizer*", "training_args.bin"]


class HubMixin:
    """The part of a trainer that speaks with the hub; `push_to_hub` pushes at the end of a run, not its checkpoints."""

    args: SAPOConfig
    run_folder: RunFolder
    hub_model_id: str | None
    is_world_process_zero: Callable[[], bool]
    save_model: Callable[..., None]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, before anything is trained: a name or a token that is wrong is told at once.

        Raises:
            ConfigurationError: the hub refuses, or cannot be reached.
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
        """Push the models of the run folder; they are saved first if they are not there yet.

        Args:
            commit_message: of the commit.
            token: with write permission; by default `hub_token`, or the one that is logged in.
            revision: branch; by default `hub_revision`, or main.

        Returns:
            What the hub says about the commit; None on all processes but the first.

        Raises:
            ConfigurationError: the hub refuses, or cannot be reached.
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
            f"push (the run is whole in {folder})",
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
            f"push_to_hub: cannot {what}: {brief(error)}. Log in with `hf auth login`, or give --hub_token, and check "
            "--hub_model_id."
        ) from error

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

from sapo.errors import ConfigurationError, brief
from sapo.hub.card import write_card
from sapo.runs.layout import CARD_FILE, CURVES_FILE
from sapo.weights.source import TOKENIZER_PATTERNS

_MODEL = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"]


def uploaded(*, opponent: bool) -> list[str]:
    """Patterns of the pushed files; `*` matches into subfolders, so every folder is listed explicitly."""
    model = [*_MODEL, *TOKENIZER_PATTERNS]
    return [*model, CARD_FILE, CURVES_FILE, *(f"opponent/{pattern}" for pattern in model if opponent)]


_KEPT = [".*", "checkpoint-*", "*.jsonl", "report.html", "run.json", "optimizer*", "training_args.bin"]


def create_repository(name: str, *, token: str | None, private: bool | None) -> str:
    """Create the repository `name`, with or without an owner, unless it is there; returns its id with the owner.

    Args:
        name: of the model.
        token: with write permission; None for the one of `hf auth login`.
        private: None for what the Hub's account says.
    """
    api = HfApi(token=token)
    return str(_asked("create the repository", lambda: api.create_repo(name, private=private, exist_ok=True).repo_id))


def push_run(folder: Path, name: str, *, token: str | None, revision: str | None, message: str, opponent: bool) -> Any:
    """Write the model card of a run that has saved its models, and push them; returns the Hub's commit information.

    Args:
        folder: of the run.
        name: id of the repository.
        token: with write permission; None for the one of `hf auth login`.
        revision: branch; None for main.
        message: of the commit.
        opponent: whether the opponent is pushed too.
    """
    write_card(folder, name)
    api = HfApi(token=token)
    return _asked(
        f"push (the complete run is in {folder})",
        lambda: api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            commit_message=message,
            revision=revision,
            allow_patterns=uploaded(opponent=opponent),
            ignore_patterns=[*_KEPT, *([] if opponent else ["opponent/*"])],
        ),
    )


def _asked(what: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, httpx2.HTTPError) as error:
        raise ConfigurationError(
            f"push_to_hub: cannot {what}: {brief(error)}. Check the connection, log in with `hf auth login` or "
            "set --hub_token, and check --hub_model_id."
        ) from error

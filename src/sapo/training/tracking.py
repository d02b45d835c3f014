"""Tables of pairs for the trackers that have tables; their curves are logged by transformers' own callbacks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

COLUMNS = ["step", "kind", "row", "prompt", "chosen", "rejected", "margin", "loss", "chosen_logp", "rejected_logp"]


def pair_table(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows of pairs.jsonl as rows of `COLUMNS`, the segment between ⟦ and ⟧."""

    def cell(row: dict[str, Any], column: str) -> Any:
        if column in ("chosen", "rejected"):
            before, segment, after = row[column]
            return f"{before}⟦{segment}⟧{after}"
        return row.get(column)

    return [[cell(row, column) for column in COLUMNS] for row in rows]


def log_pairs(trackers: Collection[str], rows: list[dict[str, Any]], step: int) -> None:
    """Give a table of pairs to each tracker of a run that can show one: trackio, wandb and mlflow.

    Args:
        trackers: `report_to` of the run.
        rows: of pairs.jsonl.
        step: of the optimizer.
    """
    data = pair_table(rows)
    if "trackio" in trackers:
        import trackio

        trackio.log({"pairs": trackio.Table(columns=COLUMNS, data=data), "train/global_step": step})
    if "wandb" in trackers:
        import wandb

        wandb.log({"pairs": wandb.Table(columns=COLUMNS, data=data), "train/global_step": step})
    if "mlflow" in trackers:
        import mlflow

        columns = {column: [row[place] for row in data] for place, column in enumerate(COLUMNS)}
        mlflow.log_table(data=columns, artifact_file=f"pairs/step-{step:06d}.json")

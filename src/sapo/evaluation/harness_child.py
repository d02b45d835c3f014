"""Runs lm-evaluation-harness in a separate process: `python -m sapo.evaluation.harness_child REQUEST.json`.

IFEval uses Python's random state when it scores, and earlier imports change that state. A fresh process with the
steps of the harness's command line reproduces its numbers. Keep imports here few.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sapo.evaluation.store import FinishedParts


class LeftTruncations(logging.Handler):
    """Counts batches whose prompts the harness truncated, which it only logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        """Batches so far."""

    def emit(self, record: logging.LogRecord) -> None:
        """Count one message."""
        self.count += "runcation applied" in record.getMessage()


def main(request_file: str) -> None:
    """Run the tasks of a request; save each result as it finishes.

    The request has `model_args`, `device`, `batch_size`, `limit`, `gen_kwargs`, `chat`, `chat_template`,
    `include_path`, `parts` (a file for `FinishedParts`) and `tasks`: each with `key`, `task`, `shots`, `metrics`.
    """
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    parts = FinishedParts(Path(request["parts"]))
    from lm_eval.tasks import TaskManager

    cut = LeftTruncations()
    for name in ("lm_eval", "lm-eval"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers, logger.propagate = [cut], False
    manager = TaskManager(include_path=request["include_path"])
    model: Any = "hf"
    if len(request["tasks"]) > 1 or request["chat_template"] is not None:
        # Loaded once for all tasks: those that come in groups use no random numbers.
        model = _load(request)
    for task in request["tasks"]:
        cut.count = 0
        record, arguments = _run(request, task, model, manager)
        parts.add(task["key"], {**record, "truncated": cut.count + _too_long(request, arguments)})


def _load(request: Mapping[str, Any]) -> Any:
    from lm_eval.models.huggingface import HFLM

    model: Any = HFLM(**request["model_args"], device=request["device"], batch_size=request["batch_size"])
    if request["chat_template"] is not None:
        model.tokenizer.chat_template = request["chat_template"]
    return model


def _run(request: Mapping[str, Any], task: Mapping[str, Any], model: Any, manager: Any) -> tuple[dict[str, Any], Any]:
    import lm_eval

    name = task["task"]
    found: Any = lm_eval.simple_evaluate(
        model=model,
        model_args=request["model_args"] if model == "hf" else None,
        tasks=[name],
        num_fewshot=task["shots"],
        batch_size=request["batch_size"],
        device=request["device"],
        limit=request["limit"],
        gen_kwargs=request["gen_kwargs"],
        apply_chat_template=request["chat"],
        task_manager=manager,
        log_samples=True,
    )
    samples: dict[str, dict[str, Any]] = {metric: {} for metric in task["metrics"]}
    # The model's outputs, for comparison with another run of the harness.
    responses = hashlib.sha256()
    for sample in found["samples"][name]:
        responses.update(json.dumps(sample["resps"]).encode())
        for metric in task["metrics"]:
            base, _, filter_name = metric.partition(",")
            if sample["filter"] == filter_name:
                samples[metric][str(sample["doc_id"])] = _plain(sample[base])
    metrics = found["results"][name]
    # For a scored choice: question and choice.
    arguments = [pair for sample in found["samples"][name] for pair in sample["arguments"] if _is_choice(pair)]
    record = {
        "task": name,
        "metrics": {metric: value for metric, value in metrics.items() if isinstance(value, (int, float))},
        "samples": samples,
        "responses": responses.hexdigest(),
        "examples": int(found["n-samples"][name]["effective"]),
    }
    return record, arguments


def _is_choice(arguments: Any) -> bool:
    return len(arguments) == 2 and all(isinstance(one, str) for one in arguments)


def _too_long(request: Mapping[str, Any], arguments: Any) -> int:
    """Number of questions plus choices longer than the model's context, which the harness truncates silently."""
    if not arguments or request["positions"] is None:
        return 0
    from sapo.weights.description import load_tokenizer

    tokenizer = load_tokenizer(request["model_args"]["pretrained"])
    wholes = [context + choice for context, choice in arguments]
    # The last token is only predicted, so the context needs one position less.
    return sum(
        len(ids) > request["positions"] + 1
        for first in range(0, len(wholes), 1000)
        for ids in tokenizer(wholes[first : first + 1000], add_special_tokens=False)["input_ids"]
    )


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [float(one) for one in value]
    return float(value)


if __name__ == "__main__":
    main(sys.argv[1])

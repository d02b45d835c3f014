"""Run folders made by hand, for tests of the report."""

import json
import math
import random

import yaml

from sapo import SAPOConfig
from tests.tiny import write_rows

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & <!-- \u2028"


def logged(step, steps):
    share = step / steps
    wave = math.sin(step / 7)
    return {
        "step": step,
        "epoch": step / 50,
        "tokens": 4000,
        "time/step": 1.8,
        "loss": 0.7 - 0.4 * share + 0.02 * wave,
        "grad_norm": 1.0 + wave,
        "learning_rate": 1e-6 * (1 - share),
        "rewards/chosen": 0.1 + 0.2 * share,
        "rewards/rejected": -0.5 * share,
        "rewards/margins": 0.1 + 0.7 * share,
        "rewards/accuracies": 0.5 + 0.4 * share,
        "logps/chosen": -80.0 + 10 * share,
        "logps/rejected": -82.0 - 10 * share,
        "self_play/chosen_logp_change": 4.0 * share + wave,
        "self_play/chosen_logp_change_per_token": 0.04 * share + wave / 100,
        "self_play/identical_fraction": 0.02,
        "self_play/eos_fraction": 0.1,
        "self_play/rejected_length": 210.0,
        "self_play/segment_length": 64.0,
        "replay/mean_age": min(step, 400) / 2,
        "replay/mean_draws": 1.5,
        "opponent/distance": 0.001 * (1 + wave / 2),
        "time/generate": 0.8,
        "time/reference": 0.1,
        "time/policy": 0.4,
        "time/optimizer": 0.05,
        "tokens_per_second": 5000.0 + 200 * wave,
        "memory/process_mb": 1500.0,
        "nonfinite_step_fraction": 0.0,
        "optimizer/moved_fraction": 0.9,
    }


def kept_pair(step, row, rng, *, words=60, kind="trained", text=None):
    def write(count):
        return " ".join(rng.choice(["lorem", "ipsum", "dolor", "sit", "amet", "elit"]) for _ in range(count)) + " "

    segment, rewritten = write(8), text if text is not None else write(8)
    before, after = write(words), write(words)
    return {
        "step": step,
        "kind": kind,
        "row": row,
        "turn": 0,
        "prompt": f"Question {row}: {write(words)}",
        "chosen": [before, segment, after],
        "rejected": [before, rewritten, after],
        "tokens": [words, 2 * words + 8, 2 * words + 8],
        "segment_tokens": [8, 8],
        "identical": segment == rewritten,
        "loss": 0.6,
        "margin": round(rng.uniform(-1, 2), 4),
        "chosen_logp": -80.0,
        "rejected_logp": -90.0,
    }


def write_run(folder, *, steps=100, every=1, pairs=None, evaluations=(), **changed):
    """A run folder as a run leaves it: `changed` metrics are functions of the step."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(every, steps + 1, every):
        row = logged(step, steps)
        rows.append(row | {name: function(step) for name, function in changed.items()})
    local = {"nll": 2.0, "gap_to_own": -0.5, "ended": 0.9, "loops": 0.0, "prefers_data_to_own": 0.2, "length": 90.0,
             "length_data": 100.0}  # fmt: skip
    rows += [
        {"step": step, "eval_loss": loss, **{f"eval_local/{name}": value for name, value in local.items()}}
        for step, loss in evaluations
    ]
    rows.append({"step": steps, "train_runtime": 3700.0, "train_loss": 0.5})
    write_rows(folder / "metrics.jsonl", rows)
    if pairs is None:
        rng = random.Random(0)
        pairs = [kept_pair(1 + 5 * (i // 4), i % 4, rng, kind="followed") for i in range(20)]
    write_rows(folder / "pairs.jsonl", pairs)
    config = SAPOConfig(output_dir=str(folder), use_cpu=True, beta=0.25, report_to="none")
    (folder / "sapo_config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    facts = {"model": "some/model", "parameters": 7_241_732_096, "trained_parameters": 7_241_732_096, "adapter": False}
    facts |= {"training_rows": 7000, "max_steps": steps, "packages": {"torch": "2.13.0"}, "stopped": None}
    (folder / "run.json").write_text(json.dumps(facts))
    return folder

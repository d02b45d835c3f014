"""What bfloat16 weights with float32 masters learn, beside float32 weights, and beside rounding to the nearest.

    python benchmarks/precision.py --model FOLDER --rows train.jsonl --heldout test.jsonl
    python benchmarks/precision.py --model FOLDER --heldout test.jsonl --adapters RUN RUN    what merging them loses

Rows have `question` and `answer` (GSM8K). Each kind trains on the same rows in the same order: the likelihood of
answers, two rows a step, AdamW, gradients clipped at 1. Printed: the held-out loss in nats a token, computed in float32
with the weights (bfloat16 ones cast), and with the masters. Adapters on the model are merged in float32, and the sums
rounded to bfloat16 both ways.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sapo.weights.description import load_tokenizer
from sapo.weights.loading import load_frozen
from sapo.weights.master import MasterWeights
from sapo.weights.rounding import rounded
from sapo.weights.starts import merge_adapter

KINDS = ("float32", "bfloat16", "nearest")


class Nearest(MasterWeights):
    """As other tools round masters."""

    def _round(self) -> None:
        torch._foreach_copy_(self._weights, self._masters)


def encoded(file: Path, count: int, tokenizer) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of the first rows, in tokens."""
    found = []
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()[:count]):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], add_generation_prompt=True, tokenize=False
        )
        texts = (prompt, row["answer"] + tokenizer.eos_token)
        found.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts))
    return found


def losses(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """Nats of each token of the answer, in float32."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return cross_entropy(logits.float(), torch.tensor(answer), reduction="none")


def heldout_loss(probe: nn.Module, weights: dict[str, Tensor], rows: list[tuple[list[int], list[int]]]) -> float:
    """Of `weights`, whatever their type, computed in float32."""
    with torch.no_grad():
        for name, weight in probe.named_parameters():
            weight.copy_(weights[name])
        return float(torch.cat([losses(probe, *row) for row in rows]).mean())


def run(kind: str, options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(str(options.model))
    train = encoded(options.rows, 2 * options.steps, tokenizer)
    heldout = encoded(options.heldout, options.heldout_rows, tokenizer)
    dtype = "float32" if kind == "float32" else "bfloat16"
    model = load_frozen(str(options.model), dtype=dtype, device="cpu").requires_grad_(True)
    probe = load_frozen(str(options.model), dtype="float32", device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    if kind != "float32":
        optimizer = (Nearest if kind == "nearest" else MasterWeights)(optimizer)
    for step in range(options.steps + 1):
        if step in options.report:
            weights = dict(model.named_parameters())
            found = {"kind": kind, "step": step, "weights": heldout_loss(probe, weights, heldout)}
            if kind != "float32":
                masters = optimizer.masters()
                own = {name: masters[id(weight)] for name, weight in weights.items()}
                found["masters"] = heldout_loss(probe, own, heldout)
            print(json.dumps(found), flush=True)
        if step == options.steps:
            break
        for row in train[2 * step : 2 * step + 2]:
            (losses(model, *row).mean() / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def merge(adapter: str, options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(str(options.model))
    heldout = encoded(options.heldout, options.heldout_rows, tokenizer)
    probe = load_frozen(str(options.model), dtype="float32", device="cpu")
    found = {"adapter": adapter, "start": heldout_loss(probe, dict(probe.named_parameters()), heldout)}
    merged = dict(merge_adapter(load_frozen(adapter, dtype="float32", device="cpu")).named_parameters())
    ways = {"float32": Tensor.float, "nearest": Tensor.bfloat16, "thresholds": partial(rounded, dtype=torch.bfloat16)}
    for kind, way in ways.items():
        found[kind] = heldout_loss(probe, {name: way(weight) for name, weight in merged.items()}, heldout)
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--adapters", nargs="*", default=[], help="runs with LoRA of this model; nothing is trained")
    parser.add_argument("--heldout_rows", type=int, default=12)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--report", nargs="+", type=int, default=[0, 1, 4, 10, 20, 30])
    parser.add_argument("--learning_rate", type=float, default=5e-6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for adapter in options.adapters:
        merge(adapter, options)
    for kind in [] if options.adapters else options.kinds:
        run(kind, options)


if __name__ == "__main__":
    main()

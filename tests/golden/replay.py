"""Replay a recorded run of the published implementation on the real trainer.

    python -m tests.golden.replay TRACE.json --model DIR

Every random outcome of the trace is injected through the seams (examples, segments, generated tokens, picks); all
else is the trainer's own: splice, buffer, layout, reference, loss, optimizer, moving average. Prints the largest
difference of the losses (1e-5 at most) and of the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo import Pair, SAPOConfig, SAPOTrainer, Segment
from sapo.segments import cut_at_end, splice

LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-5


@dataclass
class Differences:
    losses: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class _RecordedPicks:
    """Stands for the random generator of a draw: uniforms that select the recorded places."""

    def __init__(self, probabilities: list[float], places: list[int]) -> None:
        self._uniforms = iter([sum(probabilities[:place]) + probabilities[place] / 2 for place in places])

    def random(self) -> float:
        return next(self._uniforms)


class _RecordedSelfPlay:
    """The pair source of the replay: the trainer's buffer and splice with the recorded outcomes."""

    def __init__(self, trainer: ReplayTrainer, micro_batches: list[dict]) -> None:
        self._trainer = trainer
        self._micro_batches = micro_batches
        self._next = 0
        self._order: list[int] = []
        self.buffer = trainer.source.buffer

    def pairs(self, examples, *, epoch, step, micro_batch):
        recorded = self._micro_batches[self._next]
        self._next += 1
        assert recorded["global_step"] == step, f"trace is at step {recorded['global_step']}, the trainer at {step}"
        self._trainer.compare_weights(recorded)
        rows = zip(
            recorded["real_input_ids"],
            recorded["prompt_length"],
            recorded["truncate_at"],
            recorded["actual_token_generate_length"],
            recorded["generation_input_ids"],
            recorded["model_output_rows"],
            recorded["generated_input_ids"],
            strict=True,
        )
        for row, (real, prompt_length, start, length, context, output, generated) in enumerate(rows):
            prompt, response = real[:prompt_length], real[prompt_length:]
            segment = Segment(start, min(start + length, len(response)))
            end_ids = self._trainer.end_ids
            written = cut_at_end(output[len(context) :][: len(segment)], end_ids)
            rejected = splice(response, segment, written, eos_ids=end_ids)
            assert [*prompt, *rejected] == generated, "the spliced response differs from the recorded one"
            self.buffer.add(
                Pair(
                    row,
                    0,
                    tuple(prompt),
                    tuple(response),
                    tuple(rejected),
                    segment,
                    Segment(start, start + len(written)),
                ),
                step,
            )
            self._order.append(len(self._order))
        held = self._order[-len(self.buffer) :]
        assert held == recorded["buffer_insertion_numbers"], "the buffer holds other pairs than recorded"
        probabilities = self.buffer.probabilities()
        for ours, theirs in zip(probabilities, recorded["sampling_probabilities"], strict=True):
            assert abs(ours - theirs) < 1e-12, "the buffer would draw with other probabilities than recorded"
        places = [held.index(number) for number in recorded["picked_insertion_numbers"]]
        self._trainer.expected_loss = recorded["loss"]
        return self.buffer.draw(len(places), _RecordedPicks(probabilities, places))


class ReplayTrainer(SAPOTrainer):
    """The real trainer, which notes how far it is from the record."""

    expected_loss = 0.0
    differences: Differences

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.differences.losses.append(abs(loss.item() - self.expected_loss))
        return loss

    def compare_weights(self, recorded: dict) -> None:
        if "policy_before_step" in recorded:
            self._compare(recorded["policy_before_step"], dict(self.policy().named_parameters()))
        if "ema" in recorded:
            self._compare(recorded["ema"], self.opponent.tensors())

    def _compare(self, expected: dict, weights: dict) -> None:
        for name, summary in expected.items():
            weight = weights[name].detach().double()
            ours = [weight.norm().item(), weight.sum().item(), *weight.flatten()[:3].tolist()]
            theirs = [summary["l2"], summary["sum"], *summary["head"]]
            self.differences.weights += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]

    def compare_end(self, expected: dict) -> None:
        if "policy_after_last_step" in expected:
            self._compare(expected["policy_after_last_step"], dict(self.policy().named_parameters()))


def replay(trace: dict, model_folder: Path) -> Differences:
    """Run the trace; differences of every loss and of every weight summary."""
    hyper, expected = trace["inputs"]["hyper"], trace["expected"]
    objective = trace["inputs"]["mode"]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    with tempfile.TemporaryDirectory() as folder:
        args = SAPOConfig(
            output_dir=folder,
            objective=objective,
            loss_type=hyper.get("loss_type", "sigmoid"),
            nll_positions="all" if objective == "orpo" else "response",
            beta=hyper["beta"],
            per_device_train_batch_size=hyper["per_device_train_batch_size"],
            gradient_accumulation_steps=hyper["gradient_accumulation_steps"],
            max_steps=hyper["max_steps"],
            learning_rate=hyper["learning_rate"],
            optim=hyper["optim"],
            lr_scheduler_type=hyper["lr_scheduler_type"],
            warmup_steps=hyper.get("warmup_steps", 0),
            weight_decay=hyper.get("weight_decay", 0.0),
            max_grad_norm=hyper["max_grad_norm"],
            max_length=hyper["max_length"],
            max_prompt_length=hyper["max_prompt_length"],
            segment_length=hyper["token_generate_length"],
            ema_decay=hyper["ema_beta"],
            replay_buffer_size=hyper["max_replay_buffer_size"],
            seed=hyper["seed"],
            skip_identical=False,
            chosen_probe_size=0,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
        )
        rows = [{"prompt": row["prompt"], "completion": " " + row["real"]} for row in hyper["rows"]]
        trainer = ReplayTrainer(model, args, rows, processing_class=tokenizer)
        trainer.differences = Differences()
        trainer.source = _RecordedSelfPlay(trainer, expected["micro_batches"])
        trainer.train()
        trainer.compare_end(expected)
    return trainer.differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    differences = replay(json.loads(options.trace.read_text()), options.model)
    loss, weight = max(differences.losses), max(differences.weights, default=0.0)
    print(f"{len(differences.losses)} micro-batches; largest loss difference {loss:.2e} (at most {LOSS_TOLERANCE:.0e})")
    print(f"{len(differences.weights)} weight figures; largest difference {weight:.2e}")
    return 0 if loss <= LOSS_TOLERANCE and weight <= WEIGHT_TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())

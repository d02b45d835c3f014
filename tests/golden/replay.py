"""Replay a recorded run of the published implementation on the real trainer.

    python -m tests.golden.replay TRACE.json --model DIR

Every random outcome of the trace is injected through the seams (examples, segments, generated tokens, picks); all
else is the trainer's own: splice, buffer, layout, reference, loss, optimizer, moving average. Prints the largest
difference of the losses (1e-5 at most) and of the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo import SAPOConfig, SAPOTrainer, Segment
from sapo.data.encoding import eos_token_ids
from sapo.data.examples import Example, Turn
from sapo.preference.replay_buffer import ReplayBuffer
from sapo.preference.self_play import SelfPlay, SelfPlaySettings

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


class _RecordedBuffer(ReplayBuffer):
    """The real buffer, whose draw is compared with the record and led to the recorded picks."""

    added = 0
    recorded: dict

    def add(self, item, step):
        super().add(item, step)
        self.added += 1

    def draw(self, count, rng):
        held = list(range(self.added - len(self), self.added))
        assert held == self.recorded["buffer_insertion_numbers"], "the buffer holds other pairs than recorded"
        probabilities = self.probabilities()
        for ours, theirs in zip(probabilities, self.recorded["sampling_probabilities"], strict=True):
            assert abs(ours - theirs) < 1e-12, "the buffer would draw with other probabilities than recorded"
        numbers = self.recorded["picked_insertion_numbers"]
        assert count == len(numbers)
        places = [held.index(number) for number in numbers]
        drawn = super().draw(count, _RecordedPicks(probabilities, places))
        assert drawn == [self.entries()[place].item for place in places]
        return drawn


class _RecordedSelfPlay(SelfPlay):
    """The real self-play with the recorded examples and segments; it is its own generator."""

    trainer: ReplayTrainer

    def __init__(self, args: SAPOConfig, eos_ids: frozenset[int], micro_batches: list[dict]) -> None:
        super().__init__(
            self,
            _RecordedBuffer(args.replay_buffer_size, draw=args.replay_draw, replacement=args.replay_replacement),
            SelfPlaySettings(**{name: getattr(args, name) for name in SelfPlaySettings.__slots__}),
            eos_ids=eos_ids,
            seed=args.seed,
            batch_size=args.per_device_train_batch_size,
        )
        self._micro_batches = iter(micro_batches)
        self._recorded: dict = {}

    def pairs(self, examples, *, epoch, step, micro_batch):
        recorded = self._recorded = self.buffer.recorded = next(self._micro_batches)
        assert recorded["global_step"] == step, f"trace is at step {recorded['global_step']}, the trainer at {step}"
        self.trainer.compare_weights(recorded)
        self.trainer.expected_loss = recorded["loss"]
        examples = [
            Example(row, (Turn(0, tuple(real[:length]), tuple(real[length:])),))
            for row, (real, length) in enumerate(
                zip(recorded["real_input_ids"], recorded["prompt_length"], strict=True)
            )
        ]
        return super().pairs(examples, epoch=epoch, step=step, micro_batch=micro_batch)

    def prefetch(self, pending, step, *, due=False):
        # The record names its examples one micro-batch at a time, when that is due.
        if due:
            super().prefetch(pending, step, due=True)

    def _drafts(self, example, epoch):
        (draft,) = super()._drafts(example, epoch)
        start = self._recorded["truncate_at"][example.row]
        length = self._recorded["actual_token_generate_length"][example.row]
        return [replace(draft, segment=Segment(start, min(start + length, len(draft.turn.response_ids))))]

    def generate(self, contexts, max_new_tokens, seeds):
        record, written = self._recorded, []
        for context, prepared, mask, output, most in zip(
            contexts,
            record["generation_input_ids"],
            record["generation_attention_mask"],
            record["model_output_rows"],
            max_new_tokens,
            strict=True,
        ):
            seen = [token for token, kept in zip(prepared, mask, strict=True) if kept]
            assert list(context) == seen, "the opponent is given another context than recorded"
            written.append(output[len(prepared) :][:most])
        return written

    def _pair(self, draft, written):
        pair = super()._pair(draft, written)
        generated = self._recorded["generated_input_ids"][draft.row]
        assert [*pair.prompt_ids, *pair.rejected_ids] == generated, "the spliced response differs from the recorded one"
        return pair


class ReplayTrainer(SAPOTrainer):
    """The real trainer, which notes how far it is from the record."""

    expected_loss = 0.0
    differences: Differences

    def training_step(self, *args, **kwargs):
        # A micro-batch may take several passes; each one's loss is its share of the whole.
        self._lost = 0.0
        done = super().training_step(*args, **kwargs)
        self.differences.losses.append(abs(self._lost - self.expected_loss))
        return done

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._lost += loss.item()
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
            report_pairs=0,
            output_dir=folder,
            objective=objective,
            loss_type=hyper.get("loss_type", "sigmoid"),
            nll_scope="all" if objective == "orpo" else "response",
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
        # The source ignores them; enough for one epoch, since Trainer cuts an accumulation short where one ends.
        rows *= len(expected["micro_batches"])
        eos_ids = eos_token_ids(tokenizer, model.generation_config.eos_token_id)
        source = _RecordedSelfPlay(args, eos_ids, expected["micro_batches"])
        trainer = source.trainer = ReplayTrainer(model, args, rows, processing_class=tokenizer, source=source)
        trainer.differences = Differences()
        trainer.train()
        made, recorded = len(trainer.differences.losses), len(expected["micro_batches"])
        assert made == recorded, f"{made} of {recorded} recorded micro-batches were replayed"
        trainer.compare_end(expected)
    # max() passes over NaN.
    assert all(map(math.isfinite, trainer.differences.losses + trainer.differences.weights)), "not a finite difference"
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

"""`sapo demo --chat`: the full method on a real chat model, which learns the house style of a made-up shop."""

from __future__ import annotations

import json
import logging as standard_logging
import shlex
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from peft import LoraConfig
from rich.console import Console
from rich.text import Text
from torch import nn

from sapo.config import SAPOConfig
from sapo.data.encoding import eos_token_ids
from sapo.demo.chat_model import NAME, make_chat_model
from sapo.demo.house_style import RULES, HelpDeskRow, heldout_rows, training_rows
from sapo.demo.run import COMMON
from sapo.demo.style_score import Replies, StyleScorer
from sapo.generation.sampling import Sampling
from sapo.measures.intervals import Estimate
from sapo.runs.files import write_atomically
from sapo.runs.user_cache import user_cache
from sapo.text.escape import visible
from sapo.text.numbers import duration_text
from sapo.text.terminal import print_table, say
from sapo.training.progress import TerminalProgress, showing
from sapo.training.trainer import SAPOTrainer
from sapo.weights.description import load_tokenizer
from sapo.weights.loading import load_frozen
from sapo.weights.policy import padding_token_id

STEPS: Final = 60
HELDOUT: Final = 40
RESULTS_FILE: Final = "results.json"
START: Final = "start"

ARMS: Final[dict[str, dict[str, Any]]] = {
    "SAPO": {
        "objective": "orpo",
        "beta": 0.1,
        "segment_length": 0.5,
        "steps_per_generation": 4,
        "skip_identical": False,
    },
    "continued SFT": {"objective": "sft"},
}
"""What differs between the runs; rows, steps, batch and learning rate are the same."""

SHOWN: Final = 2
"""Held-out questions whose replies are shown side by side, besides one general prompt."""
_GENERAL: Final = "What is the capital of France?"


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one model.

    Attributes:
        greedy: replies to the held-out questions, greedy.
        sampled: the same, sampled with the temperature of training.
        divergence: KL(start || model) on the start's replies to general prompts, nats per token; None for the start.
        seconds: wall time of its training; 0 for the start.
    """

    greedy: Replies
    sampled: Replies
    divergence: Estimate | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Shown:
    """One question and a reply of each model by name."""

    question: str
    replies: dict[str, str]


def run_chat_demo(
    *, output_dir: str = "runs/demo-chat", max_steps: int = STEPS, seed: int = 0, model_name_or_path: str | None = None
) -> None:
    """Train SAPO and continued SFT on the shop's conversations, measure both, and print what was measured.

    Args:
        output_dir: folder of the runs, which are replaced.
        max_steps: optimizer steps of each run.
        seed: seed of each run.
        model_name_or_path: chat model to start from; by default SmolLM2-135M-Instruct, made on the first call.

    Raises:
        ModelError, TokenizerError: the model cannot be made or read.
    """
    standard_logging.getLogger("peft").setLevel(standard_logging.ERROR)
    console = Console(highlight=False)
    started = time.perf_counter()
    if model_name_or_path is None:
        folder = user_cache(NAME)
        make_chat_model(folder, console)
        model_name_or_path = str(folder)
    tokenizer = load_tokenizer(model_name_or_path)
    rows, heldout = training_rows(), heldout_rows(HELDOUT)
    start = load_frozen(model_name_or_path, dtype="float32", device="cpu")
    eos_ids = eos_token_ids(tokenizer, start.generation_config.eos_token_id)
    say(
        console,
        f"{model_name_or_path}: {start.num_parameters() / 1e6:.0f} million parameters. {len(rows)} conversations of a "
        f"help desk, {len(heldout)} held-out questions.",
    )
    questions = [*(row.question for row in heldout[:SHOWN]), _GENERAL]
    with console.status("Measuring the start"):
        padding = padding_token_id(tokenizer, eos_ids)
        scorer = StyleScorer(partial(_fixed, start), tokenizer, eos_ids=eos_ids, pad_token_id=padding, rows=heldout)
        results = {START: _measured(scorer, start)}
        said = {START: scorer.answers(partial(_fixed, start), questions)}
    del start
    for name, settings in ARMS.items():
        console.rule(name)
        args = _arguments(Path(output_dir) / _folder_name(name), max_steps, seed, settings)
        trainer = _trained(model_name_or_path, args, rows, tokenizer, console)
        with console.status(f"Measuring {name}"):
            seconds = sum(line.get("train_runtime", 0.0) for line in trainer.state.log_history)
            results[name] = _measured(scorer, trainer.policy(), seconds=seconds)
            if trainer.opponent is not None:
                said["opponent"] = scorer.answers(trainer.opponent.using, questions)
                said["policy"] = scorer.answers(partial(_fixed, trainer.policy()), questions)
        del trainer
    shown = [
        Shown(question, {who: texts[place] for who, texts in said.items()}) for place, question in enumerate(questions)
    ]
    _write_results(Path(output_dir), results, shown)
    count = len(heldout)
    print_table(console, f"Replies in house style to {count} held-out questions, with intervals", _style_rows(results))
    print_table(console, "Share of greedy replies that keep each rule", _rule_rows(results))
    for one in shown:
        console.print(_side_by_side(one), soft_wrap=not console.is_terminal)
    say(console, reading(results), f"{duration_text(time.perf_counter() - started)} in all. Runs: {output_dir}")
    run = shlex.quote(str(Path(output_dir) / _folder_name("SAPO")))
    say(console, "Next:", f"sapo report {run} --serve --port 0", f"sapo chat {run}", f"sapo export {run} OUT")


def _folder_name(arm: str) -> str:
    return arm.lower().replace(" ", "-")


def _fixed(model: nn.Module) -> AbstractContextManager[nn.Module]:
    return nullcontext(model)


def _arguments(folder: Path, max_steps: int, seed: int, settings: dict[str, Any]) -> SAPOConfig:
    return SAPOConfig(
        output_dir=str(folder),
        max_steps=max_steps,
        seed=seed,
        per_device_train_batch_size=4,
        warmup_steps=0.1,
        max_length=512,
        logging_steps=5,
        logging_first_step=True,
        report_pairs=12,
        chosen_probe_size=0,
        dataloader_pin_memory=False,
        **COMMON,
        **settings,
    )


def _trained(model: str, args: SAPOConfig, rows: list[HelpDeskRow], tokenizer: Any, console: Console) -> SAPOTrainer:
    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SAPOTrainer(model, args, [row.as_row() for row in rows], processing_class=tokenizer, peft_config=adapter)
    progress = TerminalProgress(console, tokenizer, trainer.last_pairs, log_pairs_steps=0, pairs=0)
    with showing(progress, trainer):
        trainer.train()
    trainer.save_model()
    return trainer


def _measured(scorer: StyleScorer, model: nn.Module, *, seconds: float | None = None) -> Measured:
    """Measure a model; without `seconds` it is the start, which is its own measure."""
    context = partial(_fixed, model)
    greedy, sampled = (
        scorer.replies(context, temperature=temperature) for temperature in (0.0, Sampling().temperature)
    )
    if seconds is None:
        return Measured(greedy, sampled, None, 0.0)
    return Measured(greedy, sampled, scorer.divergence(context), seconds)


def reading(results: dict[str, Measured]) -> str:
    """What the figures say, in words; differences count when their intervals do not overlap."""
    start, sapo, sft = results[START], results["SAPO"], results["continued SFT"]
    parts = [
        f"SAPO moved the share of sampled replies in style from {_share(start.sampled)} to {_share(sapo.sampled)}, "
        f"continued SFT to {_share(sft.sampled)}"
    ]
    (low, high), (sft_low, sft_high) = sapo.sampled.interval, sft.sampled.interval
    if low > sft_high or sft_low > high:
        parts.append(f": SAPO is {'above' if low > sft_high else 'below'} continued SFT.")
    else:
        parts.append(": the two are not distinguishable (their intervals overlap).")
    if sft.seconds:
        parts.append(f" SAPO took {sapo.seconds / sft.seconds:.1f} times as long.")
    near, far = sapo.divergence, sft.divergence
    if near is not None and far is not None:
        parts.append(
            f" On general prompts, which neither was trained on, SAPO is {near.value:.3f} nats a token away from the "
            f"start, continued SFT {far.value:.3f}: what a model forgets grows with this distance."
        )
    parts.append(" One seed, one small model, one style.")
    return "".join(parts)


def _share(replies: Replies) -> str:
    return f"{replies.in_style / len(replies.texts):.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _style_rows(results: dict[str, Measured]) -> list[list[str]]:
    rows = [["model", "greedy", "95%", "sampled", "95%", "moved, nats/token", "95%", "trained in"]]
    for name, one in results.items():
        moved = one.divergence
        rows.append(
            [
                name,
                _share(one.greedy),
                _interval(*one.greedy.interval),
                _share(one.sampled),
                _interval(*one.sampled.interval),
                "" if moved is None else f"{moved.value:.3f}",
                "" if moved is None else _interval(moved.low, moved.high),
                duration_text(one.seconds) if one.seconds else "",
            ]
        )
    return rows


def _rule_rows(results: dict[str, Measured]) -> list[list[str]]:
    kept = [[name, *(f"{share:.2f}" for share in one.greedy.kept().values())] for name, one in results.items()]
    return [["model", *RULES], *kept]


def _side_by_side(shown: Shown) -> Text:
    text = Text("\n")
    for who, said in (("question", shown.question), *shown.replies.items()):
        text.append(f"{who}> ", style="bold")
        # A reply ends where the next begins: its own line breaks stay visible, what could move a cursor does not.
        text.append("\n".join(visible(line) for line in said.splitlines()) + "\n")
    return text


def _write_results(folder: Path, results: dict[str, Measured], shown: list[Shown]) -> None:
    stored = {
        name: {
            "greedy": {"in_style": one.greedy.in_style, "of": len(one.greedy.texts), "kept": one.greedy.kept()},
            "sampled": {"in_style": one.sampled.in_style, "of": len(one.sampled.texts), "kept": one.sampled.kept()},
            "divergence": None if one.divergence is None else one.divergence.as_dict(),
            "seconds": one.seconds,
            "replies": one.greedy.texts,
        }
        for name, one in results.items()
    }
    text = json.dumps({"models": stored, "shown": [asdict(one) for one in shown]}, indent=1, ensure_ascii=False)
    write_atomically(folder / RESULTS_FILE, text + "\n")

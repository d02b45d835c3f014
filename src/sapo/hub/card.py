"""The model card of a run, in the hub's format: what it is, what it was made of, how it went, how to use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from sapo.report.summary import sentences, warnings
from sapo.report.svg import curves_svg
from sapo.runs.evaluations import read_evaluations
from sapo.runs.files import read_object, write_atomically
from sapo.runs.layout import CARD_FILE, CURVES_FILE
from sapo.runs.metrics import EVAL, compared_metrics, find_metric
from sapo.runs.reading import Run, read_run
from sapo.text.numbers import error_text, number_text

_PRIVATE = ("output_dir", "logging_dir", "hub_token")
_CITATION = """@article{yin2024selfaugmented,
  title = {Self-Augmented Preference Optimization: Off-Policy Paradigms for Language Model Alignment},
  author = {Yin, Yueqin and Wang, Zhendong and Xie, Yujia and Chen, Weizhu and Zhou, Mingyuan},
  journal = {arXiv preprint arXiv:2405.20830},
  year = {2024}
}"""


def write_card(folder: Path, name: str) -> None:
    """Write README.md and curves.svg into the folder of a run that has ended; `name` is what a model is loaded by."""
    run = read_run(folder)
    picture = bool(run.train)
    if picture:
        write_atomically(folder / CURVES_FILE, curves_svg(run))
    write_atomically(folder / CARD_FILE, card(run, name, picture=picture))


def card(run: Run, name: str, *, picture: bool) -> str:
    """The text of the card; `picture` is whether curves.svg lies beside it. See `write_card`."""
    recipe = _recipe(run)
    base = str(recipe.get("model_name_or_path") or run.facts.get("model") or "unknown")
    data = _data(recipe)
    adapter = bool(run.facts.get("adapter"))
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": _tags(run, adapter=adapter),
    }
    if not _is_local(base):
        front |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    if (license := _license(base)) is not None:
        front["license"] = license
    hub_data = [one for one in data if not _is_local(one)]
    if hub_data:
        front["datasets"] = hub_data
    shown = {key: _short(value) for key, value in recipe.items() if key not in _PRIVATE}
    rows = run.facts.get("training_rows")
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---",
        f"# {name.split('/')[-1]}",
        f"`{_short(base)}` aligned by Self-Augmented Preference Optimization "
        f"([arXiv 2405.20830](https://arxiv.org/abs/2405.20830)). {_source(run)}",
        "## Use",
        f"```python\n{_example(run, name, adapter=adapter)}\n```",
        "## Data",
        f"{', '.join(f'`{_short(one)}`' for one in data) or 'Not recorded'}{f': {rows:,} rows' if rows else ''}.",
        "## How the training went",
        " ".join([*sentences(run), *_loaded(run)]).replace(base, str(_short(base))),
    ]
    found = warnings(run)
    if found:
        sections.append("\n".join(f"- **{warn.title}.** {warn.text}" for warn in found))
    if picture:
        sections.append(f"![Training curves]({CURVES_FILE})")
    table = _evaluation(run)
    if table:
        sections += ["## Evaluation", table]
    sections += [
        "## Options that differ from the defaults",
        f"```yaml\n{yaml.safe_dump(shown, sort_keys=True, allow_unicode=True)}```",
        ", ".join(f"{name} {version}" for name, version in run.facts.get("packages", {}).items()),
        "## Citation",
        f"```bibtex\n{_CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _tags(run: Run, *, adapter: bool) -> list[str]:
    objective = run.config.get("objective")
    return ["sapo", "trl", *([str(objective)] if objective else []), *(["lora"] if adapter else [])]


def _license(base: str) -> str | None:
    """The license in the card of the base model, if that lies on this machine."""
    found = base if Path(base).is_dir() else None
    if found is None and not _is_local(base):
        cached = try_to_load_from_cache(base, CARD_FILE)
        found = str(Path(cached).parent) if isinstance(cached, str) else None
    file = Path(found) / CARD_FILE if found is not None else None
    if file is None or not file.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    line = re.search(r"^license: *([\w.-]+) *$", front[1], re.MULTILINE) if front is not None else None
    return line[1] if line is not None else None


def _example(run: Run, name: str, *, adapter: bool) -> str:
    """A program that answers a question, through the chat template if the model has one."""
    load, package = ("AutoPeftModelForCausalLM", "peft") if adapter else ("AutoModelForCausalLM", "transformers")
    config = run.path / "tokenizer_config.json"
    chat = (run.path / "chat_template.jinja").is_file() or (config.is_file() and "chat_template" in read_object(config))
    question = "Why is the sky blue?"
    asked = (
        f'messages = [{{"role": "user", "content": "{question}"}}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")"
        if chat
        else f'inputs = tokenizer("{question}", return_tensors="pt")'
    )
    imports = sorted([f"from {package} import {load}", "from transformers import AutoTokenizer"])
    if not adapter:
        imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    return "\n".join(
        [
            *imports,
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = {load}.from_pretrained("{name}")',
            asked,
            "output = model.generate(**inputs, max_new_tokens=128)",
            'prompt_length = inputs["input_ids"].shape[1]',
            "print(tokenizer.decode(output[0][prompt_length:], skip_special_tokens=True))",
        ]
    )


def _recipe(run: Run) -> dict[str, Any]:
    return run.recipe or {option.name: option.value for option in run.options() if option.differs}


def _data(recipe: dict[str, Any]) -> list[str]:
    members = recipe.get("datasets") or []
    return [str(member["path"]) for member in members] or [str(recipe[k]) for k in ("dataset_name",) if k in recipe]


def _source(run: Run) -> str:
    if run.config.get("pair_source") == "paired":
        return "It was trained on a preference dataset."
    return "A moving average of the model itself generated the rejected responses; no preference data was used."


def _loaded(run: Run) -> list[str]:
    step = run.facts.get("loaded_step")
    if step is None:
        return []
    metric = run.config.get("metric_for_best_model") or "loss"
    return [f"The models are those of step {step}, the best by {metric} of the evaluations of the run."]


def _is_local(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1


def _short(value: Any) -> Any:
    """A path of this machine without its folders."""
    if isinstance(value, str) and "/" in value and _is_local(value):
        return Path(value).name
    if isinstance(value, list):
        return [_short(one) for one in value]
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    return value


def _evaluation(run: Run) -> str:
    """Results of `sapo evaluate` in the run folder, and the last evaluation of the training."""
    rows: list[tuple[str, str, str]] = []
    for one in read_evaluations(run.path):
        rows += [
            (f"{one.suite}: {name}", str(_short(one.model)), _value(found)) for name, found in one.measures.items()
        ]
    compared = compared_metrics()
    for name in run.metrics():
        # Of the metrics that are declared not all are results; others are the local measures.
        is_result = name.startswith(EVAL) and (name in compared or find_metric(name) is None)
        if is_result and (last := run.last(name)) is not None:
            rows.append((f"fixed pairs of the training: {name.removeprefix(EVAL)}", "policy", number_text(last, 4)))
    if not rows:
        return ""
    return "\n".join(
        ["| measure | model | value |", "| --- | --- | --- |", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    )


def _value(estimate: dict[str, Any]) -> str:
    return error_text(estimate["value"], estimate.get("stderr"))

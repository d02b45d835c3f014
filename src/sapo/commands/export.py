"""`sapo export RUN OUT`: a run's model as a folder that every other tool takes, as GGUF, and for Ollama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from sapo.commands.inputs import quiet_libraries
from sapo.commands.parser import Parsed
from sapo.hub.export import Exported, export_model, find_origin, new_folder
from sapo.hub.gguf import Tools, check, convert, find_tools
from sapo.hub.ollama import modelfile
from sapo.runs.files import write_atomically
from sapo.text.interrupts import undone_at_signals
from sapo.text.numbers import bytes_text
from sapo.text.terminal import say
from sapo.weights.description import load_generation_config

MODELFILE = "Modelfile"


def run_export(given: Parsed) -> None:
    """Export a model and print what was made, what the check found, and how to use it.

    Raises:
        SapoError: what is missing or does not agree; nothing is left of the export then.
    """
    own = given.own
    out: Path = own.out
    quiet_libraries()
    tools = None if own.gguf is None else find_tools(own.gguf, own.llama_cpp, out)
    origin = find_origin(own.target, own.which, own.revision)
    lines: list[str] = []
    with undone_at_signals(), new_folder(out, overwrite=own.overwrite) as staging:
        exported = export_model(origin, staging, dtype=own.dtype, device=own.device)
        lines += _described(exported, origin.note, out)
        file = None
        if own.gguf is not None and tools is not None:
            file = staging / f"{out.absolute().name}-{own.gguf}.gguf"
            lines.append(_convert(exported, file, own.gguf, tools, out))
        if own.ollama:
            lines.append(_write_modelfile(exported, staging, file, out))
    say(Console(), *lines, "", *_uses(out, None if file is None else out / file.name, ollama=own.ollama))


def _described(exported: Exported, note: str, out: Path) -> list[str]:
    size = sum(file.stat().st_size for file in exported.folder.glob("*.safetensors"))
    dtype = str(exported.dtype).removeprefix("torch.")
    lines = [f"{out}: {exported.what}; {dtype}, {bytes_text(size)}."]
    if note:
        lines.append(note)
    if exported.repaired is not None:
        lines.append(f"Generation configuration: {exported.repaired}")
    return [*lines, f"Check: {exported.agreement.line()}."]


def _convert(exported: Exported, file: Path, kind: str, tools: Tools, out: Path) -> str:
    convert(exported.folder, file, kind, tools)
    found = check(file, kind, exported.replies, exported.tokenizer, exported.eos_ids)
    return f"{out / file.name}: {bytes_text(file.stat().st_size)}. Read again by transformers: {found.line()}."


def _write_modelfile(exported: Exported, folder: Path, file: Path | None, out: Path) -> str:
    generation: Any = load_generation_config(str(folder))
    weights = "." if file is None else f"./{file.name}"
    text, converted = modelfile(weights, exported.tokenizer, generation, exported.eos_ids)
    write_atomically(folder / MODELFILE, text)
    what = "the chat template converted and compared" if converted else "no template: this one has no simple form there"
    return f"{out / MODELFILE}: {what}."


def _uses(out: Path, file: Path | None, *, ollama: bool) -> list[str]:
    lines = [f"Serve:     vllm serve {out}"]
    if file is not None:
        lines.append(f"llama.cpp: llama-cli -m {file}")
    if ollama:
        lines.append(f"Ollama:    ollama create {out.absolute().name.lower()} -f {out / MODELFILE}")
    loaded = f'pipe = pipeline("text-generation", model="{out}")'
    return [*lines, "In Python:", "from transformers import pipeline", loaded]

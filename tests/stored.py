"""Changes to model folders on disk, and what names them."""

import json

from safetensors.torch import load_file, save_file
from trl import ModelConfig


def change(file, **changes):
    """Set values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def reweigh(file, change):
    """Replace the weights in a file of safetensors by what `change` makes of them."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def named(folder, **options):
    """The options that name a model."""
    return ModelConfig(model_name_or_path=str(folder), **options)

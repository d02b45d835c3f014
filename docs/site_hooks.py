"""Pages of the site that are made from elsewhere.

The configuration reference comes from the help texts of SAPOConfig, and the files at the root of the repository that
pages link to stand beside the pages.
"""

import dataclasses
import inspect
import re
from pathlib import Path

from mkdocs.structure.files import File

from sapo import SAPOConfig

ROOT = Path(__file__).parents[1]
AT_ROOT = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]

INTRODUCTION = """# Configuration

Every option of `sapo train` that is this project's own, with its default. They are fields of `SAPOConfig`, flags of the
command line and lines of a recipe under the same name. Options of
[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments)
work too, as do trl's for the model (`model_name_or_path`, `dtype`, `use_peft`, `lora_r`, `load_in_4bit`, ...) and the
data (`dataset_name`, `dataset_config`, `dataset_train_split`, `datasets`, ...): `sapo train --help` lists all.
"""


def configuration_page() -> str:
    """The page: a table for each section of the class, in its order."""
    fields = {field.name: field for field in dataclasses.fields(SAPOConfig)}
    parts, table = [INTRODUCTION], []
    for line in inspect.getsource(SAPOConfig).splitlines():
        section = re.match(r"    # (.+?)\.?$", line)
        option = re.match(r"    (\w+): .*= (?:_option|field)\(", line)
        if section and not table:
            title = section[1]
        if section and table:
            parts.append(_section(title, table))
            title, table = section[1], []
        elif option:
            field = fields[option[1]]
            text = str(field.metadata["help"]).replace("%%", "%").replace("|", "\\|")
            default = "unset" if field.default is None else str(field.default)
            default = default.lower() if isinstance(field.default, bool) else default
            table.append(f"| `{field.name}` | `{default}` | {text} |")
    parts.append(_section(title, table))
    return "\n".join(parts)


def _section(title: str, table: list[str]) -> str:
    return "\n".join([f"## {title}", "", "| option | default | |", "| --- | --- | --- |", *table, ""])


def on_files(files, config):  # noqa: ANN001, ANN201
    """Add the pages to the site."""
    files.append(File.generated(config, "configuration.md", content=configuration_page()))
    for name in AT_ROOT:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):  # noqa: ANN001, ANN201
    """On the site, what lies at the root of the repository lies beside the pages."""
    for name in AT_ROOT:
        markdown = markdown.replace(f"](../{name}", f"]({name}").replace("](docs/", "](")
    return markdown

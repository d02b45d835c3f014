"""Pages of the site that are made from elsewhere.

The configuration reference comes from the declarations of the options, and the files at the root of the repository that
pages link to stand beside the pages.
"""

from pathlib import Path

from mkdocs.structure.files import File

from sapo.options import Option, accepted, options, sections

ROOT = Path(__file__).parents[1]
AT_ROOT = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]

INTRODUCTION = """# Configuration

Every option of `sapo train`: a flag of the command line and a line of a recipe under the same name, and a field of
`SAPOConfig` unless it is marked *(model)* or *(data)*. `sapo train --help NAME` shows the same on the
terminal.

Each option has an address, such as `configuration/#beta`. An option marked *free* may change when a run is resumed; all
others must stay as they were. Options of `transformers.TrainingArguments` that have no meaning here are refused; the
last table says why.
"""


def configuration_page() -> str:
    """The page: a table for each section, and one of what is refused."""
    parts = [INTRODUCTION]
    for section, members in sections(accepted()).items():
        rows = ["| option | default | resume | meaning |", "| --- | --- | --- | --- |", *map(_row, members)]
        parts.append(
            "\n".join([f"## {section}", "", '<div class="stacked options" markdown>', "", *rows, "", "</div>", ""])
        )
    refused = [f"| {_anchored(one.name)} | {_cell(one.reason)} |" for one in options() if one.status == "refused"]
    parts.append("\n".join(["## Refused", "", "| option | why, and what to do |", "| --- | --- |", *refused, ""]))
    return "\n".join(parts)


def _row(one: Option) -> str:
    text = one.help
    if one.choices:
        text += f" One of {', '.join(one.choices)}."
    elif one.range:
        text += f" {one.range[:1].upper()}{one.range[1:]}."
    if one.needs:
        text += f" Needs {one.needs}."
    resume = "one start" if one.one_start else "free" if one.resume == "free" else "fixed"
    kept = f"{resume} ({one.kind})" if one.kind in ("model", "data") else resume
    default = f"`{one.default_text}`" if one.default_text else ""
    return f"| {_anchored(one.name)} | {default} | {kept} | {_cell(text)} |"


def _anchored(name: str) -> str:
    """An option's name as a place that pages can link to."""
    return f'<code id="{name}">{name}</code>'


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


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

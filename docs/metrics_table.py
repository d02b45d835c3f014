"""Write the table of docs/metrics.md again from the metrics' declarations: `python docs/metrics_table.py`."""

from pathlib import Path

from sapo.runs.metrics import documentation

PAGE = Path(__file__).with_name("metrics.md")


def with_table(page: str) -> str:
    """The page with the table as it should be, in place of the one that it has."""
    lines = page.splitlines()
    rows = [number for number, line in enumerate(lines) if line.startswith("|")]
    return "\n".join([*lines[: rows[0]], *documentation(), *lines[rows[-1] + 1 :]]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""The lowest version of each dependency that pyproject.toml allows, as constraints for pip: `python tests/lowest.py`.

`make test-versions` installs these, so that the ranges are stated in one place and are what was run.
"""

import re
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(text):
    """`name==version` of each `name>=version` in the list of dependencies (Python 3.10 has no reader of TOML)."""
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return [f"{name}=={version}" for name, version in re.findall(r'^\s*"([\w.-]+)>=([\w.]+)', listed, re.MULTILINE)]


if __name__ == "__main__":
    print("\n".join(lowest(PYPROJECT.read_text(encoding="utf-8"))))

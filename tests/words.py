"""Check texts against `words.tsv` (pattern, replacement): `python tests/words.py`; part of `make check`.

Lines in `words_allowed.txt` (file, tab, line) may keep their words. The list only shrinks: an entry that no longer
occurs is an error too, and `--write` writes what is left of it.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALLOWED = ROOT / "tests/words_allowed.txt"


def main() -> int:
    """Print every use of a listed word, and every entry of the allow-list without one; 1 if there are any."""
    words = [line.split("\t") for line in (ROOT / "tests/words.tsv").read_text().splitlines()]
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    files += [file for file in sorted((ROOT / "src/sapo").rglob("*")) if file.suffix in (".py", ".js", ".yaml")]
    found = {}
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            for pattern, instead in words:
                if hit := re.search(pattern, line, 0 if pattern.startswith("hub") else re.IGNORECASE):
                    name = str(file.relative_to(ROOT))
                    found[f"{name}\t{line.strip()}"] = f"{name}:{number}: {hit[0]!r}: say {instead}"
    allowed = set(ALLOWED.read_text().splitlines())
    if "--write" in sys.argv:
        ALLOWED.write_text("".join(f"{entry}\n" for entry in sorted(allowed & set(found))))
        return 0
    faults = [message for entry, message in found.items() if entry not in allowed]
    faults += [f"{ALLOWED.name}: remove, it no longer occurs: {entry}" for entry in sorted(allowed - set(found))]
    sys.stdout.write("".join(f"{fault}\n" for fault in faults))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

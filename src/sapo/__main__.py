"""`python -m sapo`."""

from __future__ import annotations

import sys

from sapo.commands.main import main

if __name__ == "__main__":
    sys.exit(main())

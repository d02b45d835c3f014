"""Benchmarks and a small model that some tests read, where they are there."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("SAPO_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no shared data at {DATA} (SAPO_TEST_DATA)")

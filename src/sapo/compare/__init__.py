"""`sapo compare`: runs side by side, from what they left in their folders; nothing is loaded or trained."""

from sapo.compare.command import run_compare
from sapo.compare.records import Cost, RunRecord, read_runs

__all__ = ["Cost", "RunRecord", "read_runs", "run_compare"]

"""How many trials: few in the default suite, all with `make test-faults`."""

import os

FULL = os.environ.get("SAPO_FAULT_TRIALS") == "full"


def trials(quick, full):
    return full if FULL else quick

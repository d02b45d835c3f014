"""How many trials: few in the default suite, all with `make test-faults`."""

import os

FULL = os.environ.get("SAPO_FAULT_TRIALS") == "full"


def trials(quick, full):
    return full if FULL else quick


def check_one_line(error):
    """What the command line would print: one line that a person can read."""
    assert "\n" not in str(error), error
    assert len(str(error)) < 1000, error

"""The versions that the contracts name are those that pyproject.toml and constraints.txt hold."""

import re

import pytest

from tests.contract import RUN_WITH
from tests.lowest import PYPROJECT, lowest

CONSTRAINTS = (PYPROJECT.parent / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUN_WITH)
def test_contracts_name_the_lowest_and_the_newest_version_they_were_run_with(name):
    low, new = RUN_WITH[name]
    assert f"{name}=={low}" in lowest(PYPROJECT.read_text(encoding="utf-8"))
    pinned = re.findall(rf"^{name}==(\S+?)(?:; python_version >= \"3.11\")?$", CONSTRAINTS, re.MULTILINE)
    assert pinned == [new]


def test_every_dependency_has_a_lowest_version():
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", PYPROJECT.read_text(encoding="utf-8"), re.M | re.S)
    assert len(lowest(PYPROJECT.read_text(encoding="utf-8"))) == len(listed.splitlines())

"""What is promised of Python's versions, and what the pinned packages allow."""

import re
from importlib import metadata

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROMISED = [f"3.{minor}" for minor in range(10, 15)]
OPTIONAL = {"highdicom"}  # for one flag, which says so where the package is missing


def pins():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def test_the_promised_pythons_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()  # the oldest promised Python has no reader of TOML
    wanted = SpecifierSet(re.search(r'^requires-python = "(.*)"$', text, re.MULTILINE)[1])
    assert [version for version in PROMISED if version in wanted] == PROMISED
    assert "3.9" not in wanted


@pytest.mark.parametrize("version", PROMISED)
def test_every_package_is_pinned_once_for_each_python(version):
    names = [pin.name for pin in pins() if pin.marker is None or pin.marker.evaluate({"python_version": version})]
    assert len(set(names)) == len(names)
    assert {pin.name for pin in pins()} - OPTIONAL == set(names) - OPTIONAL


@pytest.mark.parametrize("pin", [pin for pin in pins() if pin.marker is None or pin.marker.evaluate()], ids=str)
def test_a_pin_installs_on_each_python_that_it_is_for(pin):
    """Each distribution says which Pythons it takes; those installed here are the pinned ones."""
    assert metadata.version(pin.name).split("+")[0] in pin.specifier
    takes = SpecifierSet(metadata.metadata(pin.name).get("Requires-Python") or "")
    refused = [
        version for version in PROMISED
        if (pin.marker is None or pin.marker.evaluate({"python_version": version})) and version not in takes
    ]  # fmt: skip
    assert not refused, f"{pin} takes {takes}"

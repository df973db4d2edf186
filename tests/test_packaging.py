"""What pyproject.toml and constraints.txt promise is what the dependencies allow, and what these tests run with."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version


ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(text) for text in PROJECT["dependencies"]]
PINS = {
    requirement.name.lower().replace("_", "-"): requirement
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}


def oldest_python(requirement: str) -> Version:
    """The first minor version of Python 3 that a specifier allows."""
    return next(v for v in (Version(f"3.{minor}") for minor in range(50)) if v in SpecifierSet(requirement))


def test_the_oldest_python_is_one_that_all_dependencies_take():
    ours = oldest_python(PROJECT["requires-python"])
    theirs = {one.name: metadata.metadata(one.name)["Requires-Python"] or ">=3.0" for one in DEPENDENCIES}
    assert not {name for name, versions in theirs.items() if ours not in SpecifierSet(versions)}
    assert ours == max(map(oldest_python, theirs.values()))  # control: nor is it newer than they ask for
    listed = [re.fullmatch(r".*:: (3\.\d+)", line) for line in PROJECT["classifiers"]]
    assert min(Version(match[1]) for match in listed if match) == ours
    assert f"Python {ours} or newer" in (ROOT / "README.md").read_text()
    assert f"version_info < ({ours.major}, {ours.minor})" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("old", [False, True])
def test_make_says_which_python_it_needs(tmp_path, old):
    python = tmp_path / "python"  # an older one is a newer one that says it is old
    python.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; {"sys.version_info = (3, 9);" * old} exec(sys.argv[1])" "$2"\n'
    )
    python.chmod(0o755)
    (recipe,) = re.findall(r"^\t\t(\$\(PYTHON\) -c .*?) && \\$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    done = subprocess.run(recipe.replace("$(PYTHON)", str(python)), shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        (1, "Python 3.11 or newer is needed: make PYTHON=python3.12\n") if old else (0, "")
    )


def test_every_dependency_is_pinned_to_what_is_tested():
    assert str(PINS["torch"].specifier) == "==2.13.0"
    for dependency in DEPENDENCIES:
        (pin,) = PINS[dependency.name.lower().replace("_", "-")].specifier
        assert pin.operator == "==" and Version(pin.version) in dependency.specifier, dependency.name
    installed = {name: version for name in PINS for version in [installed_version(name)] if version}
    assert len(installed) > 20
    assert not {name: v for name, v in installed.items() if v not in PINS[name].specifier}


def installed_version(name: str) -> Version | None:
    """Without what a build adds to it, such as +cpu."""
    try:
        return Version(Version(metadata.version(name)).public)
    except metadata.PackageNotFoundError:
        return None

"""The layout: three links, and a mapping that says the same to an installer."""

import os
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("attacks", "benchmarks", "defenses")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_links_are_relative_and_right():
    for name in LINKS:
        link = ROOT / "advkit" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def test_every_package_is_in_the_list_of_packages(project):
    found = {"advkit"}
    for folder in (ROOT / "advkit", *(ROOT / name for name in LINKS)):
        for path in folder.rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT).parts
            if not set(parts[1:]) & set(LINKS):
                found.add(".".join(parts if parts[0] == "advkit" else ("advkit", *parts)))
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_the_mapping_sends_each_link_to_its_folder(project):
    mapping = project["tool"]["setuptools"]["package-dir"]
    assert mapping == {"advkit": "advkit", **{f"advkit.{name}": name for name in LINKS}}


def test_every_direct_dependency_is_pinned(project):
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().split()}
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *(name for extra in extras.values() for name in extra)]
    names = {name.split(">")[0].split("=")[0].split("[")[0] for name in wanted} - {"advkit"}
    assert names <= pinned


def test_the_top_level_is_what_it_should_be():
    tracked = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    files = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile"}
    built = {"build", "dist", "advkit.egg-info"}
    assert tracked - built == {"pyproject.toml", "constraints.txt", "advkit", "tests", "docs", *LINKS, *files}

"""pyproject.toml claims the versions of Python and PyTorch that tools/wheels.py has tested, and no others."""

import json
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TESTED = json.loads((ROOT / "benchmarks" / "results" / "tested-versions.json").read_text("utf-8"))["tested"]


def minor(version: str) -> tuple[int, int]:
    first, second = version.split(".")[:2]
    return int(first), int(second)


PYTHONS = {minor(one["python"]) for one in TESTED}
TORCHES = {minor(one["torch"]) for one in TESTED}


def test_every_tested_version_passed_tests():
    assert all(one["passed"] > 100 and one["tests"] for one in TESTED)


def test_the_classifiers_name_the_pythons_that_were_tested():
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", one) for one in PROJECT["classifiers"]]
    assert {minor(match[1]) for match in named if match} == PYTHONS
    oldest = SpecifierSet(PROJECT["requires-python"])
    assert f"3.{min(PYTHONS)[1]}" in oldest
    assert f"3.{min(PYTHONS)[1] - 1}" not in oldest


def test_the_dependency_allows_the_pytorch_versions_that_were_tested():
    (torch,) = (one for one in map(Requirement, PROJECT["dependencies"]) if one.name == "torch")
    allowed = {(2, second) for second in range(100) if f"2.{second}.0" in torch.specifier}
    assert allowed == TORCHES


def test_the_readme_names_the_oldest_python():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"Python {min(PYTHONS)[0]}.{min(PYTHONS)[1]}" in readme

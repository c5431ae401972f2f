"""What CONTRIBUTING.md and CHANGELOG.md say of files and versions is so."""

import re
from pathlib import Path

import la_aciq

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "kernels", "python", "tests", "tools")


def test_every_file_that_is_named_exists():
    sources = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*")]
    names = {path.name for path in sources} | {path.name for path in ROOT.iterdir()}
    named = re.findall(
        r"`([\w./]+\.(?:py|h|cpp|md)|(?:csrc|kernels|benchmarks|tools|tests|docs|examples)[\w/]*)`", TEXT
    )
    assert len(named) > 25
    for name in named:
        assert (ROOT / name).exists() or ("/" not in name and name in names), name


def test_every_package_is_on_the_map():
    packages = {path.parent.name for path in ROOT.glob("python/la_aciq/*/__init__.py")} - {"kernels"}
    modules = {path.stem for path in ROOT.glob("python/la_aciq/[a-z]*.py")}
    missing = [name for name in sorted(packages | modules) if f"`la_aciq.{name}`" not in TEXT]
    assert missing == []


def test_the_changelog_begins_with_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    releases = re.findall(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    assert releases[0][0] == la_aciq.__version__
    assert all(date != "unreleased" for _, date in releases[1:])
    for section in changelog.split("\n## ")[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert kinds == [kind for kind in ("Breaking", "Added", "Changed", "Fixed", "Deprecated") if kind in kinds]

"""The README's examples run, and the tables of the docs are what their result files give."""

import re
from pathlib import Path

import pytest

from benchmarks import tables
from la_aciq.evaluation import Report

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_tables_are_what_the_result_files_give(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_what_the_readme_says_of_the_demo_holds():
    costs = {configuration.name: configuration for configuration in Report.load(tables.REPORT).configurations}
    assert costs["W4A16"].mean > 0.5 * costs["W4A4 static, pooled"].mean
    assert costs["W4A4 static, per language, no rotation"].mean > 5 * costs["W4A4 static, per language"].mean
    per_token = [costs[f"W4A4 dynamic {statistic}, per token"] for statistic in ("absmax", "rms")]
    for static in (costs["W4A4 static, pooled"], costs["W4A4 static, per language"]):
        assert all(static.mean + 2 * static.mean_se < c.mean - 2 * c.mean_se for c in per_token)
        assert static.by_language["ko"].change > 5 * static.by_language["en"].change


def test_a_table_without_its_place_is_refused():
    with pytest.raises(ValueError, match="no markers <!-- other -->"):
        tables.with_table("<!-- one -->\n<!-- /one -->", "other", "| a |")


@pytest.mark.model
def test_the_serving_example_runs(capsys):
    exec(EXAMPLES[0], {})
    printed = capsys.readouterr().out
    assert "Habari ya asubuhi" in printed
    assert all(re.search(rf"^{tag} ", printed, re.MULTILINE) for tag in ("en", "sw", "th"))


def test_the_parts_example_runs(capsys):
    exec(EXAMPLES[1], {})
    std, kurtosis = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert std == pytest.approx(2**0.5, rel=0.02)  # of a Laplace law with scale 1
    assert kurtosis == pytest.approx(3, abs=0.5)

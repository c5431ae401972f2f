"""The examples of README and docs run, and their tables and sentences are what their result files give."""

import json
import re
from pathlib import Path

import pytest

import la_aciq
from benchmarks import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_tables_are_what_the_result_files_give(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_the_readme_is_short_and_says_what_the_evidence_is():
    assert len(README.splitlines()) <= 130
    for page in (README, (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")):
        words = re.sub(r"\s+", " ", page)
        assert "English-centered" in words
        assert "written by a language model" in words
        assert "4-bit file" in words or "in 4 bits" in words
    assert "never run on a GPU" in README


def test_the_findings_of_the_readme_hold():
    """The signs behind the generated sentences: what helps, and where no difference was measured."""
    results = json.loads(tables.EMBEDDED.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["configurations"]}
    pairs = {(pair["name"], pair["baseline"]): pair for pair in results["comparisons"]}
    assert README.count(tables.findings(results)) == 1
    feedback = rows["W4A16 feedback"]
    assert all(
        feedback["mean_high"] < rows[name]["mean_low"] and feedback["bits"] == rows[name]["bits"]
        for name in ("W4A16 nearest", "W4A16 torchao int4 hqq")
    )
    weights = pairs["W4A16 feedback, centers by language", "W4A16 feedback, centers pooled"]
    activations = pairs["W4A4 absmax per group by language", "W4A4 absmax per group pooled"]
    assert weights["mean_high"] < 0
    assert weights["gap_high"] > 0
    assert activations["gap_high"] > 0
    cache = pairs["KV4 static by language", "KV4 static pooled"]
    assert cache["mean_low"] < 0 < cache["mean_high"]
    # What the tables by language take, in the README's limits.
    tables_take = rows["W4A4 absmax per group by language"]["bits"] - rows["W4A4 absmax per group, no centers"]["bits"]
    assert f"{tables_take:.2f} bits per weight" in README


def test_what_the_docs_say_of_the_embedded_model_holds():
    results = json.loads(tables.EMBEDDED.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["configurations"]}
    of = {(pair["name"], pair["baseline"]): pair for pair in results["comparisons"]}
    twins = [pair for pair in of.values() if pair["name"].replace("by language", "pooled") == pair["baseline"]]
    activations = [pair for pair in twins if not pair["name"].startswith("KV4")]
    assert len(activations) >= 8
    assert all(pair["mean_high"] < 0 for pair in activations)  # statistics by language lower the mean
    narrower = [pair["name"] for pair in activations if pair["gap_high"] < 0]
    assert narrower == ["W4A16 nearest, centers by language"]
    assert of["KV4 absmax", "KV4 static by language"]["mean_high"] < 0
    assert of["W4A4 absmax per group by language", "W4A4 static by language"]["mean_high"] < 0
    english = of["W4A16 feedback, calibrated on English", "W4A16 feedback, centers pooled"]
    assert english["mean_low"] > 0
    rounded_per_token = [rows[f"W4A4 {name}, absmax per token"] for name in ("nf4", "hqq", "awq", "gptq")]
    assert min(row["mean_low"] for row in rounded_per_token) > 3  # these rows break down


def test_what_the_docs_say_of_the_best_of_ours_holds():
    pairs = json.loads(tables.EMBEDDED.read_text(encoding="utf-8"))["best"]
    others = [
        pair for pair in pairs if any(name in pair["baseline"] for name in ("nf4", "hqq", "awq", "gptq", "torch"))
    ]
    assert {pair["bits"] for pair in others} == {"W4A16", "W4A8", "W4A4"}
    assert len(others) == 2 * (7 + 4 + 4)
    assert all(pair["mean_high"] < 0 and pair["gap_high"] < 0 for pair in others)
    by_language = [pair for pair in pairs if pair not in others and "by language" in pair["name"]]
    assert all(pair["mean_high"] < 0 for pair in by_language)
    twins = [pair for pair in by_language if pair["name"].replace("by language", "pooled") == pair["baseline"]]
    assert len(twins) >= 2
    assert all(pair["gap_high"] > 0 for pair in twins)


def test_what_the_docs_say_of_distant_text_holds():
    near, far = (
        {
            (pair["name"], pair["baseline"]): pair
            for pair in json.loads(file.read_text(encoding="utf-8"))["comparisons"]
            if pair["baseline"].endswith("pooled")
        }
        for file in (tables.EMBEDDED, tables.DISTANT)
    )
    assert len(far) == 3
    for names, pair in far.items():
        assert pair["mean_high"] < 0
        assert pair["mean"] < near[names]["mean"] / 2  # more than half of the gain


def test_what_the_docs_say_of_ways_to_choose_clips_holds():
    comparisons = json.loads(tables.EXPERIMENTS.read_text(encoding="utf-8"))["comparisons"]
    pairs = {(pair["name"], pair["baseline"]): pair for pair in comparisons}

    def verdict(name, against):
        pair = pairs[name, against]
        return "better" if pair["mean_high"] < 0 else "worse" if pair["mean_low"] > 0 else "open"

    by_language, pooled, absmax = "clips by language", "clips pooled", "absmax per group"
    capped = "absmax, at most 1.25 x the"
    better = [(pooled, f"centers and {pooled}"), (by_language, pooled), (absmax, by_language)]
    better += [(f"INT3, {pooled}", f"INT3, centers and {pooled}"), (f"INT3, {by_language}", f"INT3, {pooled}")]
    better += [
        (f"{who}, {how}", f"{who}, as und")
        for who in ("left out", "English only")
        for how in ("clips adapted", "centers followed")
    ]
    better += [(f"{who}, absmax, centers followed", f"{who}, absmax, as und") for who in ("left out", "English only")]
    worse = [(f"Fisher by {information}, by language", by_language) for information in ("value", "token")]
    worse += [(f"clipped part counted {times}", by_language) for times in ("twice", "five times")]
    worse += [
        ("clips of 256 tokens", by_language),
        ("clips pooled, minimax", pooled),
        (f"{capped} pooled clip", absmax),
    ]
    worse += [
        ("left out, a neighbour's row", "left out, as und"),
        ("left out, as und", by_language),
        ("English only, as und", by_language),
    ]
    same = [
        ("clipped part counted half", by_language),
        ("clips shrunk", by_language),
        ("centers of 256 tokens", by_language),
    ]
    same += [("clips of 256 tokens, shrunk", "clips of 256 tokens"), (f"{capped} language's clip", absmax)]
    same += [("left out, absmax, centers followed", absmax), (f"{by_language}, the package's kernels", by_language)]
    same += [
        ("W4A16, languages weigh as they lose", "W4A16, languages weigh the same"),
        ("English only, absmax, centers followed", absmax),
    ]
    for expected, said in (("better", better), ("worse", worse), ("open", same)):
        assert {pair: verdict(*pair) for pair in said} == dict.fromkeys(said, expected)
    assert verdict("output error, by language", by_language) != "better"
    assert verdict("output error, pooled", pooled) != "better"
    three, four = ((f"{bits}{pooled}", f"{bits}centers and {pooled}") for bits in ("INT3, ", ""))
    assert pairs[three]["mean_high"] < 2 * pairs[four]["mean_low"]
    gaps = [pair["gap_low"] <= 0 <= pair["gap_high"] for pair in comparisons]
    assert sum(gaps) > len(gaps) / 2


def test_what_the_docs_say_of_the_speed_of_a_model_holds():
    slower_than_torch = []  # with the same attention and 16 rows, by machine
    for file in tables.RESULTS.glob("model-*.json"):
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        step = {(row["name"], row["rows"]): row["step_s"] for row in rows}
        prefill = {(row["name"], row["rows"]): row["prefill_s"] for row in rows}
        for count in (1, 4, 16):
            others = ("float32", "bfloat16", "torchao int4")
            for name in ("la_aciq W4A16", "la_aciq W4A8", "la_aciq W4A4"):
                assert all(step[name, count] < step[other, count] for other in others)
                assert all(prefill[name, count] < prefill[other, count] for other in ("torch int4", "torchao int4"))
            for name in ("la_aciq W4A8", "la_aciq W4A4"):
                assert all(prefill[name, count] < prefill[other, count] for other in others)
        assert all(prefill["bfloat16", count] < prefill["la_aciq W4A16", count] for count in (4, 16))
        behind = {
            count: step["torch int4, our attention", count] < step["la_aciq W4A16", count] for count in (1, 4, 16)
        }
        assert all(behind[count] for count in (1, 4))
        slower_than_torch.append((step["la_aciq W4A16", 16], behind[16]))
        assert step["torch int4", 1] < step["la_aciq W4A16", 1] < 1.1 * step["torch int4", 1]
    assert [behind for _, behind in sorted(slower_than_torch)] == [True, False]  # the faster machine first


def test_a_table_without_its_place_is_refused():
    with pytest.raises(ValueError, match="no markers <!-- other -->"):
        tables.with_table("<!-- one -->\n<!-- /one -->", "other", "| a |")


@pytest.mark.model
def test_the_example_of_the_readme_runs(capsys):
    (example,) = PYTHON.findall(README)
    exec(example, {})
    printed = capsys.readouterr().out
    assert "Habari ya asubuhi" in printed
    assert all(re.search(rf"^{tag} ", printed, re.MULTILINE) for tag in ("en", "sw", "th"))


def test_the_example_of_the_docs_runs(capsys):
    """Moments and a clip on NumPy arrays."""
    (example,) = PYTHON.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    exec(example, {})
    std, kurtosis = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert std == pytest.approx(2**0.5, rel=0.02)  # of a Laplace law with scale 1
    assert kurtosis == pytest.approx(3, abs=0.5)


def test_examples_that_are_not_run_need_a_server():
    pages = {page.name for page in ROOT.glob("docs/**/*.md") if PYTHON.search(page.read_text(encoding="utf-8"))}
    assert pages <= {"index.md", "serving.md"}


def test_the_stable_names_are_those_of_the_package():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- stable-names -->\n(.*?)<!-- /stable-names -->", page, re.DOTALL)[1]
    names = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(names) == sorted(la_aciq.__all__)

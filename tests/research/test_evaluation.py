"""What benchmarks/research/evaluation.py makes of rows: which are held against which, and which have a speed."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import tables
from benchmarks.research import baselines
from benchmarks.research.evaluation import COMPARISONS, Run, best_of_ours, chosen, runs, summary
from la_aciq.nn import QuantConfig

TAGS = ("en", "sw", "th")
SEGMENTS = 24


@pytest.fixture(scope="module")
def bench():
    rng = np.random.default_rng(0)
    reference = {tag: rng.uniform(300, 500, SEGMENTS) for tag in TAGS}
    return SimpleNamespace(
        languages=TAGS,
        bytes={tag: np.full(SEGMENTS, 400.0) for tag in TAGS},
        tokens={tag: np.full(SEGMENTS, 128.0) for tag in TAGS},
        reference=reference,
    )


def row(bench, name, bits, nats):
    """A row that costs so many nats more per segment, the same in every language but for a little noise."""
    rng = np.random.default_rng(len(name))
    losses = {tag: losses + nats + rng.normal(0, 0.1, SEGMENTS) for tag, losses in bench.reference.items()}
    return {"name": name, "bits": bits} | summary(bench, losses)


def test_the_best_is_held_against_every_language_blind_row_of_its_bits(bench):
    pooled = {"sharing": "pooled", "activations": 16}
    table = {
        "W4A16 theirs": Run(weights="awq"),
        "W4A16 other": Run(weights="gptq"),
        "W4A16 pooled": Run(QuantConfig(**pooled)),
        "W4A16 small": Run(QuantConfig(activations=16, center=False)),
        "W4A16 best": Run(QuantConfig(activations=16)),
        "W4A16 groups of 32": Run(QuantConfig(activations=16, group_size=32)),
        "W4A4 alone": Run(QuantConfig()),
        "KV4 other": Run(QuantConfig(weights=16, activations=16, kv=4)),
    }
    costs = dict(zip(table, (4, 6, 3, 2.5, 2, 1, 9, 0), strict=True))
    bits = dict.fromkeys(table, 4.5) | {"W4A16 best": 4.8, "W4A16 pooled": 4.6, "W4A16 groups of 32": 5}
    rows = {name: row(bench, name, bits[name], nats) for name, nats in costs.items()}
    pairs = best_of_ours(bench, rows, table)
    assert [(pair["name"], pair["baseline"]) for pair in pairs] == [
        (best, other)
        for best in ("W4A16 best", "W4A16 small")
        for other in ("W4A16 theirs", "W4A16 other", "W4A16 pooled")
    ]
    for pair in pairs:
        expected = (costs[pair["name"]] - costs[pair["baseline"]]) / np.log(2) / 400
        assert pair["mean"] == pytest.approx(expected, abs=3e-4)
        assert pair["mean_low"] < pair["mean"] < pair["mean_high"] < 0
    lines = tables.embedded_best({"best": pairs}).splitlines()[2:]
    assert all(line.startswith("| W4A16 | W4A16 ") and "| better |" in line for line in lines)
    assert len(lines) == 6


def test_only_what_computes_as_it_is_used_is_timed():
    timed = {name for name, run in runs().items() if run.computes_as_used}
    assert {"bfloat16", "W4A16 feedback", "W4A8 static pooled", "W4A4 static pooled", "KV4 absmax"} <= timed
    assert {f"W4A16 {name}" for name in baselines.PACKAGES} <= timed
    assert not {"W4A16 awq", "W4A4 gptq, absmax per token", "A4 static pooled"} & timed
    results = {"configurations": [], "settings": {"calibration_tokens": 1, "skipped_tokens": 2, "tokens": 3}}
    results["settings"] |= {"languages": TAGS, "model": "m"}
    results |= {"versions": {"torch": "2"}, "created": "2026-01-01T00"}
    assert "tokens/s" not in tables.embedded_rows(results)
    one = {"mean": 0.1, "mean_high": 0.2, "worst": 0.3, "worst_language": "en", "gap": 0.1, "gap_low": 0, "gap_high": 1}
    one |= {"bits": 4.5, "tail_rate": 0}
    fast, simulated = ({"name": name, "tokens_per_second": speed} | one for name, speed in (("a", 71.6), ("b", None)))
    results["configurations"] = [fast, simulated]
    results["speed"] = {"device": "a CPU", "threads": 2, "measured": "2026-01-02T00", "versions": {"torch": "2"}}
    results["speed"]["prompt"] = 128
    lines = tables.embedded_rows(results).splitlines()
    assert "on a CPU with 2 threads (2026-01-02, torch 2)" in lines[2]
    assert [line.split(" | ")[-1] for line in lines[-2:]] == ["72 |", "– |"]


def test_every_comparison_is_of_rows_there_are():
    table = runs()
    assert {name for pair in COMPARISONS for name in pair} <= set(table)
    assert set(tables.README_ROWS) <= set(table)


def test_names_that_end_with_a_star_stand_for_many():
    assert chosen(["a b", "a c", "b"], ["a*"]) == ["a b", "a c"]
    assert chosen(["a b", "b"], ["b", "a"]) == ["b"]
    assert chosen(["a", "b"], None) == ["a", "b"]

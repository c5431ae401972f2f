"""The simulation of the intervals' coverage: what it draws, that it can be cut, and its committed result."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.research import clip_intervals
from la_aciq.clipping import Empirical, optimal
from la_aciq.clipping.interval import MOST_SKEWNESS, REACH, tail_interval


def test_the_simulation_draws_tails_of_the_law():
    """Counts and values beyond a threshold against SciPy's law, and the clip and interval against the full sample's."""
    _, parts = clip_intervals.LAWS["shifted mixture"]
    tails, rng, n = clip_intervals.Tails(parts, 2.0), np.random.default_rng(3), 200_000
    drawn = tails.draw(rng, n)
    mass = 0.9 * 2 * stats.norm.sf(2) + 0.1 * (stats.norm.sf(2, 1, 3) + stats.norm.cdf(-2, 1, 3))
    assert stats.binomtest(len(drawn), n, mass).pvalue > 1e-3

    def distribution(x):
        beyond = 0.9 * 2 * stats.norm.sf(x) + 0.1 * (stats.norm.sf(x, 1, 3) + stats.norm.cdf(-x, 1, 3))
        return 1 - beyond / mass

    assert stats.kstest(drawn, distribution).pvalue > 1e-3
    x = rng.standard_normal(n)
    best = optimal(Empirical(x), 4, objective="aciq")
    tail = np.sort(np.abs(x)[np.abs(x) > 1.5])
    clip = clip_intervals.best_clip(tail, n, 4, 1.5)
    assert clip == pytest.approx(float(best.alpha), rel=1e-12)
    assert tail_interval(tail[tail > clip / REACH], n, clip, 4) == pytest.approx(best.interval, rel=1e-9)


def test_a_simulation_that_was_cut_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clip_intervals, "SIZES", {2: (512, 4096)})
    target, whole = tmp_path / "cut.json", tmp_path / "whole.json"
    assert clip_intervals.main(["20"], whole) == 0
    calls = []
    coverage = clip_intervals.coverage

    def cut(*cell):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(cell)
        return coverage(*cell)

    monkeypatch.setattr(clip_intervals, "coverage", cut)
    with pytest.raises(KeyboardInterrupt):
        clip_intervals.main(["20"], target)
    assert len(json.loads(target.read_text(encoding="utf-8"))["rows"]) == 5
    calls.clear()
    monkeypatch.setattr(clip_intervals, "coverage", lambda *cell: calls.append(cell) or coverage(*cell))
    assert clip_intervals.main(["20"], target) == 0
    assert len(calls) == 2 * len(clip_intervals.LAWS) - 5
    one, two = (json.loads(file.read_text(encoding="utf-8")) for file in (target, whole))
    assert one["rows"] == two["rows"]
    assert one["settings"] == {**two["settings"], "repeats": 20}
    # Other settings are another simulation.
    calls.clear()
    assert clip_intervals.main(["10"], target) == 0
    assert len(calls) == 2 * len(clip_intervals.LAWS)
    assert "16 cells of 10 samples" in capsys.readouterr().out


def test_the_committed_simulation_is_whole_and_covers():
    """92 to 97 % in every cell, up to what a simulation of this size shows by chance, over laws, bits and sizes."""
    result = json.loads(clip_intervals.TARGET.read_text(encoding="utf-8"))
    rows = result["rows"]
    assert [(row["law"], row["bits"], row["n"]) for row in rows] == list(clip_intervals.cells())
    assert result["settings"] == clip_intervals.settings(result["settings"]["repeats"])
    assert result["settings"]["most_skewness"] == MOST_SKEWNESS
    assert {row["bits"] for row in rows} == {2, 3, 4, 6, 8}
    with_intervals = [row for row in rows if row["intervals"]]
    assert sum(row["intervals"] > row["samples"] / 2 for row in rows) > 50
    for row in with_intervals:
        hits = round(row["coverage"] * row["intervals"])
        for share, side in ((0.92, "less"), (0.97, "greater")):
            assert stats.binomtest(hits, row["intervals"], share, side).pvalue > 1e-3, row
    judged = [row for row in rows if row["intervals"] >= 100]
    assert len(judged) > 80
    assert all(0.93 <= row["coverage"] <= 0.97 for row in judged)
    for law in clip_intervals.LAWS:
        of_law = [row for row in with_intervals if row["law"] == law]
        intervals = [row["intervals"] for row in of_law]
        assert 0.93 <= np.average([row["coverage"] for row in of_law], weights=intervals) <= 0.965
        assert np.average([row["low"] for row in of_law], weights=intervals) < 0.045
        assert np.average([row["high"] for row in of_law], weights=intervals) < 0.045

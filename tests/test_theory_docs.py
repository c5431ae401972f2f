"""docs/theory.md says what the computation gives: fresh numbers equal the stored ones, and the page is made from
those.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic_profile import normal, student, synthetic_profile

from tools.theory import __main__ as command
from tools.theory import files, measured, numbers, tables

DOCS = Path(__file__).parent.parent / "docs"

# Decimals that the page may state itself: what the source and others print, definitions, and tolerances that tests
# hold.
QUOTED = {
    "2.83", "2.5", "0.3", "0.9", "0.1", "5.03", "1.24", "22.2", "1.2", "0.5", "1.5",
    "9.3", "1.1", "1.53", "0.05", "0.2", "0.95", "0.013", "0.0075", "0.0063", "2.40", "0.82", "3.55", "0.027", "0.009",
}  # fmt: skip


def assert_same(fresh, stored, where):
    if isinstance(stored, list):
        assert len(fresh) == len(stored), where
        for i, (a, b) in enumerate(zip(fresh, stored, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(stored, float) and where.startswith("scan_gap"):
        assert fresh < 1e-8
    elif isinstance(stored, float):
        # The octav rows' and rules' excess errors are differences of nearly equal numbers.
        assert fresh == pytest.approx(stored, rel=2e-4, abs=2e-7), where
    else:
        assert fresh == stored, where


def test_stored_numbers_are_what_the_computation_gives():
    stored = json.loads(files.NUMBERS.read_text(encoding="utf-8"))
    fresh = numbers.numbers()
    assert list(fresh) == list(stored)
    for name, value in stored.items():
        assert_same(fresh[name], value, name)


def test_page_is_what_the_numbers_give(capsys):
    assert command.main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_that_drifted_is_noticed(monkeypatch, tmp_path, capsys):
    edited = tmp_path / "theory.md"
    edited.write_text((DOCS / "theory.md").read_text(encoding="utf-8").replace("2.523", "2.524"), encoding="utf-8")
    monkeypatch.setattr(command, "PAGE", edited)
    assert command.main(["--check"]) == 1
    assert "differs" in capsys.readouterr().out


def test_the_template_states_no_number_of_its_own():
    text = files.TEMPLATE.read_text(encoding="utf-8")
    text = re.sub(r"\{\{.*?\}\}|\]\([^)]*\)|https?://\S+", "", text)
    assert set(re.findall(r"\d+\.\d+", text)) <= QUOTED


def test_plots_are_there():
    page = (DOCS / "theory.md").read_text(encoding="utf-8")
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert len(images) == 4
    for image in images:
        assert (DOCS / image).read_bytes().startswith(b"\x89PNG")


def test_a_profile_can_be_summarized_and_shown(monkeypatch, tmp_path):
    draws = {
        "en": {"a.q_proj.in": normal(1), "a.down_proj.in": student(8, 3), "a.k_proj.output": normal(9)},
        "sw": {"a.q_proj.in": normal(1.2), "a.down_proj.in": student(6, 3), "a.k_proj.output": normal(7)},
    }
    profile = synthetic_profile(draws, normal(20), values=20_000)
    monkeypatch.setattr("la_aciq.Profile", SimpleNamespace(load=lambda folder: profile))
    summary = json.loads(json.dumps(measured.summarize_profile(str(tmp_path))))
    assert set(summary["languages"]) == {"en", "sw"}
    assert summary["shared_gap"] <= min(summary[key] for key in ("total_variation", "cells", "wasserstein_shared"))
    assert summary["own_gap"] <= summary["wasserstein_own"]
    for row in summary["languages"].values():
        assert row["shannon"] < row["lloyd_max"] < row["quantizer"] <= row["own"] * 1.01
        assert np.isfinite(row["kurtosis_eff"])
    shown = tables.TABLES["profile"]({"profile": summary})
    assert "| sw |" in shown
    assert "Wasserstein" in shown

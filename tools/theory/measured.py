"""Numbers of the theory page that other commands measured: benchmarks, simulations, and a calibrated model."""

import json
from typing import Any

import numpy as np
from scipy import stats

from la_aciq import clipping, disparity

from .files import RESULTS, SUMMARY


def measured() -> dict[str, Any]:
    """Numbers from committed result files: the benchmarks, and the summary of a profile where there is one."""
    n: dict[str, Any] = {}
    files = sorted(RESULTS.glob("clip-table-*.json"))
    n["clip_table"] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    exact = [
        row["cpu_median_s"] for result in n["clip_table"] for row in result["rows"] if row["case"] == "exact, midrise"
    ]
    n["clip_table_seconds"] = max(exact)
    n["profile"] = json.loads(SUMMARY.read_text(encoding="utf-8")) if SUMMARY.exists() else None
    if n["profile"]:
        rows = n["profile"]["languages"].values()
        kappa = [row["kurtosis_eff"] for row in rows]
        median = [row["kurtosis_layers"][1] for row in rows]
        for name, key in (("clip", "own"), ("lloyd", "lloyd_max")):
            n[f"rank_{name}"] = float(stats.spearmanr(kappa, [row[key] for row in rows]).statistic)
        n["language_count"] = len(kappa)
        n["rank_median"] = float(stats.spearmanr(kappa, median).statistic)
    n["optimizer"] = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("clip-optimizer-*.json"))
    ]
    n["optimizer_device"] = n["optimizer"][0]["device"]
    n["optimizer_seconds"] = max(row["seconds"] for result in n["optimizer"] for row in result["rows"])
    n["optimizer_clips"] = max(row["clips"] for result in n["optimizer"] for row in result["rows"])
    simulation = json.loads((RESULTS / "clip-intervals.json").read_text(encoding="utf-8"))
    n["coverage"] = simulation["rows"]
    n["coverage_repeats"], n["coverage_skewness"] = (simulation["settings"][k] for k in ("repeats", "most_skewness"))
    judged = [row for row in n["coverage"] if row["intervals"] >= 100]
    n["coverage_judged"], n["coverage_cells"] = len(judged), len(n["coverage"])
    n["coverage_least"], n["coverage_most"] = (f(100 * row["coverage"] for row in judged) for f in (min, max))
    intervals = np.array([row["intervals"] for row in judged])
    for name in ("coverage", "low", "high"):
        n[f"coverage_all_{name}"] = 100 * float(np.average([row[name] for row in judged], weights=intervals))
    n["coverage_error"] = 100 * float(np.sqrt(0.05 * 0.95 / 100))
    return n


def summarize_profile(folder: str) -> dict[str, Any]:
    """Bounds, limits, effective kurtosis and regret of a calibrated model by language, at INT4."""
    from la_aciq import Profile

    profile = Profile.load(folder)
    bounds = disparity.deployment_bounds(profile)
    limit = disparity.language_limits(profile)
    laws = disparity.effective(profile)
    regret = disparity.regret(profile)
    table = clipping.table(profile, granularity="layer")
    inputs = [name for name, site in profile.sites.items() if site.kind == "input"]
    layers = [layer for layer, site in profile.layers.items() if site in inputs]
    languages = {}
    for i, language in enumerate(profile.languages):
        entry = profile.entries.index(language)
        layer_kurtosis = [float(profile.sites[name].moments.pool(1).kurtosis[entry]) for name in inputs]
        languages[language] = {
            "kurtosis_eff": laws[language].kurtosis,
            "kurtosis_layers": [float(q) for q in np.nanquantile(layer_kurtosis, [0.0, 0.5, 1.0])],
            "shape": float(np.median([table.clip_factors[layer][entry, 0] for layer in layers])),
            "shared": float(bounds.shared[i]),
            "own": float(bounds.separate[i]),
            "shannon": limit[language].shannon,
            "lloyd_max": limit[language].lloyd_max,
            "quantizer": limit[language].quantizer,
        }
    return {
        "model": str(profile.metadata.get("architecture", "")),
        "rotation": bool(profile.metadata.get("rotation", {}).get("enabled", False)),
        "tokens": profile.metadata.get("tokens", {}),
        "layer_inputs": len(inputs),
        "languages": languages,
        "shared_gap": bounds.shared_gap,
        "own_gap": bounds.separate_gap,
        "total_variation": bounds.total_variation,
        "cells": bounds.cells,
        "wasserstein_shared": bounds.wasserstein_shared,
        "wasserstein_own": bounds.wasserstein_separate,
        "regret": {kind: max(row.values()) for kind, row in regret.as_dict().items()},
    }

"""Computes every number and plot of docs/theory.md and writes the page from docs/theory/page.md.

    python tools/generate_theory.py                   recompute docs/theory/numbers.json and the plots, write the page
    python tools/generate_theory.py --profile DIR     first summarize a calibration profile into
    docs/theory/profile_summary.json python tools/generate_theory.py --check           write nothing; fail when the page
    is not what numbers.json gives

In docs/theory/page.md, {{name}} stands for a value of numbers.json, {{name:.3f}} for one in that format and {{name%}}
for a percentage; {{table:name}} stands for a table made below.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from la_aciq import clipping, disparity
from la_aciq.clipping import (
    Empirical,
    Gaussian,
    GeneralizedGaussian,
    Laplace,
    Law,
    Logistic,
    Mixture,
    StudentT,
    Uniform,
    kurtosis_rule,
    mse,
    octav,
    optimal,
    samples_for_interval,
)
from la_aciq.clipping import kurtosis_coefficients as coefficients
from la_aciq.clipping.kurtosis import reference_laws
from la_aciq.clipping.published import BANNER_GAUSS, BANNER_LAPLACE, MAX_STEPS, banner_clip, uniform_gaussian_quantizer
from la_aciq.disparity.limits import _companded, _stationary

HERE = Path(__file__).parents[1] / "docs"
FOLDER = HERE / "theory"
TEMPLATE, NUMBERS, PAGE = FOLDER / "page.md", FOLDER / "numbers.json", HERE / "theory.md"
SUMMARY = FOLDER / "profile_summary.json"
BENCHMARKS = HERE.parent / "benchmarks" / "results"

RULE_LAWS: list[tuple[str, Law]] = [
    ("Gaussian", Gaussian()),
    ("t, nu = 10", StudentT(10)),
    ("t, nu = 6", StudentT(6)),
    ("Laplace", Laplace()),
    ("t, nu = 5", StudentT(5)),
    ("GG, beta = 0.5", GeneralizedGaussian(0.5)),
    ("GG, beta = 4", GeneralizedGaussian(4)),
    ("uniform", Uniform()),
]
LIMIT_LAWS: list[tuple[str, Law]] = [
    ("uniform", Uniform()),
    ("Gaussian", Gaussian()),
    ("logistic", Logistic()),
    ("Laplace", Laplace()),
    ("t, nu = 5", StudentT(5)),
    ("GG, beta = 0.5", GeneralizedGaussian(0.5)),
]


def model(law: Law, alpha: Any, bits: int = 4) -> Any:
    """The convex model's error."""
    return mse(law, alpha, bits, "midrise", "aciq")


def symmetric(law: Law, levels_each_side: int = 7) -> tuple[float, float]:
    """Best clip and error of the odd symmetric codebook (q Delta, |q| <= 7, Delta = a / 7), which the library does
    not offer.
    """
    j = np.arange(1, levels_each_side + 1) - 0.5

    def error(a: float) -> float:
        step = a / levels_each_side
        return float(law.power - 2 * step * law.tail(j * step, 1).sum())

    best = optimize.minimize_scalar(error, bounds=(0.5, 10), method="bounded", options={"xatol": 1e-10})
    return float(best.x), float(best.fun)


def scale_mixture(p: float) -> Mixture:
    """Gaussian scale mixture of variance 1 and excess kurtosis 3, with probability p of the larger variance."""
    small, large = 1 - np.sqrt(p / (1 - p)), 1 + np.sqrt((1 - p) / p)
    return Mixture([Gaussian(np.sqrt(small)), Gaussian(np.sqrt(large))], [1 - p, p])


def _sample_kurtosis(x: Any) -> float:
    d = x - x.mean()
    return float((d**4).mean() / (d**2).mean() ** 2 - 3)


def light_slope(kappa: float) -> float:
    """Difference quotient of the generalized Gaussian's best error from the uniform law to excess kurtosis `kappa`."""
    beta = float(
        np.exp(optimize.brentq(lambda b: float(GeneralizedGaussian(np.exp(b)).kurtosis) - kappa, 0, 12, xtol=1e-14))
    )
    return float((float(optimal(GeneralizedGaussian(beta)).mse) - 4.0**-4) / (kappa + 1.2))


def local_minima(law: Law, bits: int = 4) -> int:
    """Local minima of the exact error on a fine grid."""
    m = mse(law, np.linspace(0.5, 8, 200_001), bits)
    return int(((m[1:-1] < m[:-2]) & (m[1:-1] < m[2:])).sum())


def ratio_floor(bits: int, codebook: str) -> float:
    """Least worst-case excess of any function of E|X| / sigma, over generalized Gaussians of exponent >= 1/2 and t
    laws.
    """
    worst = 0.0
    for ratio in np.linspace(0.55, 0.79, 13):

        def beta(b: float, ratio: float = ratio) -> float:
            return float(GeneralizedGaussian(np.exp(b)).mean_abs) - ratio

        def nu(b: float, ratio: float = ratio) -> float:
            return float(StudentT(2 + np.exp(b)).mean_abs) - ratio

        laws = [
            GeneralizedGaussian(np.exp(optimize.brentq(beta, np.log(0.3), np.log(2.0)))),
            StudentT(2 + np.exp(optimize.brentq(nu, np.log(1e-3), np.log(1e6)))),
        ]
        best = [optimal(law, bits, codebook) for law in laws]

        def excess(a: float, laws: list[Law] = laws, best: list[Any] = best) -> float:
            return max(float(mse(law, a, bits, codebook) / b.mse - 1) for law, b in zip(laws, best, strict=True))

        ends = sorted(float(b.alpha) for b in best)
        found = optimize.minimize_scalar(excess, bounds=tuple(ends), method="bounded", options={"xatol": 1e-7})
        worst = max(worst, float(found.fun))
    return worst


def numbers() -> dict[str, Any]:
    """Everything that the page states, by computation."""
    n: dict[str, Any] = {}
    gauss, laplace = Gaussian(), Laplace()

    # The convex model and the source's derivative.
    best = optimal(gauss, objective="aciq")
    n["gauss_model_alpha"], n["gauss_model_mse"] = float(best.alpha), float(best.mse)
    n["gauss_banner_alpha"] = float(banner_clip(gauss, 4))
    n["laplace_banner_2bit_b"] = float(banner_clip(laplace, 2)) * np.sqrt(2)
    n["source_derivative_ratio"] = float(2.5 * gauss.tail(2.5, 0) / gauss.tail(2.5, 1))
    wrong = float(optimize.brentq(lambda a: float(gauss.tail(a, 0)) - 1 / 675, 1, 6))
    n["source_root"], n["source_root_excess"] = wrong, float(model(gauss, wrong) / best.mse - 1)
    n["source_clip_excess"] = float(model(gauss, 2.83) / best.mse - 1)

    n["banner"] = [
        [bits, BANNER_GAUSS[bits - 1], float(banner_clip(gauss, bits)), BANNER_LAPLACE[bits - 1],
         float(banner_clip(laplace, bits)) * np.sqrt(2)]
        for bits in range(1, 9)
    ]  # fmt: skip
    n["max"] = [[2**b, MAX_STEPS.get(2**b), *uniform_gaussian_quantizer(2**b)] for b in range(1, 9)]
    n["optima"] = []
    for bits in range(2, 9):
        row: list[Any] = [bits]
        for law in (gauss, laplace):
            row.append(float(optimal(law, bits, objective="aciq").alpha))
            for codebook in ("midrise", "midtread"):
                found = optimal(law, bits, codebook)
                row += [float(found.alpha), float(found.mse)]
        n["optima"].append(row)
    n["optima_gauss_midrise"] = n["optima"][2][2]
    n["symmetric_gauss_alpha"], n["symmetric_gauss_mse"] = symmetric(gauss)
    n["symmetric_laplace_mse"] = symmetric(laplace)[1]
    n["laplace_midtread_mse"] = float(optimal(laplace, 4, "midtread").mse)

    # Convexity of the exact error.
    a = np.linspace(0.01, 60, 12_000)
    for bits in (2, 3, 4):
        n[f"midrise_curvature_min_{bits}"] = float(clipping.curvature(gauss, a, bits, "midrise", "exact").min())
        bend = clipping.curvature(gauss, a, bits, "midtread", "exact")
        n[f"midtread_concave_from_{bits}"] = float(a[bend < 0].min())
    counts = [local_minima(Empirical(np.random.default_rng(seed).standard_normal(128))) for seed in range(20)]
    n["local_minima_least"], n["local_minima_most"] = min(counts), max(counts)
    scan = optimal(gauss).certificate
    n["scan_knots"], n["scan_gap"] = len(scan.knots[0]), float(scan.gap)

    # OCTAV.
    n["octav"] = []
    for name, law in [("Gaussian", gauss), ("Laplace", laplace), ("t, nu = 5", StudentT(5)), ("uniform", Uniform())]:
        for bits in (2, 4, 8):
            c = 4.0**-bits / 3

            def in_range(a: float, law: Law = law, c: float = c) -> float:
                return float(law.tail(a, 2) + c * a**2 * (1 - law.tail(a, 0)))

            exact = optimize.minimize_scalar(in_range, bounds=(0.3, 20), method="bounded", options={"xatol": 1e-11})
            found_octav = octav(law, bits)
            n["octav"].append(
                [name, bits, found_octav.steps, float(found_octav.alpha), float(found_octav.alpha / exact.x - 1),
                 in_range(float(found_octav.alpha)) / exact.fun - 1]
            )  # fmt: skip
    n["octav_gauss_4_excess"] = n["octav"][1][5]
    n["octav_gauss_4_clip"] = n["octav"][1][4]
    n["octav_gauss_2_excess"] = n["octav"][0][5]
    n["octav_uniform_2_excess"] = n["octav"][9][5]
    n["octav_steps_least"] = min(row[2] for row in n["octav"])
    n["octav_steps_most"] = max(row[2] for row in n["octav"])

    # The kurtosis rule.
    n["rule"] = []
    for name, law in RULE_LAWS:
        kappa = float(law.kurtosis)
        true = optimal(law, objective="aciq")
        row = [name, kappa, float(true.alpha)]
        for kind in ("published", "fitted", "spline"):
            clip = kurtosis_rule(kappa, 4, kind, objective="aciq")
            row += [clip, float(model(law, clip) / true.mse - 1)]
        n["rule"].append(row)
    n["rule_laplace_excess"] = n["rule"][3][4]
    n["rule_uniform_excess"] = n["rule"][7][4]
    worst = 0.0
    for kappa in (0.0, 1.0, 3.0, 6.0, 12.0, 22.2):
        for law in reference_laws(kappa):
            true = optimal(law, objective="aciq")
            worst = max(worst, float(model(law, 2.40 + 0.82 * np.log1p(kappa)) / true.mse - 1))
    n["refit_worst"] = worst
    n["refit_listed_worst"] = max(
        float(model(law, 2.40 + 0.82 * np.log1p(float(law.kurtosis))) / optimal(law, objective="aciq").mse - 1)
        for _, law in RULE_LAWS[:6]
    )
    n["coefficients"] = [
        [kind, bits, *coefficients.LINEAR[kind, bits], *coefficients.SPLINE_EXCESS[kind, bits]]
        for kind in ("midrise", "midtread", "aciq")
        for bits in range(2, 9)
    ]
    n["fitted_midrise_4_worst"] = coefficients.LINEAR["midrise", 4][2]
    n["fitted_midtread_4_worst"] = coefficients.LINEAR["midtread", 4][2]
    n["fitted_midrise_8_worst"] = coefficients.LINEAR["midrise", 8][2]
    n["spline_midrise_8_worst"] = coefficients.SPLINE_EXCESS["midrise", 8][0]
    # As p falls to 0 the larger part leaves the body: the limit is the Gaussian's own clip.
    ps = np.concatenate([np.geomspace(1e-14, 1e-5, 4), np.geomspace(1e-4, 0.1, 25), np.linspace(0.12, 0.499, 20)])
    clips = [float(optimal(scale_mixture(float(p)), objective="aciq").alpha) for p in ps]
    n["mixture_clips"] = [[float(p), clip] for p, clip in zip(ps, clips, strict=True)]
    n["mixture_clip_least"], n["mixture_clip_most"] = min(clips), max(clips)
    n["ratio_floor_midrise"], n["ratio_floor_midtread"] = ratio_floor(4, "midrise"), ratio_floor(4, "midtread")

    # Samples.
    n["samples"] = []
    for name, law in [*RULE_LAWS[:5], ("t, nu = 2.5", StudentT(2.5))]:
        n["samples"].append(
            [name, *(float(samples_for_interval(law, w, bits)) for bits in (4, 8) for w in (0.1, 0.05, 0.01))]
        )
    draws = np.array([_sample_kurtosis(np.random.default_rng(seed).standard_t(5, 100_000)) for seed in range(600)])
    n["t5_kurtosis_low"], n["t5_kurtosis_high"] = (float(q) for q in np.quantile(draws, [0.05, 0.95]))
    # What another set of seeds would give: the standard deviation over resamples of the 600.
    again = np.quantile(np.random.default_rng(0).choice(draws, (400, len(draws))), [0.05, 0.95], axis=1).std(axis=1)
    n["t5_kurtosis_low_sd"], n["t5_kurtosis_high_sd"] = (float(x) for x in again)

    # Mixtures.
    n["mixture_kurtosis"] = float(Mixture([Gaussian(1), Gaussian(3)], [0.9, 0.1]).kurtosis)
    skewed = [[1.0, 1.0, 2.0, 9.0], [-2.0, 1.0, 0.0, 3.0]]
    n["skew_kurtosis"] = disparity.EffectiveLaw(skewed, [0.7, 0.3]).kurtosis
    skewed[0][2] = 0.0
    n["no_skew_kurtosis"] = disparity.EffectiveLaw(skewed, [0.7, 0.3]).kurtosis

    # Sharing.
    n["sharing"] = []
    for ratio in (1.1, 1.2, 1.5, 2.0):
        pair = [Gaussian(1), Gaussian(ratio)]
        pooled = float(optimal(Mixture(pair, [0.5, 0.5]), objective="aciq").alpha)
        row = [ratio]
        for clip in (
            pooled,
            clipping.shared(pair, objective="aciq").alpha,
            clipping.shared(pair, objective="aciq", language_objective="minimax").alpha,
        ):
            row += [float(model(law, clip) / law.power / n["gauss_model_mse"] - 1) for law in pair]
        n["sharing"].append(row)
    pair = [Gaussian(1), Gaussian(2)]
    own = [float(optimal(law).mse) for law in pair]
    pooled = float(optimal(Mixture(pair, [0.5, 0.5])).alpha)
    n["raw_gap_own"] = own[1] - own[0]
    n["raw_gap_pooled"] = float(mse(pair[1], pooled) - mse(pair[0], pooled))
    wide = float(optimal(pair[1]).alpha)
    n["raw_gap_wide"] = float(mse(pair[1], wide) - mse(pair[0], wide))
    front = clipping.pareto(pair, objective="aciq", points=41)
    n["pareto"] = [[float(x) for x in row] for row in zip(front.alpha, front.mean, front.worst, strict=True)]
    n["pareto_mean_alpha"], n["pareto_worst_alpha"] = n["pareto"][0][0], n["pareto"][-1][0]
    n["pareto_mean_cost"] = n["pareto"][-1][1] / n["pareto"][0][1] - 1
    n["pareto_worst_gain"] = 1 - n["pareto"][-1][2] / n["pareto"][0][2]

    # Limits.
    n["limits"] = []
    for name, law in LIMIT_LAWS:
        found_limits = disparity.limits(law)
        n["limits"].append(
            [name, float(disparity.entropy_power(law)), disparity.panter_dite_constant(law), found_limits.shannon,
             found_limits.gaussian, found_limits.lloyd_max, found_limits.quantizer,
             found_limits.decibels()["lloyd_max"],
             found_limits.decibels()["shannon"]]
        )  # fmt: skip
    n["rate_distortion"] = []
    for name, law in LIMIT_LAWS:
        curve = disparity.rate_distortion(law, 4)
        n["rate_distortion"].append([name, curve.lower, curve.upper])
    n["lloyd_max_local"] = _stationary(GeneralizedGaussian(0.5), _companded(GeneralizedGaussian(0.5), 16)).mse
    n["limit_bits"] = []
    for bits in range(2, 9):
        row = [bits]
        for law in (gauss, laplace):
            x = disparity.limits(law, bits)
            row += [x.shannon, x.gaussian, x.lloyd_max, x.quantizer]
        n["limit_bits"].append(row)

    # Disparity.
    scale, shape = disparity.equal_kurtosis_examples()
    n["example_scale_0"], n["example_scale_1"] = scale.mse
    n["example_shape_1"] = shape.normalized_mse[1]

    def t(kappa: float) -> Law:
        return StudentT(4 + 6 / kappa) if kappa > 0 else gauss

    grid = np.concatenate([[0.0], np.geomspace(0.01, 22, 25)])
    n["slope_t"] = disparity.family_slope(t, grid)
    n["slope_gg"] = disparity.family_slope(lambda k: reference_laws(float(k))[0], grid)
    n["slopes_gg_light"] = [[kappa, light_slope(kappa)] for kappa in (-1.0, -1.1, -1.19, -1.199, -1.1999)]
    n["kappa_light"], n["kappa_lighter"] = n["slopes_gg_light"][3][0], n["slopes_gg_light"][4][0]
    n["slope_gg_light"], n["slope_gg_lighter"] = n["slopes_gg_light"][3][1], n["slopes_gg_light"][4][1]
    kappas = disparity.two_point_kurtoses(10, 1.0, 0.5)
    n["family_bound_example"] = disparity.family_bound(kappas, n["slope_t"])
    actual = [float(optimal(t(k)).normalized_mse) for k in (0.5, 1.5)]
    n["family_gap_example"] = actual[1] - actual[0]
    n["kurtosis_bounds"] = []
    for name, law in RULE_LAWS:
        if np.isfinite(float(law.kurtosis)):
            n["kurtosis_bounds"].append(
                [
                    name,
                    float(law.kurtosis),
                    float(optimal(law, objective="aciq").mse),
                    float(disparity.kurtosis_bound(law)),
                ]
            )
    return n


def measured() -> dict[str, Any]:
    """Numbers that come from committed result files: the benchmark and, once made, the summary of the demo's
    profile.
    """
    n: dict[str, Any] = {}
    files = sorted(BENCHMARKS.glob("clip-table-*.json"))
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
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(BENCHMARKS.glob("clip-optimizer-*.json"))
    ]
    n["optimizer_device"] = n["optimizer"][0]["device"]
    n["optimizer_seconds"] = max(row["seconds"] for result in n["optimizer"] for row in result["rows"])
    n["optimizer_clips"] = max(row["clips"] for result in n["optimizer"] for row in result["rows"])
    n["coverage"] = json.loads((BENCHMARKS / "clip-intervals.json").read_text(encoding="utf-8"))["rows"]
    held = [row for row in n["coverage"] if row["intervals"] > row["samples"] / 2]
    n["coverage_least"], n["coverage_most"] = (f(row["coverage"] for row in held) for f in (min, max))
    return n


def summarize_profile(folder: str) -> dict[str, Any]:
    """What the page says about a calibrated model: bounds, limits, effective kurtosis and regret per language, at
    INT4.
    """
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
        row = profile.entries.index(language)
        own_kurtosis = [float(profile.sites[name].moments.pool(1).kurtosis[row]) for name in inputs]
        languages[language] = {
            "kurtosis_eff": laws[language].kurtosis,
            "kurtosis_layers": [float(q) for q in np.nanquantile(own_kurtosis, [0.0, 0.5, 1.0])],
            "shape": float(np.median([table.clip_factors[layer][row, 0] for layer in layers])),
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


# Tables


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(x: float) -> str:
    if abs(x) < 1e-5:
        return "< 0.001 %"
    return f"{100 * x:.2g} %" if abs(x) < 0.1 else f"{100 * x:.0f} %"


def tables() -> dict[str, Callable[[dict[str, Any]], str]]:
    def banner(n: dict[str, Any]) -> str:
        rows = [[str(b), f"{pg:.2f}", f"{g:.4f}", f"{pl:.2f}", f"{x:.4f}"] for b, pg, g, pl, x in n["banner"]]
        return table(["bits", "Gauss, printed", "computed", "Laplace / b, printed", "computed"], rows)

    def max_steps(n: dict[str, Any]) -> str:
        rows = [[str(k), "" if p is None else f"{p:.4g}", f"{s:.5f}", f"{e:.4g}"] for k, p, s, e in n["max"]]
        return table(["levels", "step, printed by Max", "step", "error"], rows)

    def optima(n: dict[str, Any]) -> str:
        rows = [
            [str(r[0]), *(f"{r[i]:.3f}" if i in (1, 2, 4, 6, 7, 9) else f"{r[i]:.4g}" for i in range(1, 11))]
            for r in n["optima"]
        ]
        names = [f"{law} {what}" for law in ("Gauss", "Laplace") for what in
                 ("model", "midrise", "MSE", "midtread", "MSE")]  # fmt: skip
        return table(["bits", *names], rows)

    def octav_table(n: dict[str, Any]) -> str:
        rows = [[name, str(b), str(s), f"{a:.4f}", percent(d), percent(e)] for name, b, s, a, d, e in n["octav"]]
        return table(["law", "bits", "steps", "clip / sigma", "clip off by", "excess error"], rows)

    def rule(n: dict[str, Any]) -> str:
        rows = [
            [r[0], f"{r[1]:.2f}", f"{r[2]:.3f}", *(f"{r[i]:.2f}, {percent(r[i + 1])}" for i in (3, 5, 7))]
            for r in n["rule"]
        ]
        return table(["law", "kappa", "alpha* / sigma", "published, excess", "fitted, excess", "spline, excess"], rows)

    def fits(n: dict[str, Any]) -> str:
        rows = [
            [f"{k}, {b}", f"{c:.3f}", f"{d:.3f}", percent(w), percent(s), percent(f)]
            for k, b, c, d, w, s, f in n["coefficients"]
        ]
        return table(["error, bits", "c", "d", "worst, kappa >= 0", "spline, worst", "any function of kappa"], rows)

    def samples(n: dict[str, Any]) -> str:
        rows = [[r[0], *(f"{x:,.0f}" for x in r[1:])] for r in n["samples"]]
        widths = [f"{b} bits, +-{w} %" for b in (4, 8) for w in (10, 5, 1)]
        return table(["law", *widths], rows)

    def coverage(n: dict[str, Any]) -> str:
        rows = [
            [r["law"], str(r["bits"]), f"{r['n']:,}", f"{r['intervals']} of {r['samples']}",
             f"{100 * r['coverage']:.1f} %", percent(r["half_width"])]
            for r in n["coverage"]
            if r["intervals"] > r["samples"] / 2
        ]  # fmt: skip
        return table(["law", "bits", "samples", "had an interval", "intervals that hold alpha*", "half width"], rows)

    def sharing(n: dict[str, Any]) -> str:
        rows = [[f"{r[0]}", *(f"{percent(r[i])} / {percent(r[i + 1])}" for i in (1, 3, 5))] for r in n["sharing"]]
        return table(["sigma ratio", "pooled law's clip", "mean of normalized errors", "minimax"], rows)

    def limits(n: dict[str, Any]) -> str:
        rows = [
            [
                r[0],
                f"{r[1]:.3f}",
                f"{r[2]:.2f}",
                f"{r[3]:.5f}",
                f"{(curve[1] + curve[2]) / 2:.5f}",
                *(f"{x:.5f}" for x in r[4:7]),
                f"{max(r[7], 0):.2f} dB",
                f"{r[8]:.2f} dB",
            ]
            for r, curve in zip(n["limits"], n["rate_distortion"], strict=True)
        ]
        names = ["law", "entropy power", "Panter-Dite", "Shannon bound", "D(4)", "sigma^2 4^-4", "Lloyd-Max", "ours",
                 "over Lloyd-Max", "over Shannon"]  # fmt: skip
        return table(names, rows)

    def kurtosis_bounds(n: dict[str, Any]) -> str:
        rows = [[r[0], f"{r[1]:.2f}", f"{r[2]:.5f}", f"{r[3]:.4f}", f"{r[3] / r[2]:.1f}"] for r in n["kurtosis_bounds"]]
        return table(["law", "kappa", "MSE*, model", "bound (c)", "ratio"], rows)

    def cost(n: dict[str, Any]) -> str:
        rows = [
            [row["case"], f"{row['cpu_median_s']:.2f}", f"{result['device']}, {result['cores']} core"]
            for result in n["clip_table"]
            for row in result["rows"]
        ]
        return table(["200 layers x 100 languages", "seconds", "device"], rows)

    def profile(n: dict[str, Any]) -> str:
        p = n["profile"]
        if p is None:
            return "No profile has been summarized yet: `python tools/generate_theory.py --profile DIR` does it."
        rows = [
            [tag, f"{x['kurtosis_eff']:.1f}", " / ".join(f"{k:.1f}" for k in x["kurtosis_layers"]), f"{x['shape']:.3f}",
             f"{x['shannon']:.5f}", f"{x['lloyd_max']:.5f}", f"{x['quantizer']:.5f}", f"{x['shared']:.5f}"]
            for tag, x in p["languages"].items()
        ]  # fmt: skip
        first = table(
            ["language", "kappa_eff", "layers: least / median / most", "alpha* / rms, median", "Shannon bound",
             "Lloyd-Max",
             "own clip", "shared clip, pooled power"],
            rows,
        )  # fmt: skip
        gaps = [
            ("shared clip", p["shared_gap"], "total variation", p["total_variation"]),
            ("shared clip", p["shared_gap"], "bins (cells)", p["cells"]),
            ("shared clip", p["shared_gap"], "Wasserstein", p["wasserstein_shared"]),
            ("own clips", p["own_gap"], "Wasserstein, unit power", p["wasserstein_own"]),
        ]
        second = table(
            ["gap of", "max - min", "bound", "value", "bound / gap"],
            [[a, f"{g:.5f}", b, f"{v:.4g}", f"{v / g:.1f}"] for a, g, b, v in gaps],
        )
        state = "with" if p["rotation"] else "without"
        return (
            f"{p['model']}, {state} rotation, {p['layer_inputs']} layer inputs, {len(p['languages'])} languages, INT4 "
            f"midrise, one clip per layer and language:\n\n{first}\n\n{second}"
        )

    return {
        "banner": banner, "max": max_steps, "optima": optima, "octav": octav_table, "rule": rule, "fits": fits,
        "samples": samples, "coverage": coverage,
        "sharing": sharing, "limits": limits, "kurtosis_bounds": kurtosis_bounds, "cost": cost,
        "profile": profile,
    }  # fmt: skip


def page(n: dict[str, Any]) -> str:
    """docs/theory.md from the template and the numbers."""
    made = tables()

    def fill(match: re.Match[str]) -> str:
        name, kind, spec = match["name"], match["kind"], match["spec"] or ""
        if name == "table":
            return made[spec](n)
        if kind == "%":
            return percent(n[name])
        return format(n[name], spec)

    text = re.sub(r"\{\{(?P<name>\w+)(?P<kind>[:%]?)(?P<spec>[^}]*)\}\}", fill, TEMPLATE.read_text(encoding="utf-8"))
    return (
        "<!-- Made from docs/theory/page.md by tools/generate_theory.py: edit that file, not this one. -->\n\n" + text
    )


# Plots


def plots(n: dict[str, Any]) -> None:
    """PNG files in docs/theory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blue, orange, green, grey, red = "#0072B2", "#E69F00", "#009E73", "#777777", "#D55E00"
    style = {
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
        "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "figure.dpi": 150, "savefig.bbox": "tight", "legend.frameon": False,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
        a = np.linspace(0.8, 7, 400)
        for ax, bits in zip(axes, (2, 4), strict=True):
            for name, law, color in (("Gaussian", Gaussian(), blue), ("t, nu = 5", StudentT(5), green),
                                     ("Laplace", Laplace(), orange)):  # fmt: skip
                best = optimal(law, bits)
                ax.plot(a, mse(law, a, bits), color=color, lw=2, label=f"{name}: {float(best.alpha):.2f}")
                ax.plot(a, model(law, a, bits), color=color, lw=1, ls=":")
                ax.plot([best.alpha], [best.mse], "o", color=color, ms=7, mec="white", mew=1.5)
            ax.set(yscale="log", xlabel="clip alpha / sigma", title=f"{bits} bits")
            ax.legend(title="best clip", loc="upper right" if bits == 4 else "lower right")
        axes[0].set_ylabel("MSE / sigma²")
        axes[0].text(
            0.02, 0.03, "solid: exact (midrise)   dotted: convex model", transform=axes[1].transAxes, color=grey
        )
        figure.savefig(FOLDER / "mse.png")
        plt.close(figure)

        figure, ax = plt.subplots(figsize=(7.2, 4.4))
        kappas = np.concatenate([np.linspace(-1.2, 0, 9), np.geomspace(0.05, 22, 24)])
        pairs = [(k, law) for k in kappas for law in reference_laws(float(k))]
        for kind, color, label in (
            (GeneralizedGaussian, orange, "generalized Gaussian"),
            (StudentT, green, "Student t"),
        ):
            x = [(k, float(optimal(law, objective="aciq").alpha)) for k, law in pairs if isinstance(law, kind)]
            ax.plot(*zip(*x, strict=True), color=color, lw=2.5, label=label)
        clips = [clip for _, clip in n["mixture_clips"]]
        ax.plot([3, 3], [min(clips), max(clips)], color=red, lw=5, alpha=0.45, solid_capstyle="butt",
                label="Gaussian scale mixtures with kappa = 3")  # fmt: skip
        line = np.linspace(-1.2, 22.2, 200)
        for kind, dash, color in (("published", ":", grey), ("fitted", "--", blue), ("spline", "-", blue)):
            ax.plot(
                line,
                kurtosis_rule(line, 4, kind, objective="aciq"),
                ls=dash,
                color=color,
                lw=1.2,
                label=f"rule, {kind}",
            )
        ax.set(xlabel="excess kurtosis kappa", ylabel="alpha* / sigma, 4 bits, convex model",
               title="The best clip is not a function of the kurtosis")  # fmt: skip
        ax.legend(loc="lower right", fontsize=9)
        figure.savefig(FOLDER / "kurtosis.png")
        plt.close(figure)

        figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
        rows = np.asarray(n["limit_bits"])
        for ax, name, start in zip(axes, ("Gaussian", "Laplace"), (1, 5), strict=True):
            bits = rows[:, 0]
            scaled = [10 * np.log10(rows[:, start + i] / rows[:, start]) for i in (1, 2, 3)]
            for y, color, label in zip(scaled, (grey, green, blue),
                                       ("sigma² 4^-B", "Lloyd-Max", "clipped uniform"), strict=True):  # fmt: skip
                ax.plot(bits, y, "o-", color=color, lw=2, ms=5, label=label)
            ax.set(title=name, xlabel="bits")
        axes[0].set_ylabel("dB above Shannon's lower bound")
        axes[0].legend(loc="upper left")
        figure.savefig(FOLDER / "limits.png")
        plt.close(figure)

        figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
        pair, a = [Gaussian(1), Gaussian(2)], np.linspace(2, 6.5, 300)
        errors = [model(law, a) / law.power for law in pair]
        front = np.asarray(n["pareto"])
        for y, color, label in zip(errors, (blue, orange), ("N(0, 1)", "N(0, 4)"), strict=True):
            axes[0].plot(a, y, color=color, lw=2, label=label)
        axes[0].plot(a, np.mean(errors, axis=0), color=grey, lw=1.5, label="mean")
        axes[0].plot(a, np.max(errors, axis=0), color=red, lw=1.5, ls="--", label="worst")
        axes[0].axvspan(front[0, 0], front[-1, 0], color="#dddddd", alpha=0.6, lw=0)
        axes[0].set(xlabel="shared clip", ylabel="MSE / sigma² of the language", ylim=(0, 0.06),
                    title="Two languages, one clip")  # fmt: skip
        axes[0].legend()
        axes[1].plot(front[:, 1], front[:, 2], color=blue, lw=2.5)
        axes[1].margins(0.12)
        axes[1].locator_params(axis="x", nbins=5)
        for i, label, align in ((0, "mean", "left"), (-1, "minimax", "right")):
            axes[1].plot(front[i, 1], front[i, 2], "o", color=blue, ms=7)
            place = (10, -3) if i == 0 else (-4, -16)
            axes[1].annotate(f"{label}: alpha = {front[i, 0]:.2f}", front[i, 1:], xytext=place,
                             textcoords="offset points", ha=align)  # fmt: skip
        axes[1].set(xlabel="mean of the normalized errors", ylabel="worst normalized error", title="Pareto front")
        figure.tight_layout()
        figure.savefig(FOLDER / "sharing.png")
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", metavar="DIR", help="a folder written by `la-aciq calibrate`")
    parser.add_argument("--check", action="store_true", help="only compare the page with numbers.json")
    arguments = parser.parse_args(argv)
    if arguments.check:
        stored = json.loads(NUMBERS.read_text(encoding="utf-8")) | measured()
        if PAGE.read_text(encoding="utf-8") != page(stored):
            print(
                "docs/theory.md differs from docs/theory/page.md and numbers.json: run python tools/generate_theory.py"
            )
            return 1
        return 0
    if arguments.profile:
        SUMMARY.write_text(json.dumps(summarize_profile(arguments.profile), indent=1) + "\n", encoding="utf-8")
    computed = numbers()
    NUMBERS.write_text(json.dumps(computed, indent=1) + "\n", encoding="utf-8")
    plots(computed)
    PAGE.write_text(page(json.loads(NUMBERS.read_text(encoding="utf-8")) | measured()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

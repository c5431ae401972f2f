"""Everything that the theory page computes; a test compares it with docs/theory/numbers.json."""

from typing import Any

import numpy as np
from scipy import optimize

from la_aciq import clipping, disparity
from la_aciq.clipping import (
    Empirical,
    Gaussian,
    GeneralizedGaussian,
    Laplace,
    Law,
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

from .laws import (
    LIMIT_LAWS,
    RULE_LAWS,
    light_slope,
    local_minima,
    model,
    ratio_floor,
    sample_kurtosis,
    scale_mixture,
    symmetric,
)

GAUSS, LAPLACE = Gaussian(), Laplace()


def numbers() -> dict[str, Any]:
    """All numbers by name, in the order of numbers.json."""
    parts = (
        convex_model,
        convexity,
        octav_steps,
        kurtosis_rules,
        sample_sizes,
        mixtures,
        sharing,
        limits,
        disparities,
    )
    return {name: value for part in parts for name, value in part().items()}


def convex_model() -> dict[str, Any]:
    """The convex model, the derivative in the source, and the best clips of three errors."""
    n: dict[str, Any] = {}
    best = optimal(GAUSS, objective="aciq")
    n["gauss_model_alpha"], n["gauss_model_mse"] = float(best.alpha), float(best.mse)
    n["gauss_banner_alpha"] = float(banner_clip(GAUSS, 4))
    n["laplace_banner_2bit_b"] = float(banner_clip(LAPLACE, 2)) * np.sqrt(2)
    n["source_derivative_ratio"] = float(2.5 * GAUSS.tail(2.5, 0) / GAUSS.tail(2.5, 1))
    wrong = float(optimize.brentq(lambda a: float(GAUSS.tail(a, 0)) - 1 / 675, 1, 6))
    n["source_root"], n["source_root_excess"] = wrong, float(model(GAUSS, wrong) / best.mse - 1)
    n["source_clip_excess"] = float(model(GAUSS, 2.83) / best.mse - 1)

    n["banner"] = [
        [bits, BANNER_GAUSS[bits - 1], float(banner_clip(GAUSS, bits)), BANNER_LAPLACE[bits - 1],
         float(banner_clip(LAPLACE, bits)) * np.sqrt(2)]
        for bits in range(1, 9)
    ]  # fmt: skip
    n["max"] = [[2**b, MAX_STEPS.get(2**b), *uniform_gaussian_quantizer(2**b)] for b in range(1, 9)]
    n["optima"] = []
    for bits in range(2, 9):
        row: list[Any] = [bits]
        for law in (GAUSS, LAPLACE):
            row.append(float(optimal(law, bits, objective="aciq").alpha))
            for codebook in ("midrise", "midtread"):
                optimum = optimal(law, bits, codebook)
                row += [float(optimum.alpha), float(optimum.mse)]
        n["optima"].append(row)
    n["optima_gauss_midrise"] = n["optima"][2][2]
    n["symmetric_gauss_alpha"], n["symmetric_gauss_mse"] = symmetric(GAUSS)
    n["symmetric_laplace_mse"] = symmetric(LAPLACE)[1]
    n["laplace_midtread_mse"] = float(optimal(LAPLACE, 4, "midtread").mse)
    return n


def convexity() -> dict[str, Any]:
    """Where the exact error is convex, and how many local minima it has."""
    n: dict[str, Any] = {}
    a = np.linspace(0.01, 60, 12_000)
    for bits in (2, 3, 4):
        n[f"midrise_curvature_min_{bits}"] = float(clipping.curvature(GAUSS, a, bits, "midrise", "exact").min())
        bend = clipping.curvature(GAUSS, a, bits, "midtread", "exact")
        n[f"midtread_concave_from_{bits}"] = float(a[bend < 0].min())
    counts = [local_minima(Empirical(np.random.default_rng(seed).standard_normal(128))) for seed in range(20)]
    n["local_minima_least"], n["local_minima_most"] = min(counts), max(counts)
    scan = optimal(GAUSS).certificate
    n["scan_knots"], n["scan_gap"] = len(scan.knots[0]), float(scan.gap)
    return n


def octav_steps() -> dict[str, Any]:
    """OCTAV's fixed point beside the minimum of its objective."""
    n: dict[str, Any] = {}
    n["octav"] = []
    for name, law in [("Gaussian", GAUSS), ("Laplace", LAPLACE), ("t, nu = 5", StudentT(5)), ("uniform", Uniform())]:
        for bits in (2, 4, 8):
            c = 4.0**-bits / 3

            def in_range(a: float, law: Law = law, c: float = c) -> float:
                return float(law.tail(a, 2) + c * a**2 * (1 - law.tail(a, 0)))

            exact = optimize.minimize_scalar(in_range, bounds=(0.3, 20), method="bounded", options={"xatol": 1e-11})
            fixed_point = octav(law, bits)
            n["octav"].append(
                [name, bits, fixed_point.steps, float(fixed_point.alpha), float(fixed_point.alpha / exact.x - 1),
                 in_range(float(fixed_point.alpha)) / exact.fun - 1]
            )  # fmt: skip
    n["octav_gauss_4_excess"] = n["octav"][1][5]
    n["octav_gauss_4_clip"] = n["octav"][1][4]
    n["octav_gauss_2_excess"] = n["octav"][0][5]
    n["octav_uniform_2_excess"] = n["octav"][9][5]
    n["octav_steps_least"] = min(row[2] for row in n["octav"])
    n["octav_steps_most"] = max(row[2] for row in n["octav"])
    return n


def kurtosis_rules() -> dict[str, Any]:
    """Rules that choose a clip by the kurtosis, and what no such rule can reach."""
    n: dict[str, Any] = {}
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
    # As p falls to 0 the larger part leaves the body: the limit is the clip of the Gaussian.
    ps = np.concatenate([np.geomspace(1e-14, 1e-5, 4), np.geomspace(1e-4, 0.1, 25), np.linspace(0.12, 0.499, 20)])
    clips = [float(optimal(scale_mixture(float(p)), objective="aciq").alpha) for p in ps]
    n["mixture_clips"] = [[float(p), clip] for p, clip in zip(ps, clips, strict=True)]
    n["mixture_clip_least"], n["mixture_clip_most"] = min(clips), max(clips)
    n["ratio_floor_midrise"], n["ratio_floor_midtread"] = ratio_floor(4, "midrise"), ratio_floor(4, "midtread")
    return n


def sample_sizes() -> dict[str, Any]:
    """How many samples a clip and a kurtosis need."""
    n: dict[str, Any] = {}
    n["samples"] = []
    for name, law in [*RULE_LAWS[:5], ("t, nu = 2.5", StudentT(2.5))]:
        n["samples"].append(
            [name, *(float(samples_for_interval(law, w, bits)) for bits in (4, 8) for w in (0.1, 0.05, 0.01))]
        )
    draws = np.array([sample_kurtosis(np.random.default_rng(seed).standard_t(5, 100_000)) for seed in range(600)])
    n["t5_kurtosis_low"], n["t5_kurtosis_high"] = (float(q) for q in np.quantile(draws, [0.05, 0.95]))
    # What another set of seeds would give: the standard deviation over resamples of the 600.
    again = np.quantile(np.random.default_rng(0).choice(draws, (400, len(draws))), [0.05, 0.95], axis=1).std(axis=1)
    n["t5_kurtosis_low_sd"], n["t5_kurtosis_high_sd"] = (float(x) for x in again)
    return n


def mixtures() -> dict[str, Any]:
    """Kurtosis of mixtures, with and without skewness."""
    n: dict[str, Any] = {}
    n["mixture_kurtosis"] = float(Mixture([Gaussian(1), Gaussian(3)], [0.9, 0.1]).kurtosis)
    skewed = [[1.0, 1.0, 2.0, 9.0], [-2.0, 1.0, 0.0, 3.0]]
    n["skew_kurtosis"] = disparity.EffectiveLaw(skewed, [0.7, 0.3]).kurtosis
    skewed[0][2] = 0.0
    n["no_skew_kurtosis"] = disparity.EffectiveLaw(skewed, [0.7, 0.3]).kurtosis
    return n


def sharing() -> dict[str, Any]:
    """One clip for two languages."""
    n: dict[str, Any] = {}
    gauss_mse = float(optimal(GAUSS, objective="aciq").mse)
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
            row += [float(model(law, clip) / law.power / gauss_mse - 1) for law in pair]
        n["sharing"].append(row)
    pair = [Gaussian(1), Gaussian(2)]
    separate = [float(optimal(law).mse) for law in pair]
    pooled = float(optimal(Mixture(pair, [0.5, 0.5])).alpha)
    n["raw_gap_own"] = separate[1] - separate[0]
    n["raw_gap_pooled"] = float(mse(pair[1], pooled) - mse(pair[0], pooled))
    wide = float(optimal(pair[1]).alpha)
    n["raw_gap_wide"] = float(mse(pair[1], wide) - mse(pair[0], wide))
    front = clipping.pareto(pair, objective="aciq", points=41)
    n["pareto"] = [[float(x) for x in row] for row in zip(front.alpha, front.mean, front.worst, strict=True)]
    n["pareto_mean_alpha"], n["pareto_worst_alpha"] = n["pareto"][0][0], n["pareto"][-1][0]
    n["pareto_mean_cost"] = n["pareto"][-1][1] / n["pareto"][0][1] - 1
    n["pareto_worst_gain"] = 1 - n["pareto"][-1][2] / n["pareto"][0][2]
    return n


def limits() -> dict[str, Any]:
    """Limits from rate-distortion theory and of quantizers."""
    n: dict[str, Any] = {}
    n["limits"] = []
    for name, law in LIMIT_LAWS:
        law_limits = disparity.limits(law)
        n["limits"].append(
            [name, float(disparity.entropy_power(law)), disparity.panter_dite_constant(law), law_limits.shannon,
             law_limits.gaussian, law_limits.lloyd_max, law_limits.quantizer,
             law_limits.decibels()["lloyd_max"],
             law_limits.decibels()["shannon"]]
        )  # fmt: skip
    n["rate_distortion"] = []
    for name, law in LIMIT_LAWS:
        curve = disparity.rate_distortion(law, 4)
        n["rate_distortion"].append([name, curve.lower, curve.upper])
    n["lloyd_max_local"] = _stationary(GeneralizedGaussian(0.5), _companded(GeneralizedGaussian(0.5), 16)).mse
    n["limit_bits"] = []
    for bits in range(2, 9):
        row = [bits]
        for law in (GAUSS, LAPLACE):
            x = disparity.limits(law, bits)
            row += [x.shannon, x.gaussian, x.lloyd_max, x.quantizer]
        n["limit_bits"].append(row)
    return n


def disparities() -> dict[str, Any]:
    """What equal kurtosis and a bounded kurtosis say of the gap between languages."""
    n: dict[str, Any] = {}
    scale, shape = disparity.equal_kurtosis_examples()
    n["example_scale_0"], n["example_scale_1"] = scale.mse
    n["example_shape_1"] = shape.normalized_mse[1]

    def t(kappa: float) -> Law:
        return StudentT(4 + 6 / kappa) if kappa > 0 else GAUSS

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

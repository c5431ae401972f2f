"""Rules that give alpha* / sigma from the excess kurtosis alone: fast, and a diagnostic; not a replacement for
`optimal`.

Kurtosis does not determine the clip: at kappa = 3 Gaussian scale mixtures of equal variance have clips from 2.52 to
3.69 sigma at INT4. So each set of coefficients states its domain and its worst-case excess error over the reference
families, the generalized Gaussian and the Student t (`docs/theory.md` has the table). `fitted` and `spline` are
minimax fits made by `fit_kurtosis_rule`; `published` is the pair of the source document, given for 4 bits only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import interpolate, optimize

from ..choices import CODEBOOKS
from .checks import Array, check_bits, check_choice, number, real_array
from .families import GeneralizedGaussian, StudentT, Uniform
from .kurtosis_coefficients import LINEAR, SPLINE
from .law import Law
from .objectives import mse
from .optimal import optimal

PUBLISHED = {4: (2.5, 0.3)}
COEFFICIENTS = ("fitted", "published", "spline")
# From the uniform law to the generalized Gaussian of exponent 1/2.
KAPPA_MIN, KAPPA_MAX = -1.2, 22.2
KNOTS = np.array([-1.2, -1.1, -0.9, -0.6, -0.3, 0, 0.3, 0.6, 1, 1.5, 2, 3, 4.5, 6, 9, 12, 16, KAPPA_MAX])


def kurtosis_rule(
    kappa: ArrayLike,
    bits: int = 4,
    coefficients: str = "fitted",
    codebook: str = "midrise",
    objective: str = "exact",
) -> Any:
    """alpha* / sigma from the excess kurtosis.

    Args:
        kappa: excess kurtosis mu_4 / mu_2^2 - 3 of the law, >= -2: a number or an array. inf is allowed for `spline`.
        bits: bits per value, 2 to 8.
        coefficients: `fitted`: c + d ln(1 + max(0, kappa)), fitted on 0 <= kappa <= 22.2 per bits and codebook.
            `published`: the same form with (2.5, 0.3) of the source document, for 4 bits alone. It is too flat: 14 %
            excess error for a Laplace law, 124 % for a uniform one. `spline`: a shape-preserving cubic through 18
            knots, fitted on -1.2 <= kappa <= 22.2 and constant outside.
        codebook: `midrise` or `midtread`, what the fits are for.
        objective: `exact`, the codebook's error, or `aciq`, the convex model, which does not depend on the codebook.

    Returns:
        The clip over the standard deviation: a float for a number, else float64 of kappa's shape.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is not among its choices, kappa is NaN, below -2, or inf without `spline`, or bits is
            not 4 for `published`.
    """
    bits = check_bits(bits)
    key = _key(codebook, objective)
    check_choice("coefficients", coefficients, COEFFICIENTS)
    k = real_array("kappa", kappa)
    if np.any(np.isnan(k)) or np.any(k < -2):
        raise ValueError(f"kappa: expected an excess kurtosis of at least -2, got {k[~(k >= -2)].ravel()[0]}")
    if coefficients == "spline":
        return _spline(np.asarray(SPLINE[key, bits]))(np.clip(k, KAPPA_MIN, KAPPA_MAX))[()]
    if np.any(np.isinf(k)):
        raise ValueError(f"kappa: expected finite values for coefficients={coefficients!r}, got inf (no fourth moment)")
    if coefficients == "published":
        if bits not in PUBLISHED:
            raise ValueError(f"bits: expected 4 for coefficients='published', got {bits}")
        c, d = PUBLISHED[bits]
    else:
        c, d, _worst = LINEAR[key, bits]
    return (c + d * np.log1p(np.maximum(k, 0)))[()]


def _key(codebook: str, objective: str) -> str:
    check_choice("codebook", codebook, CODEBOOKS)
    return codebook if check_choice("objective", objective, ("exact", "aciq")) == "exact" else "aciq"


def _spline(values: Array) -> Callable[[Array], Array]:
    curve = interpolate.PchipInterpolator(_warp(KNOTS), values)
    return lambda k: np.asarray(curve(_warp(k)))


def _warp(kappa: Array) -> Array:
    """A variable in which clips are close to linear in the kurtosis."""
    return np.asarray(np.log(kappa + 1.5))


def reference_laws(kappa: float) -> list[Law]:
    """The members of unit variance and excess kurtosis `kappa` of the reference families: generalized Gaussian, and
    Student t if kappa > 0.
    """
    kappa = number("kappa", kappa)
    if not KAPPA_MIN <= kappa <= KAPPA_MAX:
        raise ValueError(f"kappa: expected a number from {KAPPA_MIN} to {KAPPA_MAX}, got {kappa}")
    if kappa <= KAPPA_MIN + 1e-3:
        return [Uniform()]

    def surplus(log_beta: float) -> float:
        return float(GeneralizedGaussian(np.exp(log_beta)).kurtosis) - kappa

    laws: list[Law] = [GeneralizedGaussian(np.exp(optimize.brentq(surplus, np.log(0.45), np.log(500), xtol=1e-12)))]
    if kappa > 0:
        laws.append(StudentT(4 + 6 / kappa))
    return laws


@dataclass(frozen=True)
class KurtosisFit:
    """Minimax fits for one codebook and bits: `linear` (c, d), the `spline`'s values at `KNOTS`, and their worst-case
    excess errors.

    Excess is mse(rule) / mse(alpha*) - 1 over the reference laws at `kappas` (for `linear` those >= 0). `floor` is the
    least worst case of any function of kappa, over the spline's domain.
    """

    linear: tuple[float, float]
    linear_excess: float
    spline: tuple[float, ...]
    spline_excess: float
    floor: float
    kappas: Array


def fit_kurtosis_rule(bits: int = 4, codebook: str = "midrise", objective: str = "exact") -> KurtosisFit:
    """Refit both rules: what `kurtosis_coefficients.py` was written from (seconds at 4 bits, a minute at 8).

    Each fit minimizes the largest excess error over the reference laws: generalized Gaussians and Student t laws of
    18 kurtoses from -1.2 to 22.2 and 17 between them.

    Args:
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.
        objective: `exact` or `aciq`.

    Returns:
        The coefficients and their worst excess errors.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is not among its choices.
    """
    bits = check_bits(bits)
    _key(codebook, objective)
    # Twice as dense as the knots, so that the spline is judged between them too.
    kappas = np.sort(np.concatenate([KNOTS, np.exp(np.convolve(_warp(KNOTS), [0.5, 0.5], "valid")) - 1.5]))
    curves = [[_excess_curve(law, bits, codebook, objective) for law in reference_laws(k)] for k in kappas]

    def worst(alphas: Array, only: NDArray[np.bool_]) -> float:
        return max(curve(a) for a, row, use in zip(alphas, curves, only, strict=True) if use for curve in row)

    best_of_any = []
    for row in curves:
        least = optimize.minimize_scalar(
            lambda a, row=row: max(curve(a) for curve in row),
            bounds=(0.5, 30),
            method="bounded",
            options={"xatol": 1e-9},
        )
        best_of_any.append((float(least.x), float(least.fun)))
    everywhere = np.full(len(kappas), True)
    positive = kappas >= 0
    spline = np.asarray([best_of_any[int(np.searchsorted(kappas, k))][0] for k in KNOTS])

    logs = np.log1p(np.maximum(kappas, 0))
    start = np.polyfit(logs[positive], np.asarray([a for a, _ in best_of_any])[positive], 1)[::-1]
    for _ in range(3):
        # Nelder-Mead on a kinked function: restarts move it off false corners.
        fit = optimize.minimize(
            lambda p: worst(p[0] + p[1] * logs, positive),
            start,
            method="Nelder-Mead",
            options={"xatol": 1e-7, "fatol": 1e-9},
        )
        start = fit.x
    return KurtosisFit(
        linear=(float(fit.x[0]), float(fit.x[1])),
        linear_excess=float(fit.fun),
        spline=tuple(float(a) for a in spline),
        spline_excess=worst(_spline(spline)(kappas), everywhere),
        floor=max(value for _, value in best_of_any),
        kappas=kappas,
    )


def _excess_curve(law: Law, bits: int, codebook: str, objective: str) -> Callable[[float], float]:
    best = optimal(law, bits, codebook, objective)
    grid = float(best.alpha) * np.geomspace(0.3, 3, 120)
    # Interpolated in log alpha: 1e-6 accurate, and the fits evaluate it thousands of times.
    curve = interpolate.CubicSpline(np.log(grid), mse(law, grid, bits, codebook, objective) / best.mse - 1)
    lo, hi = float(grid[0]), float(grid[-1])

    def excess(a: float) -> float:
        inside = min(max(a, lo), hi)
        # Outside the grid any growing function keeps the search from going there.
        return float(curve(np.log(inside))) + abs(float(np.log(a / inside)))

    return excess

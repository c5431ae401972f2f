"""The three objectives: the mean squared error of a clipped uniform quantizer as a function of its clip alpha.

With N = 2^bits levels, step Delta = 2 alpha / (N - 1), K = (N - 1)^2 and (t)+ = max(t, 0):

- `aciq`      E((|X| - alpha)+)^2 + alpha^2 / (3 K): Banner et al. 2019, strictly convex for every law. Delta^2 / 12 =
  alpha^2 / (3 K).
- `in_range`  the noise only where it occurs: E((|X| - alpha)+)^2 + alpha^2 / (3 K) P(|X| <= alpha) (Sakr et al. 2022,
  OCTAV).
- `exact`     E(X - Q(X))^2 of the codebook itself, with no approximation.

The two models see the codebook only through Delta, so `midrise` and `midtread` share them. The exact objective tells
them apart.

The exact error in closed form. Q is a step function that jumps by Delta at thresholds t_j halfway between neighbouring
values, and at such a threshold (x - Q)^2 changes by -2 Delta (x - t_j). Summing the changes, with U(t) = E(|X| - t)+:

    midrise    E(|X| - Delta/2)^2 - 2 Delta sum_{j=1}^{N/2-1} U(j Delta)
    midtread   E X^2 - 2 Delta [ sum_{j=1}^{N/2-1} U((j - 1/2) Delta) + E(-X - alpha)+ ]

(the last term is the one value that the negative side of `midtread` has more; its threshold is alpha itself).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..choices import CODEBOOKS
from .checks import LARGEST_SCALE, Array, check_alpha, check_bits, check_choice, check_problem, real_array
from .law import Law, unit_law


def noise_factor(bits: int) -> float:
    """1 / (3 K) with K = (2^bits - 1)^2: the rounding noise of a clip is this times alpha^2."""
    return float(1 / (3 * (2**bits - 1) ** 2))


def thresholds(bits: int, codebook: str) -> Array:
    """The positive decision thresholds that both signs share, in units of Delta: [2^(bits-1) - 1]."""
    j = np.arange(1, 2 ** (bits - 1), dtype=np.float64)
    return j if codebook == "midrise" else j - 0.5


def mse(law: Law, alpha: ArrayLike, bits: int = 4, codebook: str = "midrise", objective: str = "exact") -> Array:
    """Mean squared error of a clipped uniform quantizer (this module's text has the formulas).

    Args:
        law: the law, or laws, of X.
        alpha: clips, finite and >= 0, in units of X; broadcasts against `law.shape`. 0 stands for the quantizer whose
            every value is 0.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`; the two models do not depend on it.
        objective: `exact`: the error of the codebook. `aciq`: the clipping error plus alpha^2 / (3 K), K = (2^bits -
            1)^2 (Banner et al. 2019). `in_range`: that noise only for values that are not clipped (Sakr et al. 2022).

    Returns:
        float64 of the broadcast shape, in units of X squared; 0 or inf where float64 has no such number.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a clip is negative or not finite, or an argument is not among its choices.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    law, alpha, scale = _scaled(law, alpha)
    error = mse_unchecked(law, alpha, bits, codebook, objective)
    with np.errstate(over="ignore", under="ignore"):
        return error if scale is None else np.asarray(error * scale * scale)


def _scaled(law: object, alpha: ArrayLike) -> tuple[Law, Array, Array | None]:
    """The law and the clips over the law's scale, and the scale (None for 1)."""
    unit, scale = unit_law(law)
    clips = check_alpha(alpha)
    if scale is None:
        return unit, clips, None
    with np.errstate(over="ignore", under="ignore"):
        clips = np.asarray(clips / scale)
    if np.any(clips > LARGEST_SCALE):
        raise ValueError(f"alpha: expected clips of at most {LARGEST_SCALE:.1e} times the law's scale, got larger ones")
    return unit, clips, scale


def mse_unchecked(law: Law, alpha: Array, bits: int, codebook: str, objective: str) -> Array:
    """`mse` for solvers, whose arguments have been checked once."""
    if objective == "aciq":
        return law.tail(alpha, 2) + noise_factor(bits) * alpha**2
    if objective == "in_range":
        return law.tail(alpha, 2) + noise_factor(bits) * alpha**2 * (1 - law.tail(alpha, 0))
    alpha = np.asarray(alpha, dtype=np.float64)
    delta = 2 * alpha / (2**bits - 1)
    excess = _over_thresholds(delta, law.shape, bits, codebook, lambda t, at: law.tail(at, 1))
    if codebook == "midrise":
        error = law.power - delta * law.mean_abs + delta**2 / 4 - 2 * delta * excess
    else:
        error = law.power - 2 * delta * (excess + law.below(-alpha, 1))
    # A quantizer that is exact up to rounding may come out at -1e-17.
    return np.asarray(np.maximum(error, 0))


_BLOCK = 1 << 14  # values per evaluation: enough to hide the cost of a call, few enough for the cache


def _over_thresholds(
    delta: Array, shape: tuple[int, ...], bits: int, codebook: str, term: Callable[[Array, Array], Array]
) -> Array:
    """Sum of term(t, t delta) over the positive thresholds t, in units of delta, that both signs share."""
    shape = np.broadcast_shapes(np.shape(delta), shape)
    t = thresholds(bits, codebook).reshape(-1, *[1] * len(shape))
    step = max(1, _BLOCK // max(1, math.prod(shape)))
    total: Any = 0.0
    for start in range(0, len(t), step):
        block = t[start : start + step]
        total = total + term(block, block * delta).sum(0)
    return np.asarray(total)


def slope(law: Law, alpha: ArrayLike, bits: int = 4, codebook: str = "midrise", objective: str = "exact") -> Array:
    """Derivative of `mse` with respect to alpha.

    Args:
        law: the law, or laws, of X.
        alpha: clips, finite and >= 0, in units of X; broadcasts against `law.shape`.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.
        objective: `exact`, `in_range` or `aciq`.

    Returns:
        float64 of the broadcast shape, in units of X; one-sided at the kinks of an empirical law.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a clip is negative or not finite, or an argument is not among its choices.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    law, alpha, scale = _scaled(law, alpha)
    derivative = _slope(law, alpha, bits, codebook, objective)
    return derivative if scale is None else np.asarray(derivative * scale)


def _slope(law: Law, alpha: Array, bits: int, codebook: str, objective: str) -> Array:
    c = noise_factor(bits)
    if objective == "aciq":
        return -2 * law.tail(alpha, 1) + 2 * c * alpha
    if objective == "in_range":
        density = law.density(alpha) + law.density(-alpha)
        return -2 * law.tail(alpha, 1) + 2 * c * alpha * (1 - law.tail(alpha, 0)) + c * alpha**2 * density
    per_alpha = 2 / (2**bits - 1)
    delta = per_alpha * alpha
    excess = _over_thresholds(delta, law.shape, bits, codebook, lambda t, at: law.tail(at, 1))
    mass = _over_thresholds(delta, law.shape, bits, codebook, lambda t, at: t * law.tail(at, 0))
    if codebook == "midrise":
        by_delta = -law.mean_abs + delta / 2 - 2 * excess + 2 * delta * mass
    else:
        by_delta = -2 * (excess + law.below(-alpha, 1)) + 2 * delta * mass + 2 * alpha * law.below(-alpha, 0)
    return np.asarray(by_delta * per_alpha)


def curvature(law: Law, alpha: ArrayLike, bits: int = 4, codebook: str = "midrise", objective: str = "exact") -> Array:
    """Second derivative of `mse` with respect to alpha.

    Args:
        law: the law, or laws, of X.
        alpha: clips, finite and >= 0, in units of X; broadcasts against `law.shape`.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.
        objective: `exact` or `aciq`.

    Returns:
        float64 of the broadcast shape, without a unit.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a clip is negative or not finite, an argument is not among its choices, or the objective is
            `in_range`.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    law, alpha, _ = _scaled(law, alpha)
    if objective == "aciq":
        return 2 * law.tail(alpha, 0) + 2 * noise_factor(bits)
    if objective == "in_range":
        raise ValueError(
            "objective: expected 'aciq' or 'exact', got 'in_range', whose curvature needs the density's derivative"
        )
    per_alpha = 2 / (2**bits - 1)
    delta = per_alpha * alpha

    def bend(t: Array, at: Array) -> Array:
        density = law.density(at) + law.density(-at)
        return np.asarray(4 * t * law.tail(at, 0) - 2 * delta * t**2 * density)

    total = _over_thresholds(delta, law.shape, bits, codebook, bend)
    if codebook == "midrise":
        total = total + 0.5
    else:
        t = (2**bits - 1) / 2
        total = total + 4 * t * law.below(-alpha, 0) - 2 * delta * t**2 * law.density(-alpha)
    return np.asarray(total * per_alpha**2)


def quantize(x: ArrayLike, alpha: ArrayLike, bits: int = 4, codebook: str = "midrise") -> NDArray[np.float64]:
    """Round x to the codebook of clip `alpha` in float64: the definition that `mse(..., objective="exact")` is the
    mean error of.

    Shapes broadcast. A clip of 0 gives 0. NaN gives NaN: this is the definition for statistics, not the kernel.
    """
    bits = check_bits(bits)
    check_choice("codebook", codebook, CODEBOOKS)
    n = 2**bits
    delta = 2 * check_alpha(alpha) / (n - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = real_array("x", x) / delta
    if codebook == "midrise":
        value = np.clip(np.floor(ratio), -n / 2, n / 2 - 1) + 0.5
    else:
        value = np.clip(np.rint(ratio), -n / 2, n / 2 - 1)
    return np.where(delta > 0, value * delta, 0.0)

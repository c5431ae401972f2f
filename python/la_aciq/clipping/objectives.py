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

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .laws import Array, Law

BITS = range(2, 9)
CODEBOOKS = ("midrise", "midtread")
OBJECTIVES = ("aciq", "in_range", "exact")


def check_bits(bits: object) -> int:
    """`bits` as an int, or an error naming the range."""
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)):
        raise TypeError(f"bits must be an integer from 2 to 8, got {bits!r}")
    if int(bits) not in BITS:
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits}")
    return int(bits)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`, or an error listing them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_problem(bits: object, codebook: object, objective: object) -> tuple[int, str, str]:
    """The three choices that define a clipping problem, each checked."""
    return (
        check_bits(bits),
        check_choice("codebook", codebook, CODEBOOKS),
        check_choice("objective", objective, OBJECTIVES),
    )


def check_alpha(alpha: ArrayLike) -> Array:
    """`alpha` as float64, finite and not negative (0 stands for the quantizer whose every value is 0)."""
    array = np.asarray(alpha, dtype=np.float64)
    bad = ~(np.isfinite(array) & (array >= 0))
    if np.any(bad):
        raise ValueError(f"alpha must be finite and not negative, got {float(array[bad].ravel()[0])}")
    return array


def noise_factor(bits: int) -> float:
    """1 / (3 K) with K = (2^bits - 1)^2: the rounding noise of a clip is this times alpha^2."""
    return float(1 / (3 * (2**bits - 1) ** 2))


def thresholds(bits: int, codebook: str) -> Array:
    """The positive decision thresholds that both signs share, in units of Delta: [2^(bits-1) - 1]."""
    j = np.arange(1, 2 ** (bits - 1), dtype=np.float64)
    return j if codebook == "midrise" else j - 0.5


def mse(law: Law, alpha: ArrayLike, bits: int = 4, codebook: str = "midrise", objective: str = "exact") -> Array:
    """Mean squared error of clipping at `alpha` (finite, >= 0; broadcasts against `law.shape`), in units of X
    squared.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    return mse_unchecked(law, check_alpha(alpha), bits, codebook, objective)


def mse_unchecked(law: Law, alpha: Array, bits: int, codebook: str, objective: str) -> Array:
    """`mse` for solvers, whose arguments have been checked once."""
    if objective == "aciq":
        return law.tail(alpha, 2) + noise_factor(bits) * alpha**2
    if objective == "in_range":
        return law.tail(alpha, 2) + noise_factor(bits) * alpha**2 * (1 - law.tail(alpha, 0))
    delta = 2 * alpha / (2**bits - 1)
    excess: Any = 0.0
    for t in thresholds(bits, codebook):
        excess = excess + law.tail(t * delta, 1)
    if codebook == "midrise":
        error = law.power - delta * law.mean_abs + delta**2 / 4 - 2 * delta * excess
    else:
        error = law.power - 2 * delta * (excess + law.below(-alpha, 1))
    # A quantizer that is exact up to rounding may come out at -1e-17.
    return np.asarray(np.maximum(error, 0))


def slope(law: Law, alpha: ArrayLike, bits: int = 4, codebook: str = "midrise", objective: str = "exact") -> Array:
    """Derivative of `mse` with respect to alpha, in units of X (a one-sided value at the kinks of an empirical law)."""
    bits, codebook, objective = check_problem(bits, codebook, objective)
    alpha = check_alpha(alpha)
    c = noise_factor(bits)
    if objective == "aciq":
        return -2 * law.tail(alpha, 1) + 2 * c * alpha
    if objective == "in_range":
        density = law.density(alpha) + law.density(-alpha)
        return -2 * law.tail(alpha, 1) + 2 * c * alpha * (1 - law.tail(alpha, 0)) + c * alpha**2 * density
    per_alpha = 2 / (2**bits - 1)
    delta = per_alpha * alpha
    excess: Any = 0.0
    mass: Any = 0.0
    for t in thresholds(bits, codebook):
        excess = excess + law.tail(t * delta, 1)
        mass = mass + t * law.tail(t * delta, 0)
    if codebook == "midrise":
        by_delta = -law.mean_abs + delta / 2 - 2 * excess + 2 * delta * mass
    else:
        by_delta = -2 * (excess + law.below(-alpha, 1)) + 2 * delta * mass + 2 * alpha * law.below(-alpha, 0)
    return np.asarray(by_delta * per_alpha)


def curvature(law: Law, alpha: ArrayLike, bits: int = 4, codebook: str = "midrise", objective: str = "exact") -> Array:
    """Second derivative of `mse` with respect to alpha (dimensionless), for `aciq` and `exact`."""
    bits, codebook, objective = check_problem(bits, codebook, objective)
    alpha = check_alpha(alpha)
    if objective == "aciq":
        return 2 * law.tail(alpha, 0) + 2 * noise_factor(bits)
    if objective == "in_range":
        raise ValueError(
            "curvature is defined for the objectives aciq and exact, got 'in_range' (it needs the density's derivative)"
        )
    per_alpha = 2 / (2**bits - 1)
    delta = per_alpha * alpha
    total: Any = 0.0
    for t in thresholds(bits, codebook):
        density = law.density(t * delta) + law.density(-t * delta)
        total = total + 4 * t * law.tail(t * delta, 0) - 2 * delta * t**2 * density
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
        ratio = np.asarray(x, dtype=np.float64) / delta
    if codebook == "midrise":
        value = np.clip(np.floor(ratio), -n / 2, n / 2 - 1) + 0.5
    else:
        value = np.clip(np.rint(ratio), -n / 2, n / 2 - 1)
    return np.where(delta > 0, value * delta, 0.0)

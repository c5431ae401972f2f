"""The rate-distortion function of a law under squared error, by Blahut and Arimoto's iteration.

For s > 0 let K(d) = exp(-s d^2). Any density q of reproductions y gives, with c(x) = integral of q(y) K(x - y) and the
channel q(y) K(x - y) / c(x), a point (R, D) on or above the curve. Any positive c gives a bound below it (Berger 1971,
theorem 2.5.3): D(R) >= (-R - E ln c(X) - ln max_y E[K(X - y) / c(X)]) / s. The iteration q(y) <- q(y) E[K(X - y) /
c(X)] brings the two together (Blahut 1972, Arimoto 1972); s is moved until the channel's rate is the one asked for.
Integrals are sums on an even grid of a sixth of the smallest error's root, out to where no more than 1e-6 of the power
lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import signal

from ..clipping.checks import Array, check_bits, number
from ..clipping.law import Law, check_single
from ..errors import LaAciqError


@dataclass(frozen=True)
class RateDistortion:
    """D(R) of one law: `lower` <= D <= `upper`, in units of X squared, at `rate` bits per value.

    `upper` is the error of a channel of at most that rate, `lower` a dual bound; both up to the grid's 1e-4 relative.
    """

    rate: float
    lower: float
    upper: float


def rate_distortion(law: Law, bits: int = 4, tolerance: float = 2e-3) -> RateDistortion:
    """The least error of any code of `bits` bits per value, however many values it codes together.

    Args:
        law: a single law with a density.
        bits: 2 to 6; beyond, Shannon's lower bound is within 0.1 % for the laws of this package.
        tolerance: the largest upper / lower - 1 that is returned, at least 1e-3.

    Returns:
        The bracket of the mean squared error, in units of X^2.

    Raises:
        ValueError: bits above 6.
        LaAciqError: a law without a density, or with tails too long for a grid of 2^17 points.
    """
    bits = check_bits(bits)
    if bits > 6:
        raise ValueError(f"bits: expected at most 6, got {bits}: Shannon's lower bound is as good there")
    law, tolerance = check_single(law), number("tolerance", tolerance)
    if tolerance < 1e-3:
        raise ValueError(f"tolerance: expected at least 0.001, got {tolerance}")
    if not np.isfinite(law.entropy()):
        raise LaAciqError("law: expected a density for its rate-distortion function, got point masses")
    least = float(np.exp(2 * law.entropy()) / (2 * np.pi * np.e)) * 4.0**-bits
    p, step = _grid(law, float(np.sqrt(least)) / 6)
    target = bits * np.log(2)
    s = 1 / (2 * least)
    q = p.copy()
    lower, upper = 0.0, np.inf
    for _ in range(60):
        for _ in range(25):
            c, ratio, kernel, offset = _channel(p, q, s, step)
            q = q * ratio
            q /= q.sum()
        c, ratio, kernel, offset = _channel(p, q, s, step)
        error = float(np.sum(p * _blur(q, kernel * offset**2) / c))
        # The channel's reproductions are distributed as q ratio, not as q: what it is short of is the rate's surplus.
        rate = -s * error - float(np.sum(p * np.log(c)))
        lower = max(lower, (-target - float(np.sum(p * np.log(c))) - float(np.log(ratio.max()))) / s)
        if rate <= target:
            upper = min(upper, error)
        if upper <= lower * (1 + tolerance):
            return RateDistortion(float(bits), lower, upper)
        # Near the end of the curve the rate grows by a half of ln s; a little less than the target is aimed at.
        s *= np.exp(np.clip(2 * (target - 2e-4 - rate), -1, 1))
    raise LaAciqError(
        f"tolerance: expected a bracket within {tolerance} of the rate-distortion function, got {lower} to {upper}"
    )


def _grid(law: Law, step: float) -> tuple[Array, float]:
    """Probabilities of evenly spaced points, and their distance."""
    center, reach = float(law.mean), 4 * float(law.std)
    while float(law.power_beyond(abs(center) + reach)) > 1e-6 * float(law.power):
        reach *= 1.2
        if 2 * reach / step > _MOST_POINTS:
            raise LaAciqError(
                f"law: expected tails that a grid of {_MOST_POINTS} points reaches, got power too far out"
            )
    n = int(np.ceil(reach / step))
    x = center + step * np.arange(-n, n + 1)
    edges = np.append(x - step / 2, x[-1] + step / 2)
    p = np.maximum(-np.diff(law.above(edges, 0)), 0)
    used = np.flatnonzero(p > 1e-15)
    p = p[used[0] : used[-1] + 1]
    return np.asarray(p / p.sum()), step


_MOST_POINTS = 1 << 17


def _channel(p: Array, q: Array, s: float, step: float) -> tuple[Array, Array, Array, Array]:
    """c on the grid, E[K(X - y) / c(X)] on the grid, the kernel, and its offsets."""
    half = int(np.ceil(6.5 / np.sqrt(2 * s) / step))
    offset = np.asarray(step * np.arange(-half, half + 1))
    kernel = np.asarray(np.exp(-s * offset**2))
    c = np.asarray(np.maximum(_blur(q, kernel), 1e-300))
    return c, _blur(p / c, kernel), kernel, offset


def _blur(values: Array, kernel: Array) -> Array:
    return np.asarray(signal.convolve(values, kernel, mode="same", method="direct"))

"""The best clip of a law, with a certificate that it is the global one.

The convex model. E(alpha) = E((|X| - alpha)+)^2 + alpha^2 / (3 K) has E'(alpha) = 2 alpha / (3 K) - 2 E(|X| - alpha)+
and E''(alpha) = 2 P(|X| > alpha) + 2 / (3 K) > 0 for every law of finite variance, and E'(0) = -2 E|X| < 0. So the
minimum is interior (the constraint alpha > 0 is inactive, its KKT multiplier is 0) and unique, and a sign change of E'
brackets it.

The other two objectives are minimized by branch and bound (`clipping.scan` has the proofs).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import LaAciqError
from .checks import Array, check_bits, check_problem, count, number
from .interval import clip_interval
from .law import Law, unit_law
from .objectives import curvature, mse_unchecked, noise_factor, quantize, slope
from .samples import Empirical
from .scan import NEGLIGIBLE, TOLERANCE, Scan, global_scan


@dataclass(frozen=True)
class Certificate:
    """Why `alpha` is the global minimizer, in numbers that can be checked without the solver.

    Fields are floats for one law, else arrays of its shape. Every law: `lower_bound` <= min MSE, and `gap` = (mse -
    lower_bound) / mse (0 when mse is), from 0 to 1, also where mse itself is no float64 number. `bracket` holds the
    minimizer, `bracket_slopes` the derivative at its ends: negative and positive, inf where the error of samples under
    `in_range` jumps up inside the bracket. `slope` is the derivative at alpha.

    method `convex`: strict convexity makes the sign change global; `curvature` > 0, `multiplier` of alpha > 0 is 0.
    method `scan`: `knots` and `values` are the scanned clips and their errors, one pair of arrays per law; between
    them and beyond the last knot the error is bounded as `clipping.scan` proves. `curvature` is the second
    derivative at alpha (NaN for `in_range`). method `constant`: all samples are one value c, and alpha puts a value of
    the codebook on c: the error is 0.
    """

    method: str
    lower_bound: Any
    gap: Any
    bracket: tuple[Any, Any]
    bracket_slopes: tuple[Any, Any]
    slope: Any
    curvature: Any
    multiplier: float
    # Hundreds of numbers, which printing leaves out.
    knots: tuple[Array, ...] = field(default=(), repr=False)
    values: tuple[Array, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Optimum:
    """The best clip of a law: `alpha` in units of X, `mse` in units of X squared; floats for one law, else arrays of
    its shape.

    `mse` is 0 or inf where float64 has no such number, for X of a scale below 1e-150 or above 1e150. `normalized_mse`,
    which is mse / E X^2, is right at any scale. `interval` is a 95 % interval on the best clip of the law that
    `Empirical` samples come from, independently, under objective `aciq` (see `clipping.interval`). It is None for the
    other objectives and laws, and where too few samples lie beyond the clip for 95 % to hold (`clipping.interval` says
    how few).
    """

    alpha: Any
    mse: Any
    normalized_mse: Any
    certificate: Certificate
    interval: tuple[float, float] | None = None


def optimal(law: Law, bits: int = 4, codebook: str = "midrise", objective: str = "exact") -> Optimum:
    """The clip that minimizes `mse(law, alpha, bits, codebook, objective)`, for one law or an array of laws.

    `aciq` is solved by Newton's method in a bracket, the other two objectives by branch and bound (`clipping.scan`).

    Samples (`Empirical`) come with a 95 % interval on their law's best clip under `aciq`, where it holds (`Optimum`).
    Fewer than four samples per level of the codebook are refused, since then a codebook can follow the sample instead
    of the law.

    A constant sample c gives the clip that has c among its values (midrise |c|; midtread |c| (N-1)/(N-2), or |c|
    (N-1)/N for c < 0), whose error is 0 under the codebook itself; the models, which assume values spread over cells,
    are not consulted. One-sided data (all positive) uses one half of the symmetric codebook, and the exact objective
    accounts for it.

    Args:
        law: the law, or laws, of X.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`; the two models do not depend on it.
        objective: `exact`, `in_range` or `aciq` (see `mse`).

    Returns:
        The clip, its error, and a certificate that it is the global minimum: arrays of `law.shape`, or floats.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is not among its choices, every value is zero, so that there is no scale for a clip, or
            there are too few samples.
        LaAciqError: the law is too extreme for a proof in float64, or for one with at most `scan.MOST_CLIPS` clips.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    law, scale = unit_law(law)
    best = _optimal(law, bits, codebook, objective)
    return best if scale is None else _rescaled(best, scale)


def _optimal(law: Law, bits: int, codebook: str, objective: str) -> Optimum:
    """`optimal` of laws whose squares are float64 numbers."""
    if np.any(law.power == 0):
        raise ValueError(
            "law: expected positive power, got values that are all zero, which give no scale to choose a clip by"
        )
    samples = law.samples if isinstance(law, Empirical) else None
    if samples is not None:
        if samples.size < minimum_samples(bits):
            raise ValueError(
                f"samples: expected at least {minimum_samples(bits)} values for {bits} bits (four per level), "
                f"got {samples.size}"
            )
        if samples[0] == samples[-1]:
            return _of_constant(float(samples[0]), bits, codebook)
    flat = law.take(np.arange(law.size))
    check_tails(flat)
    convex = convex_root(flat, law.size, bits)
    if objective == "aciq":
        alpha, error = convex, mse_unchecked(flat, convex, bits, codebook, objective)
        certificate = _convex_certificate(flat, convex, bits, codebook)
    else:
        scan = global_scan(flat, convex, bits, codebook, objective)
        alpha, error = scan.alpha, scan.error
        if samples is not None and objective == "exact":
            alpha, error = _least_squares(samples, alpha, error, bits, codebook)
        certificate = _scan_certificate(flat, scan, alpha, error, bits, codebook, objective)
    _check_certificate(certificate, error, flat.power, objective)
    interval = None
    if samples is not None and objective == "aciq":
        interval = clip_interval(samples, float(alpha[0]), bits)
    return Optimum(
        alpha=np.reshape(alpha, law.shape)[()],
        mse=np.reshape(error, law.shape)[()],
        normalized_mse=np.reshape(error / flat.power, law.shape)[()],
        certificate=_shaped(certificate, law.shape),
        interval=interval,
    )


def check_tails(law: Law) -> None:
    """LaAciqError when a law's tails cannot be those of one law: what is computed from them would prove nothing.

    P(|X| > a), E(|X| - a)+ and its square are each minus the integral of the one before (with a factor of 2), so their
    differences lie between the values at the ends of an interval.
    """
    grid = np.concatenate([[0.0], np.geomspace(2.0**-12, 2.0**7, 58)])
    rms = np.broadcast_to(law.rms, (law.size,))
    a = grid[:, None] * rms
    mass, excess, square = (law.tail(a, k) / rms**k for k in range(3))
    width = np.diff(grid)[:, None]
    wrong = ~np.isfinite(mass + excess + square)
    wrong |= (mass < -_ROUNDING) | (mass > 1 + _ROUNDING)
    for lower, higher, factor in ((mass, excess, 1), (excess, square, 2)):
        fall = -np.diff(higher, axis=0)
        wrong[1:] |= fall < factor * width * lower[1:] - _ROUNDING * (1 + width)
        wrong[1:] |= fall > factor * width * lower[:-1] + _ROUNDING * (1 + width)
    wrong[0] |= np.abs(square[0] - 1) > 1e-8
    if wrong.any():
        point, which = np.argwhere(wrong)[0]
        raise LaAciqError(
            f"law: expected consistent tails, got {mass[point, which]}, {excess[point, which]} and "
            f"{square[point, which]} at {grid[point]:.3g} rms: its parameters are too extreme for float64"
        )


_ROUNDING = 1e-9


def _check_certificate(certificate: Certificate, error: Array, power: Array, objective: str) -> None:
    """LaAciqError unless the certificate proves what it is for."""
    tolerance = TOLERANCE.get(objective, 1e-9)
    allowed = np.maximum(1.01 * tolerance * error, 1.01 * NEGLIGIBLE * power)
    rising, falling = certificate.bracket_slopes[1] > 0, certificate.bracket_slopes[0] < 0
    exact = error <= NEGLIGIBLE * power
    proved = np.isfinite(error) & (error - certificate.lower_bound <= allowed) & ((rising & falling) | exact)
    if not proved.all():
        i = int(np.argmin(proved))
        raise LaAciqError(
            f"law: expected a best clip that can be proved in float64, got an error of {error[i]} with a lower bound "
            f"of {certificate.lower_bound[i]} and slopes of {certificate.bracket_slopes[0][i]} and "
            f"{certificate.bracket_slopes[1][i]} around it"
        )


def _least_squares(samples: Array, alpha: Array, error: Array, bits: int, codebook: str) -> tuple[Array, Array]:
    """The clip, and its error summed over the samples, that is best for the codes that samples have at `alpha` [1].

    Sums over samples have no cancellation: data on a grid get the clip that reproduces them, with the error 0.
    """
    best, least = float(alpha[0]), np.inf
    for _ in range(20):
        rounded = quantize(samples, best, bits, codebook)
        residual = float(np.mean((samples - rounded) ** 2))
        if residual >= least:
            break
        least, chosen = residual, best
        values = rounded / best
        best = float(samples @ values / (values @ values))
    # Where nothing is gained beyond rounding the scanned clip stays.
    power = float(np.mean(samples**2))
    gained = least < float(error[0]) - 1e-15 * power or least <= 1e-24 * power
    return (np.array([chosen]), np.array([least])) if gained else (alpha, error)


def minimum_samples(bits: int) -> int:
    """The fewest samples that `optimal` accepts: four per level of the codebook.

    Args:
        bits: bits per value, 2 to 8.

    Returns:
        4 times 2^bits.
    """
    return 4 << check_bits(bits)


def samples_for_interval(law: Law, relative_half_width: float, bits: int = 4) -> Array:
    """Independent samples after which the 95 % interval on the best clip alpha* of the convex model is narrow enough.

    alpha* solves E psi = 0 with psi = 2 alpha / (3 K) - 2 (|X| - alpha)+, so by the delta method sd(alpha*) = sd(psi) /
    (E''(alpha) sqrt(n)): finite for every law of finite variance, whereas the error of a sample's kurtosis needs eight
    moments.

    Args:
        law: the law, or laws, of X.
        relative_half_width: half the interval's width over alpha*, between 0 and 1.
        bits: bits per value, 2 to 8.

    Returns:
        How many samples, rounded up: float64 of `law.shape`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: relative_half_width is not between 0 and 1, or bits not from 2 to 8.
    """
    (law, _), relative_half_width = unit_law(law), number("relative_half_width", relative_half_width)
    if not 0 < relative_half_width < 1:
        raise ValueError(f"relative_half_width: expected a number between 0 and 1, got {relative_half_width}")
    alpha = optimal(law, bits, objective="aciq").alpha
    spread = 4 * (law.tail(alpha, 2) - law.tail(alpha, 1) ** 2)
    bend = curvature(law, alpha, bits, objective="aciq")
    return np.asarray(np.ceil(1.959964**2 * spread / (bend * alpha * relative_half_width) ** 2))


@dataclass(frozen=True)
class Octav:
    """OCTAV's fixed point: `alpha` (a float for one law), the `trace` of iterates [steps + 1, ...] from 0, and whether
    it `converged`.
    """

    alpha: Any
    trace: Array
    converged: bool

    @property
    def steps(self) -> int:
        """Iterations done."""
        return len(self.trace) - 1


def octav(law: Law, bits: int = 4, tolerance: float = 1e-4, max_steps: int = 100) -> Octav:
    """Sakr et al. 2022 (OCTAV): a <- E[|X| ; |X| > a] / (c P(|X| <= a) + P(|X| > a)), c = 4^-bits / 3, from a = 0.

    Newton's step for the in-range model with the density at the clip left out; the sums it needs are tail counts and
    tail sums of |x|, which a quantization kernel returns for free.

    Args:
        law: the law, or laws, of X.
        bits: bits per value, 2 to 8.
        tolerance: iteration stops when no clip moves by more than this share; positive.
        max_steps: the most iterations, at least 1.

    Returns:
        The last clips, in units of X, all iterates, and whether they converged.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: tolerance is not positive, or bits or max_steps is out of range.
    """
    c = 4.0 ** -check_bits(bits) / 3
    (law, scale), tolerance = unit_law(law), number("tolerance", tolerance)
    if tolerance <= 0:
        raise ValueError(f"tolerance: expected a positive number, got {tolerance}")
    max_steps = count("max_steps", max_steps, 1)
    trace = [np.zeros(law.shape)]
    converged = False
    while not converged and len(trace) <= max_steps:
        a = trace[-1]
        mass = law.tail(a, 0)
        trace.append((law.tail(a, 1) + a * mass) / (c * (1 - mass) + mass))
        converged = bool(np.all(np.abs(trace[-1] - a) <= tolerance * trace[-1]))
    iterates = np.stack(trace) if scale is None else np.stack(trace) * scale
    return Octav(alpha=iterates[-1][()], trace=iterates, converged=converged)


def _of_constant(c: float, bits: int, codebook: str) -> Optimum:
    n = 2**bits
    alpha = abs(c)
    if codebook == "midtread":
        alpha *= (n - 1) / (n - 2) if c > 0 else (n - 1) / n
    a, zero, nan = np.float64(alpha), np.float64(0), np.float64(np.nan)
    certificate = Certificate("constant", zero, zero, (a, a), (nan, nan), nan, nan, 0.0)
    return Optimum(a, zero, zero, certificate, (alpha, alpha))


def convex_root(law: Law, size: int, bits: int) -> Array:
    """Root of g(a) = E(|X| - a)+ - a / (3 K), which decreases and is convex: Newton's method inside a shrinking
    bracket.
    """
    c = noise_factor(bits)
    lo, hi = np.zeros(size), np.broadcast_to(law.mean_abs / c, (size,))
    a = np.minimum(np.broadcast_to(law.rms, (size,)), hi / 2)
    for _ in range(200):
        value = law.tail(a, 1) - c * a
        lo, hi = np.where(value >= 0, a, lo), np.where(value <= 0, a, hi)
        newton = a + value / (law.tail(a, 0) + c)
        moved = np.where((newton >= lo) & (newton <= hi), newton, (lo + hi) / 2)
        converged = np.abs(moved - a) <= 4e-16 * a
        a = moved
        if converged.all():
            break
    return np.asarray(a)


def _convex_certificate(law: Law, alpha: Array, bits: int, codebook: str) -> Certificate:
    ends, slopes = _sign_change(law, alpha, bits, codebook, "aciq")
    error = mse_unchecked(law, alpha, bits, codebook, "aciq")
    # Convexity: the minimum is above the tangents at both ends of the bracket.
    lowest = error - np.maximum(-slopes[0], slopes[1]) * (ends[1] - ends[0])
    bend = curvature(law, alpha, bits, codebook, "aciq")
    return Certificate(
        "convex", lowest, (error - lowest) / error, ends, slopes, slope(law, alpha, bits, codebook, "aciq"), bend, 0.0
    )


def _sign_change(
    law: Law, alpha: Array, bits: int, codebook: str, objective: str
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The narrowest bracket around alpha (relative half width 1e-13 times a power of ten) where the derivative
    changes sign, or the error of samples jumps up.
    """
    width = np.full_like(alpha, 1e-13)
    for _ in range(11):
        lo, hi = alpha * (1 - width), alpha * (1 + width)
        low, high = slope(law, lo, bits, codebook, objective), slope(law, hi, bits, codebook, objective)
        if objective == "in_range":
            # A value x under the in-range model adds alpha^2 / (3 K) P(X = x) to the error from alpha = x on.
            jump = noise_factor(bits) * alpha**2 * (law.tail(lo, 0) - law.tail(hi, 0))
            smooth = 2 * noise_factor(bits) * alpha * (law.density(alpha) + law.density(-alpha)) * (hi - lo) * alpha
            high = np.where((jump > smooth) & (high < 0), np.inf, high)
        open_ends = ~((low < 0) & (high > 0))
        if not open_ends.any():
            break
        width = np.where(open_ends, width * 10, width)
    return (lo, hi), (low, high)


def _scan_certificate(
    law: Law, scan: Scan, alpha: Array, error: Array, bits: int, codebook: str, objective: str
) -> Certificate:
    lower = np.clip(np.minimum(scan.lower, error), 0, None)
    ends, slopes = _sign_change(law, alpha, bits, codebook, objective)
    bend = curvature(law, alpha, bits, codebook, objective) if objective == "exact" else np.full_like(alpha, np.nan)
    clips, errors = zip(*(scan.of(i) for i in range(len(alpha))), strict=True)
    return Certificate(
        method="scan",
        lower_bound=lower,
        gap=np.divide(error - lower, error, out=np.zeros_like(error), where=error > 0),
        bracket=ends,
        bracket_slopes=slopes,
        slope=slope(law, alpha, bits, codebook, objective),
        curvature=bend,
        multiplier=0.0,
        knots=tuple(clips),
        values=tuple(errors),
    )


def _rescaled(best: Optimum, scale: Array) -> Optimum:
    """The optimum of X from that of X / scale."""
    c = best.certificate

    def square(x: Any, by: Any = scale) -> Any:
        with np.errstate(over="ignore", under="ignore"):
            return (x * by * by)[()]

    def slope_of(x: Any) -> Any:
        # Away from zero, so that the sign stays.
        return np.where(x == 0, 0.0, np.copysign(np.maximum(np.abs(x * scale), _LEAST_FLOAT), x))[()]

    # Down to what is certainly a lower bound where float64 has no such number.
    lower = square(c.lower_bound)
    lower = np.where(lower < _FLOAT.tiny, 0.0, np.minimum(lower, _FLOAT.max))[()]
    each = np.ravel(scale)
    certificate = replace(
        c,
        lower_bound=lower,
        bracket=(c.bracket[0] * scale, c.bracket[1] * scale),
        bracket_slopes=(slope_of(c.bracket_slopes[0]), slope_of(c.bracket_slopes[1])),
        slope=c.slope * scale,
        knots=tuple(clips * by for clips, by in zip(c.knots, each, strict=False)),
        values=tuple(square(errors, by) for errors, by in zip(c.values, each, strict=False)),
    )
    interval = best.interval and (best.interval[0] * float(scale), best.interval[1] * float(scale))
    return replace(
        best, alpha=(best.alpha * scale)[()], mse=square(best.mse), certificate=certificate, interval=interval
    )


_FLOAT = np.finfo(np.float64)
_LEAST_FLOAT = float(_FLOAT.smallest_subnormal)


def _shaped(certificate: Certificate, shape: tuple[int, ...]) -> Certificate:
    def to(x: Any) -> Any:
        return np.reshape(x, shape)[()] if isinstance(x, np.ndarray) else x

    c = certificate
    return Certificate(
        c.method,
        to(c.lower_bound),
        to(c.gap),
        (to(c.bracket[0]), to(c.bracket[1])),
        (to(c.bracket_slopes[0]), to(c.bracket_slopes[1])),
        to(c.slope),
        to(c.curvature),
        c.multiplier,
        c.knots,
        c.values,
    )

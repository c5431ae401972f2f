"""The best clip of a law, with a certificate that it is the global one.

The convex model. E(alpha) = E((|X| - alpha)+)^2 + alpha^2 / (3 K) has E'(alpha) = 2 alpha / (3 K) - 2 E(|X| - alpha)+
and E''(alpha) = 2 P(|X| > alpha) + 2 / (3 K) > 0 for every law of finite variance, and E'(0) = -2 E|X| < 0. So the
minimum is interior (the constraint alpha > 0 is inactive, its KKT multiplier is 0) and unique, and a sign change of E'
brackets it.

The exact error is not convex, but it is semi-concave. Rounding to the nearest value minimizes over assignments q of
values to x:

    MSE(alpha) = min_q E(X - alpha q(X))^2 = min_q [ E X^2 - 2 alpha E(X q) + alpha^2 E q^2 ],

a minimum of parabolas. If the assignments that are best somewhere in [l, r] all have E q^2 <= C, then MSE(alpha) - C
alpha^2 is concave there, so

    MSE(alpha) >= chord(alpha) - C (alpha - l) (r - alpha)   on [l, r],

and what lies between two grid points is at most C (r - l)^2 / 4 below their smaller value. |q| is at most |x| / alpha
+ 1 / (N - 1) and at most 1 (N / (N - 1) for `midtread`), hence C = min(1, rms / l + 1 / (N - 1))^2. Intervals whose
bound is below the best value found are halved until none is, to a relative tolerance; their number grows only with the
logarithm of the tolerance. Nothing lies beyond a cap A either: for `midrise` the values nearest zero are +-Delta/2, so
sqrt(MSE) >= Delta/2 - rms; for `midtread` the error is at least E[X^2 ; |X| < Delta/2], which grows with alpha.

The in-range model is bounded on [l, r] by the tangents of its convex clipping term plus alpha^2 / (3 K) P(|X| <= l).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .histogram import Bins, optimal_bins
from .laws import Array, Empirical, Law
from .objectives import check_bits, check_problem, curvature, mse_unchecked, noise_factor, slope

# Relative distance between the error found and the proved lower bound.
_TOLERANCE = {"exact": 1e-8, "in_range": 1e-6}
# Errors below this share of the power are rounding.
_NEGLIGIBLE = 1e-13


@dataclass(frozen=True)
class Certificate:
    """Why `alpha` is the global minimizer, in numbers that can be checked without the solver.

    Fields are floats for one law, else arrays of its shape. Every law: `lower_bound` <= min MSE, and `gap` = (mse -
    lower_bound) / mse (0 when mse is). `bracket` holds the minimizer, `bracket_slopes` the derivative at its ends
    (negative, positive), `slope` at alpha.

    method `convex`: strict convexity makes the sign change global; `curvature` > 0, `multiplier` of alpha > 0 is 0.
    method `scan`: `knots` and `values` are the scanned clips and their errors, one pair of arrays per law; between
    them and beyond the last knot the error is bounded as this module's text proves. `curvature` is the second
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

    `normalized_mse` is mse / E X^2. `interval` is a 95 % interval on alpha* when the law is `Empirical` samples, else
    None.
    """

    alpha: Any
    mse: Any
    normalized_mse: Any
    certificate: Certificate
    interval: tuple[float, float] | None = None


def optimal(law: Law, bits: int = 4, codebook: str = "midrise", objective: str = "exact") -> Optimum:
    """The clip that minimizes `mse(law, alpha, bits, codebook, objective)`, for one law or an array of laws.

    Samples (`Empirical`) come with an interval on alpha*, by 200 multinomial resamples of their log-histogram (fixed
    seed); fewer than four samples per level of the codebook are refused, since then a codebook can follow the sample
    instead of the law.

    A constant sample c gives the clip that has c among its values (midrise |c|; midtread |c| (N-1)/(N-2), or |c|
    (N-1)/N for c < 0), whose error is 0 under the codebook itself; the models, which assume values spread over cells,
    are not consulted. A sample of zeros has no scale, so no clip: ValueError. One-sided data (all positive) uses one
    half of the symmetric codebook, and the exact objective accounts for it.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    if not isinstance(law, Law):
        raise TypeError(f"law must be a clipping law such as Gaussian(), got {type(law).__name__}")
    if np.any(law.power == 0):
        raise ValueError("law must have positive power: every value is zero, which gives no scale to choose a clip by")
    samples = law.samples if isinstance(law, Empirical) else None
    if samples is not None:
        if samples.size < minimum_samples(bits):
            raise ValueError(
                f"samples must hold at least {minimum_samples(bits)} values for {bits} bits (four per level), "
                f"got {samples.size}"
            )
        if samples[0] == samples[-1]:
            return _of_constant(float(samples[0]), bits, codebook)
    flat = law.take(np.arange(law.size))
    convex = _convex_root(flat, law.size, bits)
    if objective == "aciq":
        alpha, certificate = convex, _convex_certificate(flat, convex, bits, codebook)
    else:
        alpha, certificate = _global_scan(flat, convex, bits, codebook, objective)
    error = mse_unchecked(flat, alpha, bits, codebook, objective)
    interval = None if samples is None else _interval(samples, float(alpha[0]), bits, codebook, objective)
    return Optimum(
        alpha=np.reshape(alpha, law.shape)[()],
        mse=np.reshape(error, law.shape)[()],
        normalized_mse=np.reshape(error / flat.power, law.shape)[()],
        certificate=_shaped(certificate, law.shape),
        interval=interval,
    )


def minimum_samples(bits: int) -> int:
    """The fewest samples `optimal` accepts: four per level."""
    return 4 << check_bits(bits)


def samples_for_interval(law: Law, relative_half_width: float, bits: int = 4) -> Array:
    """Independent samples after which the 95 % interval on alpha* is +- relative_half_width * alpha* (delta method,
    convex model).

    alpha* solves E psi = 0 with psi = 2 alpha / (3 K) - 2 (|X| - alpha)+, so sd(alpha*) = sd(psi) / (E''(alpha)
    sqrt(n)): finite for every law of finite variance, whereas the kurtosis' own error needs eight moments.
    """
    if not 0 < relative_half_width < 1:
        raise ValueError(f"relative_half_width must be between 0 and 1, got {relative_half_width}")
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
    tail sums of |x|, which a quantization kernel returns for free. Stops when no iterate moves by more than
    `tolerance` relative.
    """
    c = 4.0 ** -check_bits(bits) / 3
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    trace = [np.zeros(law.shape)]
    converged = False
    while not converged and len(trace) <= max_steps:
        a = trace[-1]
        mass = law.tail(a, 0)
        trace.append((law.tail(a, 1) + a * mass) / (c * (1 - mass) + mass))
        converged = bool(np.all(np.abs(trace[-1] - a) <= tolerance * trace[-1]))
    return Octav(alpha=trace[-1][()], trace=np.stack(trace), converged=converged)


def _of_constant(c: float, bits: int, codebook: str) -> Optimum:
    n = 2**bits
    alpha = abs(c)
    if codebook == "midtread":
        alpha *= (n - 1) / (n - 2) if c > 0 else (n - 1) / n
    a, zero, nan = np.float64(alpha), np.float64(0), np.float64(np.nan)
    certificate = Certificate("constant", zero, zero, (a, a), (nan, nan), nan, nan, 0.0)
    return Optimum(a, zero, zero, certificate, (alpha, alpha))


def _convex_root(law: Law, size: int, bits: int) -> Array:
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
        done = np.abs(moved - a) <= 4e-16 * a
        a = moved
        if done.all():
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
    changes sign.
    """
    width = np.full_like(alpha, 1e-13)
    for _ in range(11):
        lo, hi = alpha * (1 - width), alpha * (1 + width)
        slopes = slope(law, lo, bits, codebook, objective), slope(law, hi, bits, codebook, objective)
        open_ends = ~((slopes[0] < 0) & (slopes[1] > 0))
        if not open_ends.any():
            break
        width = np.where(open_ends, width * 10, width)
    return (lo, hi), slopes


class Intervals:
    """Intervals of clips under examination: problem number, ends and the values of the objective's parts at the
    ends.
    """

    def __init__(self, problem: NDArray[np.intp], left: Array, right: Array, at_left: Array, at_right: Array) -> None:
        self.problem, self.left, self.right = problem, left, right
        self.at_left, self.at_right = at_left, at_right  # [parts, intervals]; part 0 is the error

    def select(self, mask: NDArray[np.bool_]) -> Intervals:
        return Intervals(
            self.problem[mask], self.left[mask], self.right[mask], self.at_left[:, mask], self.at_right[:, mask]
        )

    def halves(self, middle: Array, at_middle: Array) -> Intervals:
        return Intervals(
            np.concatenate([self.problem, self.problem]),
            np.concatenate([self.left, middle]),
            np.concatenate([middle, self.right]),
            np.concatenate([self.at_left, at_middle], axis=1),
            np.concatenate([at_middle, self.at_right], axis=1),
        )


def parts(law: Law, alpha: Array, bits: int, codebook: str, objective: str) -> Array:
    """The error at alpha and, for the two models, what their bounds need besides: [1 or 4, clips].

    Those are the probability of no rounding noise, and the clipping error's excess E(|X| - alpha)+ and value.
    """
    if objective == "exact":
        return mse_unchecked(law, alpha, bits, codebook, objective)[None]
    silent, excess, square = (law.tail(alpha, k) for k in range(3))
    if objective == "aciq":
        silent = np.zeros_like(silent)
    return np.stack([square + noise_factor(bits) * alpha**2 * (1 - silent), silent, excess, square])


def bounds(intervals: Intervals, rms: Array, bits: int, codebook: str, objective: str) -> Array:
    """Proved lower bound of the objective on every interval."""
    left, right = intervals.left, intervals.right
    if objective == "exact":
        return chord_bound(left, right, intervals.at_left[0], intervals.at_right[0], rms, bits, codebook)
    c = noise_factor(bits) * (1 - intervals.at_left[1])

    def tangent(start: Array, square: Array, excess: Array, lo: Array, hi: Array) -> Array:
        # min over [lo, hi] of square - 2 excess (a - start) + c a^2
        best = np.clip(np.divide(excess, c, out=np.full_like(c, np.inf), where=c > 0), lo, hi)
        return np.asarray(square - 2 * excess * (best - start) + c * best**2)

    # Noise at least c a^2 with c of the left end; a clipping error above its tangents.
    from_left = tangent(left, intervals.at_left[3], intervals.at_left[2], left, right)
    from_right = tangent(right, intervals.at_right[3], intervals.at_right[2], left, right)
    # Rounding in the tail sums must not push the bound above the values at the ends.
    ends = np.minimum(intervals.at_left[0], intervals.at_right[0])
    return np.asarray(np.minimum(np.maximum(from_left, from_right), ends))


def chord_bound(
    left: Array, right: Array, at_left: Array, at_right: Array, rms: Array, bits: int, codebook: str
) -> Array:
    """Lower bound of the exact error on [left, right] from its values at the ends (see this module's text)."""
    n = 2**bits
    width = right - left
    largest = 1.0 if codebook == "midrise" else n / (n - 1)
    with np.errstate(divide="ignore"):
        c = np.minimum(largest, np.where(left > 0, rms / left, np.inf) + 1 / (n - 1)) ** 2
    tilt = (at_right - at_left) / width
    u = np.clip((width - tilt / c) / 2, 0, width)
    return np.asarray(at_left + tilt * u - c * u * (width - u))


def cap(law: Law, error: Array, bits: int, codebook: str, objective: str) -> Array:
    """A clip beyond which no clip is better than `error` (proved in this module's text)."""
    n = 2**bits
    if objective == "exact" and codebook == "midrise":
        return np.asarray((n - 1) * (law.rms + np.sqrt(error)))
    a = np.broadcast_to(law.rms, np.shape(error)).copy()
    for _ in range(1100):
        if objective == "in_range":
            least = noise_factor(bits) * a**2 * (1 - law.tail(a, 0))
        else:
            t = a / (n - 1)
            least = law.power - (law.tail(t, 2) + 2 * t * law.tail(t, 1) + t**2 * law.tail(t, 0))
        short = least < error
        if not short.any():
            break
        a = np.where(short, 2 * a, a)
    return np.asarray(a)


def _global_scan(law: Law, convex: Array, bits: int, codebook: str, objective: str) -> tuple[Array, Certificate]:
    problems = np.arange(len(convex))
    rms, power = (np.broadcast_to(x, convex.shape) for x in (law.rms, law.power))

    def at(problem: NDArray[np.intp], alpha: Array) -> Array:
        return parts(law.take(problem), alpha, bits, codebook, objective)

    end = np.maximum(cap(law, at(problems, convex)[0], bits, codebook, objective), 2 * convex)
    # First knots: 0, then even in log alpha from 1/8 of the convex model's optimum to the cap.
    relative = np.linspace(0, 1, 33)
    knots = np.concatenate([np.zeros((1, len(convex))), convex / 8 * (8 * end / convex) ** relative[:, None]])
    grid = at(np.tile(problems, len(knots)), knots.ravel()).reshape(-1, *knots.shape)
    seen = [(np.tile(problems, len(knots)), knots.ravel(), grid[0].ravel())]
    best = grid[0].min(0)
    best_alpha = knots[grid[0].argmin(0), problems]
    active = Intervals(
        np.tile(problems, len(knots) - 1),
        knots[:-1].ravel(),
        knots[1:].ravel(),
        grid[:, :-1].reshape(len(grid), -1),
        grid[:, 1:].reshape(len(grid), -1),
    )
    lower = np.full(len(convex), np.inf)
    for _ in range(_MAX_HALVINGS):
        bound = bounds(active, rms[active.problem], bits, codebook, objective)
        slack = np.maximum(_TOLERANCE[objective] * best, _NEGLIGIBLE * power)
        todo = bound < (best - slack)[active.problem]
        # Halving further would not change the ends in float64.
        todo &= active.right - active.left > 1e-15 * active.right
        np.minimum.at(lower, active.problem[~todo], bound[~todo])
        if not todo.any():
            break
        active = active.select(todo)
        middle = (active.left + active.right) / 2
        at_middle = at(active.problem, middle)
        seen.append((active.problem, middle, at_middle[0]))
        order = np.argsort(at_middle[0], kind="stable")[::-1]
        improved = order[at_middle[0][order] < best[active.problem[order]]]
        # Written from the worst to the best, so that the best of each problem stays.
        best[active.problem[improved]], best_alpha[active.problem[improved]] = at_middle[0][improved], middle[improved]
        active = active.halves(middle, at_middle)
    else:
        np.minimum.at(lower, active.problem, bounds(active, rms[active.problem], bits, codebook, objective))

    problem, alpha, value = (np.concatenate(x) for x in zip(*seen, strict=True))
    order = np.lexsort((alpha, problem))
    problem, alpha, value = problem[order], alpha[order], value[order]
    starts = np.searchsorted(problem, np.arange(len(convex) + 1))
    all_knots = tuple(alpha[starts[i] : starts[i + 1]] for i in problems)
    all_values = tuple(value[starts[i] : starts[i + 1]] for i in problems)
    around = [_neighbours(k, a) for k, a in zip(all_knots, best_alpha, strict=True)]
    left, right = (np.asarray(x) for x in zip(*around, strict=True))
    polished = _polish(law, best_alpha, left, right, bits, codebook, objective)
    better = mse_unchecked(law, polished, bits, codebook, objective) <= best
    final = np.where(better, polished, best_alpha)
    error = mse_unchecked(law, final, bits, codebook, objective)
    lower = np.minimum(lower, error)
    ends, slopes = _sign_change(law, final, bits, codebook, objective)
    bend = curvature(law, final, bits, codebook, objective) if objective == "exact" else np.full_like(final, np.nan)
    return final, Certificate(
        method="scan",
        lower_bound=lower,
        gap=np.divide(error - lower, error, out=np.zeros_like(error), where=error > 0),
        bracket=ends,
        bracket_slopes=slopes,
        slope=slope(law, final, bits, codebook, objective),
        curvature=bend,
        multiplier=0.0,
        knots=all_knots,
        values=all_values,
    )


_MAX_HALVINGS = 200


def _neighbours(knots: Array, alpha: float) -> tuple[float, float]:
    i = int(np.searchsorted(knots, alpha))
    return float(knots[max(i - 1, 0)]), float(knots[min(i + 1, len(knots) - 1)])


def _polish(law: Law, alpha: Array, left: Array, right: Array, bits: int, codebook: str, objective: str) -> Array:
    """Bisection on the sign of the derivative between the neighbouring knots."""
    for _ in range(60):
        rising = slope(law, alpha, bits, codebook, objective) > 0
        left, right = np.where(rising, left, alpha), np.where(rising, alpha, right)
        alpha = (left + right) / 2
        if np.all(right - left <= 1e-15 * right):
            break
    return np.asarray(alpha)


def _interval(samples: Array, alpha: float, bits: int, codebook: str, objective: str) -> tuple[float, float]:
    # The histogram's bins are relative to the scale only down to 2^-16: bring the samples to rms 1.
    x = np.abs(samples) / np.sqrt(np.mean(samples**2))
    law = Bins.from_samples(x)
    used = np.flatnonzero(law.weight[0])
    # A fixed seed: the same samples must give the same interval.
    draws = np.random.default_rng(0).multinomial(len(x), law.weight[0, used], size=200) / len(x)
    weight = np.zeros((len(draws), law.weight.shape[1]))
    weight[:, used] = draws
    offset = np.zeros_like(weight)
    offset[:, used] = draws * law.offset[0, used] / law.weight[0, used]
    resampled = optimal_bins(Bins(weight, offset), bits, codebook, objective)[0]
    centre = optimal_bins(law, bits, codebook, objective)[0][0]
    low, high = np.quantile(resampled / centre, [0.025, 0.975])
    return alpha * min(float(low), 1.0), alpha * max(float(high), 1.0)


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

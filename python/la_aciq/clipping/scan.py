"""Branch and bound over clips: the global minimum of an error that is not convex, with a proved lower bound.

The exact error is semi-concave. Rounding to the nearest value minimizes over assignments q of values to x:

    MSE(alpha) = min_q E(X - alpha q(X))^2 = min_q [ E X^2 - 2 alpha E(X q) + alpha^2 E q^2 ],

a minimum of parabolas. If the assignments that are best somewhere in [l, r] all have E q^2 <= C, then MSE(alpha) - C
alpha^2 is concave there, so

    MSE(alpha) >= chord(alpha) - C (alpha - l) (r - alpha)   on [l, r],

and what lies between two clips is at most C (r - l)^2 / 4 below their smaller error. |q| is at most |x| / alpha + 1 /
(N - 1) and at most L = 1 (N / (N - 1) for `midtread`), hence C = min(L, rms / l + 1 / (N - 1))^2. With `midtread` q is
0 for |x| < Delta / 2, so that C = E[(|X| / l + 1 / (N - 1))^2 ; |X| > l / (N - 1)] holds too: it does not grow
with the clip, whatever the tail. A second bound needs no smoothness: on [l, r] the error is at least

    E[X^2 ; |X| < l / (N - 1)] (`midtread`, whose zero takes these values) + E((|X| - L r)+)^2.

Intervals whose bounds are below the best error found are halved in log alpha until none is, to a relative tolerance.

Nothing better lies beyond the last clip A. `midrise`: the values nearest zero are +-Delta/2, so sqrt(MSE) >= Delta/2 -
rms. `midtread`: the error is at least E[X^2 ; |X| < Delta/2], which grows with alpha; and it does not fall beyond A
when t^2 P(X > t) and t^2 P(X < -t) do not grow beyond t = A / (N - 1). For then, with psi(u) = max_q (2 u q - q^2) the
power that rounding u keeps at clip 1, E X^2 - MSE(alpha) = alpha^2 E psi(X / alpha) is an integral of P(|X| > alpha u)
alpha^2 psi'(u) >= 0 over u >= 1 / (N - 1), and each of its values falls with alpha. Laws whose x f(x) / P(X > x) grows
without end or to a limit above 2 have such a t; all families of this package do (`Law.decay_start`).

The in-range model is bounded on [l, r] by the tangents of its convex clipping term plus alpha^2 / (3 K) P(|X| <= l).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import LaAciqError
from .checks import Array
from .law import Law
from .objectives import mse_unchecked, noise_factor, slope

# Relative distance between the error found and the proved lower bound.
TOLERANCE = {"exact": 1e-8, "in_range": 1e-6}
# Errors below this share of the power are rounding.
NEGLIGIBLE = 1e-13
MOST_HALVINGS = 200
MOST_CLIPS = 1 << 18  # per law: more than 100 times what any law of this package needs


class Intervals:
    """Intervals of clips under examination.

    problem: number of the law, [intervals]. left, right: the ends, [intervals]. at_left, at_right: what `parts` gives
    there, [parts, intervals].
    """

    def __init__(self, problem: NDArray[np.intp], left: Array, right: Array, at_left: Array, at_right: Array) -> None:
        self.problem, self.left, self.right = problem, left, right
        self.at_left, self.at_right = at_left, at_right

    def select(self, mask: NDArray[np.bool_]) -> Intervals:
        """The intervals where `mask` [intervals] holds."""
        return Intervals(
            self.problem[mask], self.left[mask], self.right[mask], self.at_left[:, mask], self.at_right[:, mask]
        )

    def halves(self, middle: Array, at_middle: Array) -> Intervals:
        """Both parts of every interval."""
        return Intervals(
            np.concatenate([self.problem, self.problem]),
            np.concatenate([self.left, middle]),
            np.concatenate([middle, self.right]),
            np.concatenate([self.at_left, at_middle], axis=1),
            np.concatenate([at_middle, self.at_right], axis=1),
        )


def middle_of(left: Array, right: Array) -> Array:
    """Where intervals are divided: halves in log alpha, and a quarter where the left end is 0."""
    return np.where(left > 0, np.sqrt(left) * np.sqrt(right), right / 4)


def parts(law: Law, alpha: Array, bits: int, codebook: str, objective: str) -> Array:
    """The error at alpha and what `bounds` needs besides: [4, clips].

    exact: the error; C for intervals that start at alpha; the least error of the values that zero takes from alpha on;
    the least error of clipping up to alpha. Models: the error, the probability of no rounding noise, and the clipping
    error's excess E(|X| - alpha)+ and value.
    """
    if objective == "exact":
        error = mse_unchecked(law, alpha, bits, codebook, objective)
        n = 2**bits
        largest = 1.0 if codebook == "midrise" else n / (n - 1)
        positive = np.where(alpha > 0, alpha, 1.0)
        spread = np.where(alpha > 0, np.minimum(largest, law.rms / positive + 1 / (n - 1)), largest) ** 2
        body = np.zeros_like(error)
        if codebook == "midtread":
            t = alpha / (n - 1)
            mass, excess, square = (law.tail(t, k) for k in range(3))
            beyond = square + 4 * t * excess + 4 * t**2 * mass
            spread = np.minimum(
                spread, np.where(alpha > 0, np.minimum(largest**2 * mass, beyond / positive**2), spread)
            )
            body = np.maximum(law.power - (square + 2 * t * excess + t**2 * mass), 0)
        return np.stack([error, np.broadcast_to(spread, error.shape), body, law.tail(largest * alpha, 2)])
    silent, excess, square = (law.tail(alpha, k) for k in range(3))
    if objective == "aciq":
        silent = np.zeros_like(silent)
    return np.stack([square + noise_factor(bits) * alpha**2 * (1 - silent), silent, excess, square])


def bounds(intervals: Intervals, bits: int, objective: str) -> Array:
    """Proved lower bound of the objective on every interval: [intervals]."""
    left, right = intervals.left, intervals.right
    if objective == "exact":
        chord = chord_bound(left, right, intervals.at_left[0], intervals.at_right[0], intervals.at_left[1])
        # Rounding in the tail sums must not push the bound above the errors at the ends.
        ends = np.minimum(intervals.at_left[0], intervals.at_right[0])
        return np.asarray(np.maximum(chord, np.minimum(intervals.at_left[2] + intervals.at_right[3], ends)))
    c = noise_factor(bits) * (1 - intervals.at_left[1])

    def tangent(start: Array, square: Array, excess: Array, lo: Array, hi: Array) -> Array:
        # min over [lo, hi] of square - 2 excess (a - start) + c a^2
        best = np.clip(np.divide(excess, c, out=np.full_like(c, np.inf), where=c > 0), lo, hi)
        return np.asarray(square - 2 * excess * (best - start) + c * best**2)

    # Noise at least c a^2 with c of the left end; a clipping error above its tangents.
    from_left = tangent(left, intervals.at_left[3], intervals.at_left[2], left, right)
    from_right = tangent(right, intervals.at_right[3], intervals.at_right[2], left, right)
    ends = np.minimum(intervals.at_left[0], intervals.at_right[0])
    return np.asarray(np.minimum(np.maximum(from_left, from_right), ends))


def chord_bound(left: Array, right: Array, at_left: Array, at_right: Array, spread: Array) -> Array:
    """Least value of chord(alpha) - spread (alpha - left) (right - alpha) on [left, right], for errors at its ends."""
    width = right - left
    tilt = (at_right - at_left) / width
    flat = spread <= 0
    c = np.where(flat, 1.0, spread)
    u = np.where(flat, np.where(tilt < 0, width, 0.0), np.clip((width - tilt / c) / 2, 0, width))
    return np.asarray(at_left + tilt * u - spread * u * (width - u))


def last_clip(law: Law, error: Array, bits: int, codebook: str, objective: str) -> tuple[Array, Array]:
    """A clip A [laws], and the least error [laws] of any clip beyond it (this module's text has the proofs).

    The least error is at least `error` [laws], unless the law is too heavy for any clip to show that.
    """
    n = 2**bits
    if objective == "exact" and codebook == "midrise":
        a = np.asarray((n - 1) * (law.rms + np.sqrt(error)))
        return a, error.copy()
    a = np.broadcast_to(law.rms, np.shape(error)).copy()
    falling_from = (
        (n - 1) * np.broadcast_to(law.decay_start(), a.shape) if objective == "exact" else np.full_like(a, np.inf)
    )

    def least_beyond(a: Array) -> Array:
        if objective == "exact":
            return np.asarray(law.power - law.power_beyond(a / (n - 1)))
        return np.asarray(noise_factor(bits) * a**2 * (1 - law.tail(a, 0)))

    least = least_beyond(a)
    for _ in range(_MOST_DOUBLINGS):
        short = (least < error) & (a < falling_from)
        if not short.any():
            break
        a = np.where(short, np.minimum(2 * a, falling_from), a)
        least = least_beyond(a)
    monotone = a >= falling_from
    if monotone.any():
        least = np.where(monotone, np.maximum(least, mse_unchecked(law, a, bits, codebook, objective)), least)
    return a, least


_MOST_DOUBLINGS = 400


@dataclass(frozen=True)
class Scan:
    """Best clips `alpha`, their `error` and its proved `lower` bound, [laws] each, and all clips examined.

    `problem`, `clips`, `errors`: number of the law, clip and error of each examined clip, sorted by law and clip.
    """

    alpha: Array
    error: Array
    lower: Array
    problem: NDArray[np.intp]
    clips: Array
    errors: Array

    def of(self, problem: int) -> tuple[Array, Array]:
        """Clips examined for one law, ascending, and their errors."""
        start, end = np.searchsorted(self.problem, [problem, problem + 1])
        return self.clips[start:end], self.errors[start:end]


def global_scan(law: Law, convex: Array, bits: int, codebook: str, objective: str) -> Scan:
    """The best clip of every law, by halving intervals until the bounds prove it.

    Args:
        law: laws of shape [laws] or ().
        convex: optimum of the convex model, [laws], in units of X.
        bits: bits per value.
        codebook: `midrise` or `midtread`.
        objective: `exact` or `in_range`.

    Raises:
        LaAciqError: more than `MOST_CLIPS` clips per law would be needed.
    """
    problems = np.arange(len(convex))
    power = np.broadcast_to(law.power, convex.shape)

    def at(problem: NDArray[np.intp], alpha: Array) -> Array:
        return parts(law.take(problem), alpha, bits, codebook, objective)

    end, lower = last_clip(law, at(problems, convex)[0], bits, codebook, objective)
    end = np.maximum(end, 2 * convex)
    # First clips: 0, then even in log alpha from 1/8 of the convex model's optimum to the last one.
    relative = np.linspace(0, 1, 33)
    first = np.concatenate([np.zeros((1, len(convex))), convex / 8 * (8 * end / convex) ** relative[:, None]])
    grid = at(np.tile(problems, len(first)), first.ravel()).reshape(-1, *first.shape)
    seen = [(np.tile(problems, len(first)), first.ravel(), grid[0].ravel())]
    examined = first.size
    best = grid[0].min(0)
    alpha = first[grid[0].argmin(0), problems]
    active = Intervals(
        np.tile(problems, len(first) - 1),
        first[:-1].ravel(),
        first[1:].ravel(),
        grid[:, :-1].reshape(len(grid), -1),
        grid[:, 1:].reshape(len(grid), -1),
    )
    for _ in range(MOST_HALVINGS):
        bound = bounds(active, bits, objective)
        slack = np.maximum(TOLERANCE[objective] * best, NEGLIGIBLE * power)
        todo = bound < (best - slack)[active.problem]
        # Halving further would not change the ends in float64.
        todo &= active.right - active.left > 1e-15 * active.right
        np.minimum.at(lower, active.problem[~todo], bound[~todo])
        if not todo.any():
            break
        active = active.select(todo)
        examined += len(active.left)
        if examined > MOST_CLIPS * len(convex):
            raise LaAciqError(
                f"law: expected a best clip that at most {MOST_CLIPS} clips prove, got one that needs more: "
                "objective='aciq' has no such limit"
            )
        middle = middle_of(active.left, active.right)
        at_middle = at(active.problem, middle)
        seen.append((active.problem, middle, at_middle[0]))
        order = np.argsort(at_middle[0], kind="stable")[::-1]
        improved = order[at_middle[0][order] < best[active.problem[order]]]
        # Written from the worst to the best, so that the best of each problem stays.
        best[active.problem[improved]], alpha[active.problem[improved]] = at_middle[0][improved], middle[improved]
        active = active.halves(middle, at_middle)
    else:
        np.minimum.at(lower, active.problem, bounds(active, bits, objective))

    problem, clips, errors = (np.concatenate(x) for x in zip(*seen, strict=True))
    order = np.lexsort((clips, problem))
    scan = Scan(alpha, best, lower, problem[order], clips[order], errors[order])
    polished = _polish(law, scan, bits, codebook, objective)
    error = mse_unchecked(law, polished, bits, codebook, objective)
    better = error <= best
    return Scan(
        np.where(better, polished, alpha),
        np.where(better, error, best),
        lower,
        scan.problem,
        scan.clips,
        scan.errors,
    )


def _polish(law: Law, scan: Scan, bits: int, codebook: str, objective: str) -> Array:
    """A zero of the derivative between the neighbors of the best examined clip, by Chandrupatla's method (1997)."""
    around = [_neighbors(scan.of(i)[0], a) for i, a in enumerate(scan.alpha)]
    left, right = (np.asarray(x) for x in zip(*around, strict=True))

    def derivative(a: Array) -> Array:
        return slope(law, a, bits, codebook, objective)

    # b is the newest point, a the end of the bracket on its other side, c the point before.
    b = scan.alpha.copy()
    at_b = derivative(b)
    a = np.where(at_b > 0, left, right)
    at_a = derivative(a)
    # The derivative at the far end may have either sign where the error has kinks: the search stays between the two.
    at_a = np.where(np.sign(at_a) == np.sign(at_b), -at_b, at_a)
    share = np.full_like(b, 0.5)
    for _ in range(80):
        new = a + share * (b - a)
        at_new = derivative(new)
        same = np.sign(at_new) == np.sign(at_a)
        c, at_c = np.where(same, a, b), np.where(same, at_a, at_b)
        b, at_b = np.where(same, b, a), np.where(same, at_b, at_a)
        a, at_a = new, at_new
        small = 4e-16 * np.abs(a)
        finished = (at_a == 0) | (np.abs(b - a) <= small)
        if finished.all():
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            xi, phi = (a - b) / (c - b), (at_a - at_b) / (at_c - at_b)
            inverse = at_a / (at_b - at_a) * at_c / (at_b - at_c) + (c - a) / (b - a) * at_a / (at_c - at_a) * at_b / (
                at_c - at_b
            )
            least = np.minimum(small / np.abs(b - a), 0.5)
        use = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & np.isfinite(inverse)
        share = np.where(finished, 0.0, np.clip(np.where(use, inverse, 0.5), least, 1 - least))
    return np.where(
        mse_unchecked(law, a, bits, codebook, objective) <= mse_unchecked(law, b, bits, codebook, objective), a, b
    )


def _neighbors(clips: Array, alpha: float) -> tuple[float, float]:
    i = int(np.searchsorted(clips, alpha))
    return float(clips[max(i - 1, 0)]), float(clips[min(i + 1, len(clips) - 1)])

"""One clip for several laws, with a proof that it is the best one: the certified counterpart of what tables do with
histograms.

For the convex model each normalized error e_i is strictly convex, and so are their mean and their maximum. The mean's
minimizer is the root of its derivative. The maximum's is found by bisection on the slope of the active language; where
two languages of opposite slope meet, multipliers mu >= 0 with sum_i mu_i e_i' = 0 prove it optimal: the minimum of
sum_i mu_i e_i is a lower bound of the maximum, and equals it. Everything else (other objectives, variance) is a branch
and bound over intervals of clips, with the bounds of `clipping.optimal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from ..choices import LANGUAGE_OBJECTIVES
from ..errors import LaAciqError
from .checks import Array, check_choice, check_problem, count, number
from .language_objectives import combine, normalized_weights
from .law import Law, common_unit, list_of_laws
from .objectives import mse_unchecked, noise_factor, slope
from .optimal import optimal
from .scan import MOST_CLIPS, MOST_HALVINGS, Intervals, bounds, last_clip, middle_of, parts

_TOLERANCE = 1e-6
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class SharedOptimum:
    """The clip `alpha` shared by languages, their normalized `errors` there [languages], and the `value` of the
    objective.

    `lower_bound` is proved: no clip does better. `multipliers` [languages] prove it for the convex model's mean and
    minimax (their weighted derivatives cancel), else None.
    """

    alpha: float
    errors: Array
    value: float
    lower_bound: float
    multipliers: Array | None


def shared(
    laws: Sequence[Law],
    bits: int = 4,
    codebook: str = "midrise",
    objective: str = "exact",
    language_objective: str = "mean",
    weights: ArrayLike | None = None,
    penalty: float = 1.0,
) -> SharedOptimum:
    """The clip that minimizes a language objective over the laws of several languages, with a proof.

    Args:
        laws: single laws (of shape ()), one per language.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.
        objective: the error of a clip: `exact`, `in_range` or `aciq` (see `mse`).
        language_objective: what is minimized over the normalized errors e_i = MSE_i / E X_i^2: `mean`, `weighted` (the
            sum of w_i e_i), `minimax` (the largest e_i of a positive weight), or `variance` (the sum of w_i e_i +
            penalty times the sum of w_i (e_i - mean)^2).
        weights: w [languages], >= 0, divided here by their sum. None: all weigh the same; `weighted` needs weights.
        penalty: weight of the variance, >= 0; read with `variance` alone.

    Returns:
        The clip, in units of X, the languages' normalized errors there, and a proved lower bound.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is not among its choices, there is no law or one that is not single, weights have
            another shape, are negative or all zero, or penalty is negative.
        LaAciqError: the clip cannot be proved best in float64, or not with at most `scan.MOST_CLIPS` clips.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    check_choice("language_objective", language_objective, LANGUAGE_OBJECTIVES)
    laws = list_of_laws(laws)
    if not laws:
        raise ValueError("laws: expected at least one law, got none")
    if any(law.shape != () for law in laws):
        raise ValueError(
            f"laws: expected single laws of shape (), one per language, got shapes {[law.shape for law in laws]}"
        )
    if language_objective == "weighted" and weights is None:
        raise ValueError("weights: expected weights for language_objective='weighted', got None")
    penalty = number("penalty", penalty)
    if penalty < 0:
        raise ValueError(f"penalty: expected a number of at least 0, got {penalty}")
    w = normalized_weights("weights", np.ones(len(laws)) if weights is None else weights)
    if w.shape != (len(laws),):
        raise ValueError(f"weights: expected shape [{len(laws)}], got {list(w.shape)}")
    laws, scale = common_unit(laws)
    problem = _Problem(laws, w, bits, codebook, objective, language_objective, penalty)
    convex = objective == "aciq" and language_objective != "variance"
    best = problem.solve_convex() if convex else problem.solve_by_bounds()
    return replace(best, alpha=best.alpha * scale)


@dataclass(frozen=True)
class ParetoFront:
    """Clips from the mean's optimum to the worst case's, each better than all others in one of the two: [points]
    each.
    """

    alpha: Array
    mean: Array
    worst: Array


def pareto(
    laws: Sequence[Law],
    bits: int = 4,
    codebook: str = "midrise",
    objective: str = "exact",
    weights: ArrayLike | None = None,
    points: int = 33,
) -> ParetoFront:
    """The front between the mean and the worst normalized error.

    For the convex model it is exactly the interval between the two minimizers (on either side both errors grow). For
    the other objectives that interval is sampled and dominated points are dropped.

    Args:
        laws: single laws (of shape ()), one per language.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.
        objective: the error of a clip: `exact`, `in_range` or `aciq`.
        weights: [languages], >= 0, of the mean. None: all weigh the same.
        points: clips between the two minimizers, at least 2; dominated ones are left out of the result.

    Returns:
        Clips, in units of X, with their mean and worst normalized errors.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is not among its choices or out of range, as for `shared`.
        LaAciqError: a minimizer cannot be proved best.
    """
    points = count("points", points, 2)
    laws, scale = common_unit(list_of_laws(laws))
    kind = "mean" if weights is None else "weighted"
    ends = [shared(laws, bits, codebook, objective, choice, weights).alpha for choice in (kind, "minimax")]
    w = normalized_weights("weights", np.ones(len(laws)) if weights is None else weights)
    alpha = np.linspace(ends[0], ends[1], points)
    errors = np.stack([mse_unchecked(law, alpha, bits, codebook, objective) / law.power for law in laws])
    mean, worst = (combine(errors, w[:, None], choice) for choice in ("mean", "minimax"))
    # Walking from the mean's end the mean grows: a point stays if its worst case beats all before it.
    keep = worst < np.concatenate([[np.inf], np.minimum.accumulate(worst)[:-1]])
    order = np.maximum.accumulate(mean) == mean
    return ParetoFront(alpha[keep & order] * scale, mean[keep & order], worst[keep & order])


@dataclass(frozen=True)
class _Problem:
    laws: Sequence[Law]
    weights: Array
    bits: int
    codebook: str
    objective: str
    language_objective: str
    penalty: float

    def errors(self, alpha: Array | float) -> Array:
        a = np.asarray(alpha, dtype=np.float64)
        return np.stack(
            [mse_unchecked(law, a, self.bits, self.codebook, self.objective) / law.power for law in self.laws]
        )

    def slopes(self, alpha: float) -> Array:
        return np.array(
            [float(slope(law, alpha, self.bits, self.codebook, self.objective) / law.power) for law in self.laws]
        )

    def value(self, errors: Array) -> Array:
        w = self.weights.reshape(-1, *[1] * (errors.ndim - 1))
        return combine(errors, w, self.language_objective, self.penalty)

    def solve_convex(self) -> SharedOptimum:
        used = [law for law, weight in zip(self.laws, self.weights, strict=True) if weight > 0]
        separate = [float(optimal(law, self.bits, self.codebook, "aciq").alpha) for law in used]
        lo, hi = min(separate), max(separate)
        if self.language_objective == "minimax":
            multipliers, lo, hi = self._meet(lo, hi)
        else:
            multipliers = self.weights
        alpha = self._root(multipliers, lo, hi)
        errors = self.errors(alpha)
        # Convexity of the weighted sum: its minimum is above the tangent here, within the bracket of the languages'
        # own optima.
        residual = abs(float(multipliers @ self.slopes(alpha))) * (max(separate) - min(separate))
        return SharedOptimum(
            alpha, errors, float(self.value(errors)), float(multipliers @ errors) - residual, multipliers
        )

    def _root(self, multipliers: Array, lo: float, hi: float) -> float:
        def derivative(a: float) -> float:
            return float(multipliers @ self.slopes(a))

        if lo == hi or derivative(lo) >= 0:
            return lo
        if derivative(hi) <= 0:
            return hi
        return float(optimize.brentq(derivative, lo, hi, xtol=1e-300, rtol=1e-15, maxiter=500))

    def _meet(self, lo: float, hi: float) -> tuple[Array, float, float]:
        """Multipliers of the maximum's minimizer and a bracket of it."""

        def active(a: float) -> int:
            return int(np.where(self.weights > 0, self.errors(a), -np.inf).argmax())

        for _ in range(200):
            middle = (lo + hi) / 2
            if not lo < middle < hi:
                break
            if self.slopes(middle)[active(middle)] > 0:
                hi = middle
            else:
                lo = middle
        left, right = active(lo), active(hi)
        falling, rising = -self.slopes(lo)[left], self.slopes(hi)[right]
        multipliers = np.zeros(len(self.laws))
        if left == right or falling <= 0 or rising <= 0:
            multipliers[left if falling <= 0 else right] = 1.0
            return multipliers, lo, hi
        multipliers[left], multipliers[right] = rising / (falling + rising), falling / (falling + rising)
        return multipliers, lo, hi

    def solve_by_bounds(self) -> SharedOptimum:
        start = [float(optimal(law, self.bits, self.codebook, self.objective).alpha) for law in self.laws]
        best_alpha = start[int(np.argmin(self.value(self.errors(np.asarray(start)))))]
        best = float(self.value(self.errors(best_alpha)))
        end, lower = self._last_clip(best, 2 * max(start))
        knots = np.concatenate([[0.0], np.geomspace(min(start) / 8, end, 65)])
        at = self._parts(knots)
        left, right, at_left, at_right = knots[:-1], knots[1:], at[..., :-1], at[..., 1:]
        examined = len(knots)
        for _ in range(MOST_HALVINGS):
            bound = self._bounds(left, right, at_left, at_right)
            todo = (bound < best * (1 - _TOLERANCE) - _NEGLIGIBLE / 2) & (right - left > 1e-14 * right)
            lower = min(lower, float(bound[~todo].min(initial=np.inf)))
            if not todo.any():
                break
            left, right, at_left, at_right = left[todo], right[todo], at_left[..., todo], at_right[..., todo]
            examined += len(left)
            if examined > MOST_CLIPS:
                raise LaAciqError(
                    f"laws: expected a best shared clip that at most {MOST_CLIPS} clips prove, got one that needs "
                    "more: objective='aciq' has no such limit"
                )
            middle = middle_of(left, right)
            at_middle = self._parts(middle)
            values = self.value(at_middle[:, 0] / self._power)
            if values.min() < best:
                best, best_alpha = float(values.min()), float(middle[values.argmin()])
            left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
            at_left = np.concatenate([at_left, at_middle], axis=-1)
            at_right = np.concatenate([at_middle, at_right], axis=-1)
        else:
            lower = min(lower, float(self._bounds(left, right, at_left, at_right).min()))
        if best - lower > 1.01 * _TOLERANCE * best + _NEGLIGIBLE:
            raise LaAciqError(
                f"laws: expected a shared clip that can be proved best in float64, got a value of {best} with a lower "
                f"bound of {lower}"
            )
        return SharedOptimum(best_alpha, self.errors(best_alpha), best, max(min(lower, best), 0.0), None)

    @property
    def _power(self) -> Array:
        return np.array([float(law.power) for law in self.laws])[:, None]

    def _parts(self, alpha: Array) -> Array:
        """What bounds need at every clip: [languages, parts, clips]; the derivative is last, where it is needed."""
        each = [parts(law, alpha, self.bits, self.codebook, self.objective) for law in self.laws]
        if self.language_objective == "variance" and self.objective != "in_range":
            for i, law in enumerate(self.laws):
                derivative = slope(law, alpha, self.bits, self.codebook, self.objective)
                each[i] = np.concatenate([each[i], derivative[None]])
        return np.stack(each)

    def _last_clip(self, best: float, start: float) -> tuple[float, float]:
        """A clip beyond which no clip is better than `best`, and the least value there.

        Beyond it each normalized error either exceeds `best` or does not fall, and so do their mean and maximum.
        """
        used = [law for law, weight in zip(self.laws, self.weights, strict=True) if weight > 0]
        weights = self.weights[self.weights > 0]
        ends, leasts = zip(
            *(last_clip(law, np.asarray(best * law.power), self.bits, self.codebook, self.objective) for law in used),
            strict=True,
        )
        end = max(start, *(float(a) for a in ends))
        kind = "minimax" if self.language_objective == "minimax" else "mean"
        zero = self.objective == "exact" and self.codebook == "midtread"
        for _ in range(_MOST_DOUBLINGS):
            low = [
                float(mse_unchecked(law, np.asarray(end), self.bits, self.codebook, self.objective) / law.power)
                if zero and end >= (2**self.bits - 1) * float(law.decay_start())
                else float(least / law.power)
                for law, least in zip(used, leasts, strict=True)
            ]
            least = float(combine(np.array(low), weights, kind))
            if least >= best * (1 - _TOLERANCE) or not zero or kind == "minimax":
                break
            end *= 2
        return end, least

    def _bounds(self, left: Array, right: Array, at_left: Array, at_right: Array) -> Array:
        """Proved lower bound of the language objective on every interval: [intervals]."""
        problem: NDArray[np.intp] = np.zeros(len(left), dtype=np.intp)
        low = np.empty((len(self.laws), len(left)))
        for i in range(len(self.laws)):
            ends = Intervals(problem, left, right, at_left[i], at_right[i])
            low[i] = bounds(ends, self.bits, self.objective)
        low = np.maximum(low, 0) / self._power
        if self.language_objective != "variance":
            return self.value(low)
        # The mean alone is one bound; the other two see how far the languages are apart.
        high = self._highest(left, right, at_left, at_right) / self._power
        gaps = np.maximum(low[:, None] - high[None, :], 0)
        variance = np.einsum("i,j,ijk->k", self.weights, self.weights, gaps**2)
        apart = self.weights @ low + self.penalty * variance
        if self.objective == "in_range":
            return np.asarray(apart)
        return np.asarray(np.maximum(apart, self._linearized(left, right, at_left, at_right)))

    def _linearized(self, left: Array, right: Array, at_left: Array, at_right: Array) -> Array:
        """Lower bound of mean plus variance, which is convex in the errors: above its tangent plane at the left end.

        Where the plane falls with an error, an upper bound of that error is needed: the parabola from the left end
        (exact), or the chord (aciq). Both sides are second order in the interval's width.
        """
        w, width = self.weights[:, None], right - left
        start = at_left[:, 0] / self._power
        mean = (w * start).sum(0)
        gradient = w * (1 + 2 * self.penalty * (start - mean))
        tilt = (at_right[:, 0] - at_left[:, 0]) / width / self._power
        slopes = at_left[:, -1] / self._power
        if self.objective == "exact":
            bend = at_left[:, 1] / self._power
            rise = np.where(gradient >= 0, tilt - bend * width, slopes)
            curve = bend
        else:
            bend = noise_factor(self.bits) / self._power
            rise = np.where(gradient >= 0, slopes, tilt - bend * width)
            curve = np.broadcast_to(bend, start.shape)
        constant = mean + self.penalty * (w * (start - mean) ** 2).sum(0)
        # constant + sum_i gradient_i (rise_i u + curve_i u^2), least over 0 <= u <= width
        first, second = (gradient * rise).sum(0), (gradient * curve).sum(0)
        vertex = np.clip(np.where(second > 0, -first / np.where(second > 0, 2 * second, 1), 0), 0, width)
        candidates = [constant + first * u + second * u**2 for u in (np.zeros_like(width), vertex, width)]
        return np.asarray(np.min(candidates, axis=0))

    def _highest(self, left: Array, right: Array, at_left: Array, at_right: Array) -> Array:
        """Upper bound of every language's error on every interval: [languages, intervals]."""
        ends = np.minimum(at_left[:, 0], at_right[:, 0])
        if self.objective == "aciq":
            return np.asarray(np.maximum(at_left[:, 0], at_right[:, 0]))
        if self.objective == "in_range":
            # The clipping error falls with alpha, the noise grows.
            return np.asarray(at_left[:, 3] + at_right[:, 0] - at_right[:, 3])
        # sqrt(MSE) is the distance of X to a codebook whose values move by at most N / (N - 1) per unit of alpha.
        n = 2**self.bits
        reach = (1.0 if self.codebook == "midrise" else n / (n - 1)) * (right - left)
        return np.asarray((np.sqrt(ends) + reach) ** 2)


_MOST_DOUBLINGS = 64

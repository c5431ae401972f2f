"""How far apart the errors of languages can be: what holds, what does not, and numbers for a deployment.

The claim `max MSE - min MSE <= C sqrt(Var kappa)` is false: laws of equal kurtosis have different errors, so no C
works.

>>> for case in equal_kurtosis_examples():
...     print(f"{case.name}: kurtosis {case.kurtosis:.1f}, MSE {case.mse[0]:.5f} and {case.mse[1]:.5f}")
N(0, 1) and N(0, 4): kurtosis 0.0, MSE 0.01154 and 0.04617
three points and Laplace: kurtosis 3.0, MSE 0.00000 and 0.02526

(The second pair has equal variance too, under `midtread`.) What holds, with e = MSE / E X^2 the normalized error:

- inside one family where e* is L-Lipschitz in kappa, max e* - min e* <= L sqrt(2 n) sd(kappa) over n languages:
  `family_bound`, attained by `two_point_kurtoses`;
- under shared clips, a difference of expectations of one loss: `total_variation_bound`;
- nearest rounding to a codebook, sqrt(MSE) is a distance in L2: abs(sqrt(MSE_P) - sqrt(MSE_Q)) <= W_2(P, Q), for one
  clip and for each law's best clip: `wasserstein2`, `wasserstein_bound`;
- the convex model's optimum is at most sigma^2 sqrt((kappa + 3) / 12) / (2^bits - 1): `kurtosis_bound`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .._deprecated import old_fields, warn_renamed
from ..clipping.checks import Array, check_bits, check_problem, count, finite_array, number
from ..clipping.families import Gaussian, Laplace
from ..clipping.histogram import Bins, HistogramLaw
from ..clipping.histogram_optimum import optimal_bins
from ..clipping.language_objectives import language_weights_array, shared_bins
from ..clipping.law import Law, check_law
from ..clipping.objectives import mse_unchecked, quantize, thresholds
from ..clipping.optimal import optimal
from ..clipping.samples import Empirical
from ..ops.streaming import HISTOGRAM_BINS


@dataclass(frozen=True)
class EqualKurtosis:
    """Two laws of one kurtosis whose best errors differ."""

    name: str
    kurtosis: float
    mse: tuple[float, float]
    normalized_mse: tuple[float, float]


def equal_kurtosis_examples(bits: int = 4) -> tuple[EqualKurtosis, EqualKurtosis]:
    """The two counterexamples to any bound by the spread of kurtosis, computed (see the module's text).

    Args:
        bits: bits per value, 2 to 8.

    Returns:
        Two Gaussians of different variance under `midrise`, and a law of three points with a Laplace law under
        `midtread`.

    Raises:
        TypeError: bits is not an integer.
        ValueError: bits is not from 2 to 8.
    """
    # {0, +-sqrt 6} with probabilities 10/12, 1/12, 1/12: variance 1, fourth moment 6. Repeated, so that it is a sample
    # large enough to fit.
    points = Empirical(np.tile(np.sqrt(6) * np.array([-1, 1] + [0] * 10), 2 ** check_bits(bits)))
    pairs: list[tuple[str, Law, Law, str]] = [
        ("N(0, 1) and N(0, 4)", Gaussian(1.0), Gaussian(2.0), "midrise"),
        ("three points and Laplace", points, Laplace(1.0), "midtread"),
    ]
    cases = []
    for name, first, second, codebook in pairs:
        best = [optimal(law, bits, codebook) for law in (first, second)]
        cases.append(
            EqualKurtosis(
                name,
                float(second.kurtosis),
                (float(best[0].mse), float(best[1].mse)),
                (float(best[0].normalized_mse), float(best[1].normalized_mse)),
            )
        )
    return cases[0], cases[1]


def family_slope(
    law_of_kurtosis: Callable[[float], Law], kappas: ArrayLike, bits: int = 4, codebook: str = "midrise"
) -> float:
    """L: the largest difference quotient of the best normalized error over a grid of kurtoses.

    A Lipschitz constant is at least this. In the families here the error is concave in kappa, so the largest quotient
    is at the lower end: let the grid start with a small step.

    Args:
        law_of_kurtosis: gives the single law of an excess kurtosis.
        kappas: excess kurtoses [n], ascending, at least two.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.

    Returns:
        The quotient: normalized error (MSE / E X^2, exact objective) per unit of kurtosis.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: kappas are not ascending, or fewer than two, or an argument is not among its choices.
    """
    k = finite_array("kappas", kappas)
    if k.ndim != 1 or len(k) < 2 or np.any(np.diff(k) <= 0):
        raise ValueError(f"kappas: expected at least two ascending numbers, got {k.tolist()}")
    errors = np.array([float(optimal(law_of_kurtosis(float(x)), bits, codebook).normalized_mse) for x in k])
    return float(np.max(np.abs(np.diff(errors) / np.diff(k))))


def family_bound(kappas: ArrayLike, slope: float) -> float:
    """Largest possible max e* - min e* of languages whose laws share one L-Lipschitz family: L sqrt(2 n) sd(kappa).

    max - min <= sqrt(2 n) sd for any n numbers (population sd): the two extremes alone contribute (max - min)^2 / 2 to
    n sd^2.

    Args:
        kappas: excess kurtoses of the n languages, of any shape, at least one.
        slope: L >= 0, normalized error per unit of kurtosis (`family_slope`).

    Returns:
        The bound, a difference of normalized errors.

    Raises:
        TypeError: an argument does not hold real numbers.
        ValueError: there is no kurtosis, one is not finite, or the slope is negative.
    """
    k = finite_array("kappas", kappas).ravel()
    if not len(k):
        raise ValueError("kappas: expected at least one kurtosis, got none")
    slope = number("slope", slope)
    if slope < 0:
        raise ValueError(f"slope: expected a number of at least 0, got {slope}")
    return float(slope * np.sqrt(2 * len(k)) * np.std(k))


def two_point_kurtoses(languages: int, center: float, distance: float) -> Array:
    """Kurtoses that attain the factor sqrt(2 n) of `family_bound`.

    Args:
        languages: how many, at least 2.
        center: the kurtosis of all languages but the first and the last.
        distance: how far the first lies below the center and the last above it.

    Returns:
        float64 [languages].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: fewer than two languages, or a number that is not finite.
    """
    k = np.full(count("languages", languages, 2), number("center", center))
    distance = number("distance", distance)
    k[0], k[-1] = k[0] - distance, k[0] + distance
    return k


def kurtosis_bound(law: Law, bits: int = 4) -> Array:
    """Upper bound of the convex model's least error: sqrt(E X^4 / 12) / (2^bits - 1), the moment about zero.

    From (x - a)+^2 <= x^4 / (16 a^2), minimized over a together with a^2 / (3 K).

    Args:
        law: the law, or laws, of X.
        bits: bits per value, 2 to 8.

    Returns:
        float64 of `law.shape`, in units of X squared; inf where the fourth moment is.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bits is not from 2 to 8.
    """
    law = check_law(law)
    mu = law.mean
    fourth = law.fourth_moment + 4 * mu * law.third_moment + 6 * mu**2 * law.variance + mu**4
    return np.asarray(np.sqrt(fourth / 12) / (2 ** check_bits(bits) - 1))


def total_variation_bound(p: ArrayLike, q: ArrayLike, losses: ArrayLike) -> float:
    """Bound of the difference of two mean losses: abs(sum p e - sum q e) <= TV(p, q) (max e - min e).

    TV is half the sum of abs(p - q). Cells that neither p nor q reaches play no part.

    Args:
        p: probabilities [cells], >= 0, summing to one (to 1e-9).
        q: the same for the other law.
        losses: e [cells], finite.

    Returns:
        The bound, in the unit of the losses.

    Raises:
        TypeError: an argument does not hold real numbers.
        ValueError: the shapes differ, a number is not finite, or p or q is no probability vector.
    """
    a, b, e = finite_array("p", p), finite_array("q", q), finite_array("losses", losses)
    if not a.shape == b.shape == e.shape or a.ndim != 1:
        raise ValueError(f"p, q and losses: expected vectors of one length, got shapes {a.shape}, {b.shape}, {e.shape}")
    for name, x in (("p", a), ("q", b)):
        if np.any(x < 0) or not np.isclose(x.sum(), 1, rtol=0, atol=1e-9):
            raise ValueError(
                f"{name}: expected probabilities that sum to one, got {x.min()} to {x.max()} with the sum {x.sum()}"
            )
    used = (a > 0) | (b > 0)
    return float(0.5 * np.abs(a - b).sum() * np.ptp(e[used]))


def wasserstein2(p: HistogramLaw, q: HistogramLaw, scaled: bool = False) -> Array:
    """W_2 of pairs of symmetric histogram laws: the root mean square distance of equal quantiles.

    By Gauss and Legendre's quadrature between the bins' edges; relative accuracy 1e-6.

    Args:
        p: laws, [pairs] or ().
        q: the other laws, of the same shape.
        scaled: compare the laws at unit power.

    Returns:
        float64 of the laws' shape, in units of X, or without a unit if scaled.

    Raises:
        TypeError: p or q is not a `HistogramLaw`.
        ValueError: the shapes differ.
    """
    for name, law in (("p", p), ("q", q)):
        if not isinstance(law, HistogramLaw):
            raise TypeError(f"{name}: expected a HistogramLaw, got {type(law).__name__}")
    if p.shape != q.shape:
        raise ValueError(f"p and q: expected one shape, got {p.shape} and {q.shape}")
    laws = [law.take(np.arange(law.size)) for law in (p, q)]
    cumulative = [np.cumsum(np.broadcast_to(law.bin_probabilities, (p.size, HISTOGRAM_BINS)), axis=-1) for law in laws]
    # Both quantile functions are smooth between the merged breakpoints: Gauss-Legendre there.
    steps = np.sort(np.concatenate([np.zeros((p.size, 1)), *cumulative], axis=-1), axis=-1).clip(0, 1)
    nodes, weights = np.polynomial.legendre.leggauss(4)
    width = np.diff(steps, axis=-1)[..., None]
    level = steps[:, :-1, None] + width * (nodes + 1) / 2
    first, second = (law.quantiles(level.reshape(p.size, -1)).reshape(level.shape) for law in laws)
    if scaled:
        first, second = (x / np.reshape(law.rms, (-1, 1, 1)) for x, law in zip((first, second), laws, strict=True))
    return np.asarray(np.sqrt(((first - second) ** 2 * weights * width / 2).sum((-1, -2))).reshape(p.shape))


def wasserstein_bound(error_p: ArrayLike, distance: ArrayLike) -> tuple[Array, Array]:
    """The interval that the error of Q lies in: ((r - W)+^2, (r + W)^2) with r = sqrt MSE_P and W >= W_2(P, Q).

    Args:
        error_p: mean squared errors of P, >= 0, in units of X squared.
        distance: W_2(P, Q) or more, >= 0, in units of X; broadcasts against error_p.

    Returns:
        The lower and the upper end, float64 of the broadcast shape each, in units of X squared.

    Raises:
        TypeError: an argument does not hold real numbers.
        ValueError: a number is negative or not finite.
    """
    error, w = finite_array("error_p", error_p), finite_array("distance", distance)
    for name, values in (("error_p", error), ("distance", w)):
        if np.any(values < 0):
            raise ValueError(f"{name}: expected values of at least 0, got {values.min()}")
    root = np.sqrt(error)
    return np.maximum(root - w, 0) ** 2, (root + w) ** 2


@old_fields(own="separate", wasserstein_own="wasserstein_separate")
@dataclass(frozen=True)
class DeploymentBounds:
    """Gaps between languages of a deployment with one clip per layer, and proved bounds of them.

    Attributes:
        languages: BCP-47 tags.
        shared: float64 [languages], errors under one clip for all languages, divided by the power pooled over the
            languages and averaged over layer inputs.
        separate: float64 [languages], errors under each language's best clip, divided by that language's power and
            averaged over layer inputs.
        total_variation: a bound of `shared_gap`, from the total variation of the laws.
        cells: a bound of `shared_gap`, from the least and largest error in each bin.
        wasserstein_shared: a bound of `shared_gap`, from the Wasserstein distances of the laws.
        wasserstein_separate: a bound of `separate_gap`, from those of the laws scaled to unit power.
    """

    languages: tuple[str, ...]
    shared: Array
    separate: Array
    total_variation: float
    cells: float
    wasserstein_shared: float
    wasserstein_separate: float

    @property
    def shared_gap(self) -> float:
        """max - min of the shared errors."""
        return float(np.ptp(self.shared))

    @property
    def separate_gap(self) -> float:
        """max - min of the separate errors."""
        return float(np.ptp(self.separate))

    @property
    def own_gap(self) -> float:
        """The old name of `separate_gap`."""
        warn_renamed("DeploymentBounds.own_gap", "DeploymentBounds.separate_gap")
        return self.separate_gap


def deployment_bounds(profile: Any, bits: int = 4, codebook: str = "midrise") -> DeploymentBounds:
    """Bounds for the laws that a profile holds (histograms with densities linear in each bin), over its layer inputs.

    With the layer's law of language l written P_l and its error under the shared clip e(x):

    - `total_variation`: sum over layers of TV(P_l, P_m) (max e - min e over the support);
    - `cells`: sum over the bins of P_l(bin) max e - P_m(bin) min e, which holds whatever the law does inside bins;
    - Wasserstein: abs(D_l - D_m) <= W (sqrt D_l + sqrt D_m), where W^2 is the mean over layers of W_2^2 (for separate
      clips, of the laws scaled to unit power). All layers weigh the same for every language, so errors and distances
      add up layer by layer.

    Args:
        profile: a `la_aciq.Profile` of at least two languages.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.

    Returns:
        The errors by language, and the bounds of their gaps.

    Raises:
        TypeError: bits is not an integer, or the codebook not a string.
        ValueError: an argument is not among its choices, or the profile has fewer than two languages or no layer input
            with values of each.
    """
    bits, codebook, _ = check_problem(bits, codebook, "exact")
    languages = tuple(profile.languages)
    if len(languages) < 2:
        raise ValueError(f"profile: expected at least two languages, got {len(languages)}")
    entries = [tuple(profile.entries).index(language) for language in languages]
    weights = language_weights_array("mean", languages, None)[:, None]
    pairs = list(combinations(range(len(languages)), 2))
    left, right = (np.asarray(x, dtype=np.intp) for x in zip(*pairs, strict=True))
    layers = 0
    shared, separate = np.zeros(len(languages)), np.zeros(len(languages))
    variation, cells, square_shared, square_separate = (np.zeros(len(pairs)) for _ in range(4))
    for site in profile.sites.values():
        if site.kind != "input":
            continue
        histogram = np.asarray(site.moments.histogram)[entries].sum(axis=1)
        if not np.all(histogram[..., 0].sum(-1) > 0):
            continue
        layers += 1
        bins = Bins.from_histogram(histogram)
        law = HistogramLaw.from_bins(bins)
        clip = shared_bins(Bins(bins.weight[:, None], bins.offset[:, None]), weights, bits, codebook, "exact", "mean")
        power = float(law.power.mean())
        shared += mse_unchecked(law, np.broadcast_to(clip, law.shape), bits, codebook, "exact") / power
        separate += optimal_bins(bins, bits, codebook, "exact")[1] / law.power
        low, high = _error_range(law.edges, float(clip[0]), bits, codebook)
        used = bins.weight.any(0)
        # A bin's difference in density is at most its difference in mass plus what the two slopes can move (3/4 of the
        # offsets').
        difference = np.abs(bins.weight[left] - bins.weight[right]) / 2
        difference += 0.75 * np.abs(bins.offset[left] - bins.offset[right])
        variation += np.minimum(difference.sum(-1), 1) * (high[used].max() - low[used].min()) / power
        one_way = bins.weight @ high, bins.weight @ low
        cells += np.maximum(one_way[0][left] - one_way[1][right], one_way[0][right] - one_way[1][left]) / power
        square_shared += wasserstein2(law.take(left), law.take(right)) ** 2 / power
        square_separate += wasserstein2(law.take(left), law.take(right), scaled=True) ** 2
    if not layers:
        raise ValueError("profile: expected an input site with values of every language, got none")
    shared, separate = shared / layers, separate / layers

    def by_distance(errors: Array, square: Array) -> float:
        return float(np.max(np.sqrt(square / layers) * (np.sqrt(errors[left]) + np.sqrt(errors[right]))))

    return DeploymentBounds(
        languages,
        shared,
        separate,
        float(variation.max() / layers),
        float(cells.max() / layers),
        by_distance(shared, square_shared),
        by_distance(separate, square_separate),
    )


def _error_range(edges: Array, clip: float, bits: int, codebook: str) -> tuple[Array, Array]:
    """Least and largest squared error over each bin of |x| (either sign of x): two arrays [258]."""
    n = 2**bits
    delta = 2 * clip / (n - 1)
    # Both sides' turning points: |x| of values (error 0) and of thresholds (error Delta / 2).
    cuts = delta * np.concatenate([[0.0] if codebook == "midrise" else [], thresholds(bits, codebook)])
    values = delta * (np.arange(n // 2) + (0.5 if codebook == "midrise" else 0.0))
    if codebook == "midtread":
        cuts, values = np.append(cuts, clip), np.append(values, delta * n / 2)
    lower, upper = edges[:-1], edges[1:]
    at_ends = np.stack([(x - quantize(x, clip, bits, codebook)) ** 2 for x in (lower, upper, -lower, -upper)])
    low, high = at_ends.min(0), at_ends.max(0)
    has_cut, has_value = (((lower[:, None] <= x) & (x <= upper[:, None])).any(1) for x in (cuts, values))
    return np.where(has_value, 0.0, low), np.where(has_cut, np.maximum(high, delta**2 / 4), high)

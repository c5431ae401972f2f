"""Clips straight from calibration histograms, thousands at a time.

The error of a clip is a linear function of the count-and-offset vector of a histogram (see `clipping.histogram`), so
scanning a grid of clips over all histograms is one matrix product.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ops.streaming import HISTOGRAM_BINS as BINS
from .checks import Array, check_alpha, check_problem
from .histogram import BINS_PER_OCTAVE, Bins, HistogramLaw, bin_geometry
from .objectives import mse_unchecked, noise_factor, slope, thresholds


def histogram_mse(
    histogram: ArrayLike, alpha: ArrayLike, bits: int = 4, codebook: str = "midrise", objective: str = "exact"
) -> Array:
    """Mean squared error of clips, from calibration histograms.

    Args:
        histogram: int64 [..., 258, 2], as `Moments.histogram` has it.
        alpha: clips, finite and >= 0, in units of X; broadcasts against the leading axes of the histogram.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.
        objective: `exact`, `in_range` or `aciq` (see `mse`).

    Returns:
        float64 of the broadcast shape, in units of X squared; NaN where a histogram has no values.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a clip is negative or not finite, an argument is not among its choices, or the histogram has
            another shape or negative counts.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    bins = Bins.from_histogram(histogram)
    law = HistogramLaw.from_bins(bins).take(np.arange(len(bins.weight)).reshape(np.shape(histogram)[:-2]))
    return mse_unchecked(law, check_alpha(alpha), bits, codebook, objective)


def optimal_histogram(
    histogram: ArrayLike, bits: int = 4, codebook: str = "midrise", objective: str = "exact"
) -> tuple[Array, Array]:
    """Best clip of every histogram.

    `aciq` is solved exactly. The other two scan 24 clips per octave from 1/8 to 128 times the `aciq` optimum in one
    matrix product, then refine the best one. With `clipping.optimal(Empirical.from_histogram(h))` one law at a time
    gets a certificate. Cost: O(R (clips x bins)) multiply-adds for R histograms, about 10 microseconds each at INT4.

    Args:
        histogram: int64 [..., 258, 2], as `Moments.histogram` has it.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.
        objective: `exact`, `in_range` or `aciq` (see `mse`).

    Returns:
        The clips, in units of X, and their mean squared errors, in units of X squared: float64 [...] each; NaN where a
        histogram has no values.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is not among its choices, or the histogram has another shape or negative counts.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    shape = np.shape(histogram)[:-2]
    bins = Bins.from_histogram(histogram)
    alpha = np.full(len(bins.weight), np.nan)
    error = np.full(len(bins.weight), np.nan)
    usable = np.flatnonzero(~np.isnan(bins.weight[:, 0]))
    alpha[usable], error[usable] = optimal_bins(bins.rows(usable), bits, codebook, objective)
    return alpha.reshape(shape), error.reshape(shape)


def optimal_bins(bins: Bins, bits: int, codebook: str, objective: str) -> tuple[Array, Array]:
    """`optimal_histogram` for rows that all have mass: (alpha, mse), each [R]."""
    alpha = np.empty(len(bins.weight))
    error = np.empty(len(bins.weight))
    for start in range(0, len(alpha), _CHUNK):
        part = slice(start, start + _CHUNK)
        law = HistogramLaw.from_bins(bins.rows(part))
        convex = _convex_optimum(law, bits)
        if objective == "aciq":
            alpha[part], error[part] = convex, mse_unchecked(law, convex, bits, codebook, objective)
        else:
            alpha[part], error[part] = _scan(law, convex, bits, codebook, objective)
    return alpha, error


_CHUNK = 2048  # rows per step: keeps the working set of a scan within a few tens of MiB


def _convex_optimum(law: HistogramLaw, bits: int) -> Array:
    """Minimizer of the convex model: the root of E(|X| - a)+ - a / (3 K), which decreases strictly in a."""
    low, _, half = bin_geometry()
    c = noise_factor(bits)
    suffix = law._suffix[:, law._rows, :BINS]
    at_edges = suffix[1] - low * suffix[0] - c * low
    # Bin 0's edge is 0, where the function is E|X| > 0; the root is in the last bin whose lower edge is still positive.
    i = np.maximum((at_edges > 0).sum(-1) - 1, 0)
    lo, hi = low[i], low[i] + 2 * half[i]
    beyond = half[i] == 0
    a = np.where(beyond, suffix[1][:, -1] / np.where(suffix[0][:, -1] + c > 0, suffix[0][:, -1] + c, 1), (lo + hi) / 2)
    for _ in range(50):
        value = law.tail(a, 1) - c * a
        lo, hi = np.where(value > 0, a, lo), np.where(value > 0, hi, a)
        step = a + value / (law.tail(a, 0) + c)
        newton = np.where((step >= lo) & (step <= hi), step, (lo + hi) / 2)
        a, previous = np.where(beyond, a, newton), a
        if np.all(np.abs(a - previous) <= 1e-12 * previous):
            break
    return np.asarray(a)


def _scan(law: HistogramLaw, convex: Array, bits: int, codebook: str, objective: str) -> tuple[Array, Array]:
    octave = np.floor(np.log2(convex)).astype(np.int64)
    errors = errors_on_grid(law, octave, bits, codebook, objective)
    grid = scan_grid()
    best = np.clip(errors.argmin(-1), 1, len(grid) - 2)
    rows = np.arange(len(best))
    scale = 2.0**octave
    # Vertex of the parabola through the best grid point and its neighbours, in log alpha (where the grid is even).
    left, middle, right = (errors[rows, best + d] for d in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1), 0)
    vertex = scale * grid[best] * _RATIO ** np.clip(shift, -1, 1)
    # Then one secant step on the derivative.
    beside = vertex * _RATIO**0.25
    d1, d2 = (slope(law, a, bits, codebook, objective) for a in (vertex, beside))
    with np.errstate(divide="ignore", invalid="ignore"):
        step = vertex - d1 * (beside - vertex) / (d2 - d1)
    inside = (step > scale * grid[best - 1]) & (step < scale * grid[best + 1]) & (d2 > d1)
    candidates = [vertex, np.where(inside, step, vertex)]
    values = [mse_unchecked(law, a, bits, codebook, objective) for a in candidates]
    # The grid point itself: the refinement may leave a kink of a sparse histogram for something worse.
    candidates.append(scale * grid[best])
    values.append(middle)
    pick = np.argmin(values, axis=0)
    return np.asarray(candidates)[pick, rows], np.asarray(values)[pick, rows]


_CLIPS_PER_OCTAVE = 24
_RATIO = 2 ** (1 / _CLIPS_PER_OCTAVE)
_OCTAVES_BELOW, _OCTAVES_ABOVE = 3, 7


@lru_cache(maxsize=1)
def scan_grid() -> Array:
    """The clips of a scan, relative to the octave of the convex model's optimum."""
    return 2.0 ** np.arange(-_OCTAVES_BELOW, _OCTAVES_ABOVE, 1 / _CLIPS_PER_OCTAVE)


def errors_on_grid(law: HistogramLaw, octave: NDArray[np.int64], bits: int, codebook: str, objective: str) -> Array:
    """Errors [R, clips] at `scan_grid() * 2^octave`, by one matrix product over the bins that the clips can tell
    apart.
    """
    by_weight, by_offset, first, last = _grid_matrices(bits, codebook, objective)
    # Bins are equally spaced per octave: a window of bins relative to each row's octave makes one matrix serve all
    # scales.
    window = np.arange(first, last) + BINS_PER_OCTAVE * octave[:, None]
    inside = (window >= 1) & (window < BINS - 1)
    position = np.where(inside, window, 0)
    rows = law._rows[:, None]
    scale = 2.0**octave
    weight = np.where(inside, law.bins.weight[rows, position], 0)
    offset = np.where(inside, law.bins.offset[rows, position], 0)
    # Above the window every clip sees |x| only through count, sum and sum of squares; below it, no threshold is passed.
    above = np.clip(last + BINS_PER_OCTAVE * octave, 0, BINS)
    count, total, square = (law._suffix[k, law._rows, above] for k in range(3))
    a = scan_grid()
    delta = 2 * a / (2**bits - 1)
    result = weight @ by_weight + offset @ by_offset
    power, mean_abs = (law.power / scale**2)[:, None], (law.mean_abs / scale)[:, None]
    count, total, square = count[:, None], (total / scale)[:, None], (square / scale**2)[:, None]
    if objective == "exact":
        t = thresholds(bits, codebook)
        result += -2 * delta * (len(t) * total - t.sum() * delta * count)
        if codebook == "midrise":
            result += power - delta * mean_abs + delta**2 / 4
        else:
            result += power - delta * (total - a * count)
    else:
        c = noise_factor(bits)
        result += square - 2 * a * total + a**2 * count + c * a**2 * (1 - count)
    result *= scale[:, None] ** 2
    # Thresholds inside the lowest bin, which has no octave: such rows are evaluated one clip at a time.
    small = np.flatnonzero(first + BINS_PER_OCTAVE * octave < 1)
    if len(small):
        clips = a * scale[small, None]
        result[small] = mse_unchecked(law.take(small[:, None]), clips, bits, codebook, objective)
    return np.asarray(result)


@lru_cache(maxsize=32)
def _grid_matrices(bits: int, codebook: str, objective: str) -> tuple[Array, Array, int, int]:
    """Contribution of a unit weight, and of a unit offset, in every bin of the window to the error at every clip of
    the grid.
    """
    # The lowest threshold of the lowest clip, and the highest clip, bound the bins that matter (in bins above that of
    # 1.0).
    lowest = -_OCTAVES_BELOW - bits if objective == "exact" else -_OCTAVES_BELOW
    one = 1 + 16 * BINS_PER_OCTAVE
    first, last = one + BINS_PER_OCTAVE * lowest, one + BINS_PER_OCTAVE * _OCTAVES_ABOVE
    window = np.arange(first, last)
    unit = np.zeros((2 * len(window), BINS))
    unit[np.arange(len(window)), window] = 1
    weight, offset = unit.copy(), np.roll(unit, len(window), axis=0)
    law = HistogramLaw.from_bins(Bins(weight, offset)).take(np.arange(2 * len(window))[:, None])
    a = scan_grid()
    if objective == "exact":
        delta = 2 * a / (2**bits - 1)
        value = -2 * delta * sum(law.tail(t * delta, 1) for t in thresholds(bits, codebook))
        if codebook == "midtread":
            value = value - delta * law.tail(a, 1)
    else:
        value = law.tail(a, 2) - noise_factor(bits) * a**2 * law.tail(a, 0)
    return value[: len(window)], value[len(window) :], int(first), int(last)

"""Clips straight from calibration histograms, thousands at a time.

A calibration histogram counts |x| in 258 log-linear bins and carries the exact sum of |x| per bin (see
`la_aciq.Moments`). Inside a bin the law is taken to have a linear density that matches the bin's count and sum (the
slope is limited where the density would become negative), so that P(|X| > a) and E(|X| - a)+ are exact at every bin
edge. The error of a clip is then a linear function of the count-and-offset vector of the histogram, and scanning a
grid of clips over all histograms is one matrix product.

The histogram does not know signs: laws made from it are symmetric. For `midtread`, whose two ends differ by one step,
this means the mean of the errors of x and -x. Values below 2^-16 are spread over [0, 2^-16); values of 2^16 or more
count as 2^16.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..ops.streaming import HISTOGRAM_BINS as BINS
from ..ops.streaming import histogram_edges, histogram_sums
from .laws import Array, Law
from .objectives import check_alpha, check_problem, mse_unchecked, noise_factor, slope, thresholds

_PER_OCTAVE = 8


@lru_cache(maxsize=1)
def _geometry() -> tuple[Array, Array, Array]:
    """Lower edge, middle and half width of every bin; the last bin is a point at 2^16."""
    edges = np.array(histogram_edges(), dtype=np.float64)
    edges[-1] = edges[-2]
    return edges[:-1], (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2


def _bin_moments() -> tuple[Array, Array]:
    """First and second moment that a unit of weight in each bin adds."""
    _, middle, half = _geometry()
    return middle, middle**2 + half**2 / 3


def _offset_moments() -> tuple[Array, Array]:
    """First and second moment that a unit of offset in each bin adds."""
    _, middle, half = _geometry()
    return half, 2 * middle * half


class Bins:
    """Histograms as laws: probability `weight` [R, 258] and `offset` [R, 258] = weight x (mean of the bin - middle) /
    half width.

    Mixtures are weighted sums of these arrays, so a language objective that is a weighted mean of errors is one more
    row.
    """

    def __init__(self, weight: Array, offset: Array) -> None:
        self.weight = weight
        self.offset = offset

    @classmethod
    def from_histogram(cls, histogram: ArrayLike) -> Bins:
        """From counts [..., 258, 2], flattened to [R, 258] and normalized; a histogram without mass gives NaN rows."""
        array = np.asarray(histogram)
        if array.shape[-2:] != (BINS, 2):
            raise ValueError(f"histogram must have shape [..., {BINS}, 2], got {array.shape}")
        if array.dtype.kind not in "iu":
            raise TypeError(f"histogram must hold integers, got {array.dtype}")
        if array.size and array.min() < 0:
            raise ValueError("histogram must not hold negative counts or sums")
        flat = array.reshape(-1, BINS, 2)
        return cls._from_sums(flat[..., 0].astype(np.float64), histogram_sums(flat))

    @classmethod
    def from_samples(cls, x: Array) -> Bins:
        """From values x (flattened to one row)."""
        x = np.abs(x).ravel()
        bin_of = np.searchsorted(_geometry()[0], x, side="right") - 1
        counts = np.bincount(bin_of, minlength=BINS).astype(np.float64)
        # The last bin is a point at its lower edge.
        sums = np.bincount(bin_of, weights=np.minimum(x, _geometry()[0][-1]), minlength=BINS).astype(np.float64)
        return cls._from_sums(counts[None], sums[None])

    @classmethod
    def _from_sums(cls, counts: Array, sums: Array) -> Bins:
        _, middle, half = _geometry()
        # Beyond a third of the half width a linear density of that mean would go negative.
        deviation = sums - counts * middle
        with np.errstate(divide="ignore", invalid="ignore"):
            offset = np.where(half > 0, deviation / np.where(half > 0, half, 1), 0)
            total = counts.sum(-1, keepdims=True)
            weight = counts / total
            offset = np.clip(offset, -counts / 3, counts / 3) / total
        return cls(weight, offset)

    def moment(self, order: int) -> Array:
        """E abs(X)^order for order 1 or 2: [...]."""
        weights = self.weight @ _bin_moments()[order - 1] + self.offset @ _offset_moments()[order - 1]
        return np.asarray(weights)

    def rows(self, index: NDArray[np.intp] | slice) -> Bins:
        """The laws at these rows."""
        return Bins(self.weight[index], self.offset[index])


class HistogramLaw(Law):
    """The symmetric law of calibration histograms: int64 [..., 258, 2] gives a law of shape [...]. See the module's
    text.
    """

    def __init__(self, histogram: ArrayLike) -> None:
        bins = Bins.from_histogram(histogram)
        if np.isnan(bins.weight).any():
            raise ValueError("histogram must have mass: at least one row counted no finite value")
        self._build(bins)
        self._take(np.arange(len(bins.weight)).reshape(np.shape(histogram)[:-2]))

    @classmethod
    def from_bins(cls, bins: Bins) -> HistogramLaw:
        """A law of shape [R] from its bins."""
        law = cls.__new__(cls)
        law._build(bins)
        law._take(np.arange(len(bins.weight)))
        return law

    def _build(self, bins: Bins) -> None:
        self.bins = bins
        first, second = (
            bins.weight * w + bins.offset * o for w, o in zip(_bin_moments(), _offset_moments(), strict=True)
        )
        # [3, R, 259]: sums over this bin and all above it, of 1, |x| and x^2.
        stacked = np.stack([bins.weight, first, second])
        self._suffix = np.zeros((3, len(bins.weight), BINS + 1))
        self._suffix[..., :-1] = np.cumsum(stacked[..., ::-1], axis=-1)[..., ::-1]

    def _take(self, rows: NDArray[np.intp]) -> None:
        self._rows = rows
        self.shape = rows.shape

    def __repr__(self) -> str:
        return f"HistogramLaw(shape={self.shape})"

    def take(self, index: NDArray[np.intp]) -> HistogramLaw:
        law = HistogramLaw.__new__(HistogramLaw)
        law.bins, law._suffix = self.bins, self._suffix
        law._take(self._rows if self.shape == () else self._rows.ravel()[index])
        return law

    def tail(self, a: ArrayLike, order: int) -> Array:
        low, middle, half = _geometry()
        rows, a = np.broadcast_arrays(self._rows, np.asarray(a, dtype=np.float64))
        i = np.clip(np.searchsorted(low, a, side="right") - 1, 0, BINS - 1)
        sums = self._suffix[:, rows, i + 1]
        # The rest of the bin that a falls into: v = distance from a to its upper edge, in half widths.
        weight, offset, h = self.bins.weight[rows, i], self.bins.offset[rows, i], half[i]
        u = np.minimum((a - middle[i]) / np.where(h > 0, h, 1), 1)
        v = np.where(h > 0, 1 - u, 0)
        if order == 0:
            return np.asarray(sums[0] + weight * v / 2 + offset * 3 * v * (2 - v) / 4)
        if order == 1:
            return np.asarray(sums[1] - a * sums[0] + h * v**2 * (weight + offset * (2 + u)) / 4)
        rest = h**2 * v**3 * (weight / 6 + offset * (3 + u) / 8)
        return np.asarray(sums[2] - 2 * a * sums[1] + a**2 * sums[0] + rest)

    def above(self, t: ArrayLike, order: int) -> Array:
        t = np.asarray(t, dtype=np.float64)
        far = self.tail(np.abs(t), order) / 2
        if order == 0:
            near = 1 - far
        elif order == 1:
            near = far + np.abs(t)
        else:
            near = self.power + t**2 - far
        return np.asarray(np.where(t >= 0, far, near))

    def below(self, t: ArrayLike, order: int) -> Array:
        return self.above(-np.asarray(t, dtype=np.float64), order)

    def density(self, x: ArrayLike) -> Array:
        low, middle, half = _geometry()
        rows, a = np.broadcast_arrays(self._rows, np.abs(np.asarray(x, dtype=np.float64)))
        i = np.clip(np.searchsorted(low, a, side="right") - 1, 0, BINS - 1)
        h = np.where(half[i] > 0, half[i], 1)
        inside = self.bins.weight[rows, i] + 3 * self.bins.offset[rows, i] * (a - middle[i]) / h
        return np.where(half[i] > 0, inside / (4 * h), 0.0)

    @property
    def edges(self) -> Array:
        """Edges of the bins of |x|: [259], the last two equal (the last bin is a point)."""
        low, middle, half = _geometry()
        return np.append(low, middle[-1] + half[-1])

    @property
    def bin_probabilities(self) -> Array:
        """Probability of each bin of |x|: [..., 258]."""
        return np.asarray(self.bins.weight[self._rows])

    def quantiles(self, level: Array) -> Array:
        """|x| below which a share `level` [R, n] of each of R laws lies (of |X|: the law of X is symmetric)."""
        _, middle, half = _geometry()
        rows = np.broadcast_to(self._rows.ravel(), (len(level),))[:, None]
        cumulative = np.cumsum(self.bins.weight[rows[:, 0]], axis=-1)
        # One search for all rows: shifted apart, they are one ascending array.
        shift = 2.0 * np.arange(len(level))[:, None]
        i = np.searchsorted((cumulative + shift).ravel(), (level + shift).ravel(), side="left").reshape(level.shape)
        i = np.clip(i - BINS * np.arange(len(level))[:, None], 0, BINS - 1)
        weight, offset = self.bins.weight[rows, i], self.bins.offset[rows, i]
        before = np.take_along_axis(cumulative, i, axis=-1) - weight
        # Inside the bin, with d the relative offset: (1 + u) / 2 + 3 d (u^2 - 1) / 4 = share, solved for u without
        # cancellation.
        positive = np.where(weight > 0, weight, 1)
        share = np.clip((level - before) / positive, 0, 1)
        d = offset / positive
        c = 0.5 - 0.75 * d - share
        u = -2 * c / (0.5 + np.sqrt(np.maximum(0.25 - 3 * d * c, 0)))
        return np.asarray(middle[i] + half[i] * np.clip(u, -1, 1))

    @property
    def mean(self) -> Array:
        """Zero: the histogram does not know signs."""
        return np.zeros(self.shape)

    @property
    def variance(self) -> Array:
        return np.asarray(self._suffix[2, self._rows, 0])

    @property
    def third_moment(self) -> Array:
        return np.zeros(self.shape)

    @property
    def fourth_moment(self) -> Array:
        _, m, h = _geometry()
        even = self.bins.weight @ (m**4 + 2 * m**2 * h**2 + h**4 / 5)
        odd = self.bins.offset @ (4 * m**3 * h + 12 / 5 * m * h**3)
        return np.asarray((even + odd)[self._rows])

    @property
    def mean_abs(self) -> Array:
        return np.asarray(self._suffix[1, self._rows, 0])

    def entropy(self) -> Array:
        """Of the symmetric law, the density taken constant inside bins; -inf when mass sits at the last bin's point."""
        _, _, half = _geometry()
        p = self.bins.weight
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, -p * np.log(p / (4 * half)), 0.0)
        return np.asarray(terms.sum(-1)[self._rows])


def histogram_mse(
    histogram: ArrayLike, alpha: ArrayLike, bits: int = 4, codebook: str = "midrise", objective: str = "exact"
) -> Array:
    """Mean squared error of given clips: histogram int64 [..., 258, 2], alpha broadcasts against its leading axes;
    NaN without mass.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    bins = Bins.from_histogram(histogram)
    law = HistogramLaw.from_bins(bins).take(np.arange(len(bins.weight)).reshape(np.shape(histogram)[:-2]))
    return mse_unchecked(law, check_alpha(alpha), bits, codebook, objective)


def optimal_histogram(
    histogram: ArrayLike, bits: int = 4, codebook: str = "midrise", objective: str = "exact"
) -> tuple[Array, Array]:
    """Best clip of every histogram: int64 [..., 258, 2] -> (alpha, mse), float64 [...]; NaN where a histogram has no
    mass.

    `aciq` is solved exactly. The other two scan 24 clips per octave from 1/8 to 128 times the `aciq` optimum in one
    matrix product, then refine the best one. With `clipping.optimal(Empirical.from_histogram(h))` one law at a time
    gets a certificate. Cost: O(R (clips x bins)) multiply-adds for R histograms, about 10 microseconds each at INT4.
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
    low, _, half = _geometry()
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
    left, centre, right = (errors[rows, best + d] for d in (-1, 0, 1))
    bend = left - 2 * centre + right
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
    values.append(centre)
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
    window = np.arange(first, last) + _PER_OCTAVE * octave[:, None]
    inside = (window >= 1) & (window < BINS - 1)
    position = np.where(inside, window, 0)
    rows = law._rows[:, None]
    scale = 2.0**octave
    weight = np.where(inside, law.bins.weight[rows, position], 0)
    offset = np.where(inside, law.bins.offset[rows, position], 0)
    # Above the window every clip sees |x| only through count, sum and sum of squares; below it, no threshold is passed.
    above = np.clip(last + _PER_OCTAVE * octave, 0, BINS)
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
    small = np.flatnonzero(first + _PER_OCTAVE * octave < 1)
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
    one = 1 + 16 * _PER_OCTAVE
    first, last = one + _PER_OCTAVE * lowest, one + _PER_OCTAVE * _OCTAVES_ABOVE
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

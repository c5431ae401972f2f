"""The laws of calibration histograms.

A calibration histogram counts |x| in 258 log-linear bins and carries the exact sum of |x| per bin (see
`la_aciq.Moments`). Inside a bin the law is taken to have a linear density that matches the bin's count and sum (the
slope is limited where the density would become negative), so that P(|X| > a) and E(|X| - a)+ are exact at every bin
edge.

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
from .checks import Array
from .law import Law

BINS_PER_OCTAVE = 8


@lru_cache(maxsize=1)
def bin_geometry() -> tuple[Array, Array, Array]:
    """Lower edge, middle and half width of every bin; the last bin is a point at 2^16."""
    edges = np.array(histogram_edges(), dtype=np.float64)
    edges[-1] = edges[-2]
    return edges[:-1], (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2


def _bin_moments() -> tuple[Array, Array]:
    """First and second moment that a unit of weight in each bin adds."""
    _, middle, half = bin_geometry()
    return middle, middle**2 + half**2 / 3


def _offset_moments() -> tuple[Array, Array]:
    """First and second moment that a unit of offset in each bin adds."""
    _, middle, half = bin_geometry()
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
        if array.dtype.kind not in "iu":
            raise TypeError(f"histogram: expected integers, got {type(histogram).__name__} of {array.dtype}")
        if array.shape[-2:] != (BINS, 2):
            raise ValueError(f"histogram: expected shape [..., {BINS}, 2], got {array.shape}")
        if array.size and array.min() < 0:
            raise ValueError(f"histogram: expected counts and sums of at least 0, got {array.min()}")
        flat = array.reshape(-1, BINS, 2)
        return cls._from_sums(flat[..., 0].astype(np.float64), histogram_sums(flat))

    @classmethod
    def from_samples(cls, x: Array) -> Bins:
        """From values x (flattened to one row)."""
        x = np.abs(x).ravel()
        bin_of = np.searchsorted(bin_geometry()[0], x, side="right") - 1
        counts = np.bincount(bin_of, minlength=BINS).astype(np.float64)
        # The last bin is a point at its lower edge.
        sums = np.bincount(bin_of, weights=np.minimum(x, bin_geometry()[0][-1]), minlength=BINS).astype(np.float64)
        return cls._from_sums(counts[None], sums[None])

    @classmethod
    def _from_sums(cls, counts: Array, sums: Array) -> Bins:
        _, middle, half = bin_geometry()
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
            raise ValueError("histogram: expected mass in every histogram, got one that counted no finite value")
        self._build(bins)
        self._take(np.arange(len(bins.weight)).reshape(np.shape(histogram)[:-2]))

    @classmethod
    def from_bins(cls, bins: Bins) -> HistogramLaw:
        """A law from its bins.

        Args:
            bins: weights and offsets, float64 [R, 258] each.

        Returns:
            The law, of shape [R].
        """
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
        low, middle, half = bin_geometry()
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
        low, middle, half = bin_geometry()
        rows, a = np.broadcast_arrays(self._rows, np.abs(np.asarray(x, dtype=np.float64)))
        i = np.clip(np.searchsorted(low, a, side="right") - 1, 0, BINS - 1)
        h = np.where(half[i] > 0, half[i], 1)
        inside = self.bins.weight[rows, i] + 3 * self.bins.offset[rows, i] * (a - middle[i]) / h
        return np.where(half[i] > 0, inside / (4 * h), 0.0)

    def decay_start(self) -> Array:
        return np.full(self.shape, bin_geometry()[0][-1])

    @property
    def edges(self) -> Array:
        """Edges of the bins of |x|: [259], the last two equal (the last bin is a point)."""
        low, middle, half = bin_geometry()
        return np.append(low, middle[-1] + half[-1])

    @property
    def bin_probabilities(self) -> Array:
        """Probability of each bin of |x|: [..., 258]."""
        return np.asarray(self.bins.weight[self._rows])

    def quantiles(self, level: Array) -> Array:
        """Quantiles of |X| (the law of X is symmetric).

        Args:
            level: float64 [R, n] from 0 to 1, n levels for each of the R laws; a single law (shape ()) serves all R.

        Returns:
            The magnitudes below which these shares lie: float64 [R, n], in units of X.
        """
        _, middle, half = bin_geometry()
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
        _, m, h = bin_geometry()
        even = self.bins.weight @ (m**4 + 2 * m**2 * h**2 + h**4 / 5)
        odd = self.bins.offset @ (4 * m**3 * h + 12 / 5 * m * h**3)
        return np.asarray((even + odd)[self._rows])

    @property
    def mean_abs(self) -> Array:
        return np.asarray(self._suffix[1, self._rows, 0])

    def entropy(self) -> Array:
        """Of the symmetric law, the density taken constant inside bins; -inf when mass sits at the last bin's point."""
        _, _, half = bin_geometry()
        p = self.bins.weight
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, -p * np.log(p / (4 * half)), 0.0)
        return np.asarray(terms.sum(-1)[self._rows])

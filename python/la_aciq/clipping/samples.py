"""The law of a sample: point masses at its values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import LARGEST_LAW, LEAST_LAW, Array, beyond_squares, finite_array
from .histogram import HistogramLaw
from .law import Law, unit_law


class Empirical(Law):
    """The empirical law of samples (any shape, flattened): every statistic is the sample's own, with no smoothing.

    For a calibration histogram use `Empirical.from_histogram`. Accuracy: rounding of prefix sums in float64, about
    1e-15 E X^2 absolute.
    """

    def __init__(self, samples: ArrayLike) -> None:
        x = finite_array("samples", samples).ravel()
        if x.size == 0:
            raise ValueError("samples: expected at least one value, got none")
        largest = float(np.abs(x).max())
        if largest > LARGEST_LAW or 0 < largest < LEAST_LAW:
            raise ValueError(
                f"samples: expected a largest magnitude of 0 or from {LEAST_LAW:.1e} to {LARGEST_LAW:.1e}, got "
                f"{largest}: rescale the values, their clip scales with them"
            )
        self._extreme = largest > 0 and bool(beyond_squares(np.asarray(largest)))
        self.shape = ()
        self.samples = np.sort(x)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            # Central moments about the mean: raw power sums would cancel when the mean is large.
            self._mean = float(x.mean())
            d = x - self._mean
            self._moments = [float((d**k).mean()) for k in (2, 3, 4)]
            self._prefix = [np.concatenate([[0.0], np.cumsum(self.samples**k)]) for k in (0, 1, 2)]
            self._suffix = [np.concatenate([np.cumsum((self.samples**k)[::-1])[::-1], [0.0]]) for k in (0, 1, 2)]

    def _magnitude(self) -> Array:
        return np.asarray(np.abs(self.samples[[0, -1]]).max())

    def _over(self, scale: Array) -> Law:
        return Empirical(self.samples / scale)

    @staticmethod
    def from_histogram(histogram: ArrayLike) -> Law:
        """The law of calibration log-histograms (see `HistogramLaw`).

        Args:
            histogram: int64 [..., 258, 2]: per bin of |x| the number of values and the bits of their sum, as
                `Moments.histogram` has them.

        Returns:
            A `HistogramLaw` of shape [...].

        Raises:
            TypeError: the histogram does not hold integers.
            ValueError: another shape, a negative count, or a histogram without values.
        """
        return HistogramLaw(histogram)

    def __repr__(self) -> str:
        return f"Empirical({self.samples.size} samples)"

    def above(self, t: ArrayLike, order: int) -> Array:
        t = np.asarray(t, dtype=np.float64)
        i = np.searchsorted(self.samples, t, side="right")
        return self._expand([s[i] for s in self._suffix], t, order)

    def below(self, t: ArrayLike, order: int) -> Array:
        t = np.asarray(t, dtype=np.float64)
        i = np.searchsorted(self.samples, t, side="left")
        return self._expand([s[i] for s in self._prefix], t, order)

    def _expand(self, sums: Sequence[Array], t: Array, order: int) -> Array:
        n = self.samples.size
        if order == 0:
            return np.asarray(sums[0] / n)
        if order == 1:
            return np.asarray(np.abs(sums[1] - t * sums[0]) / n)
        return np.asarray(np.maximum(sums[2] - 2 * t * sums[1] + t**2 * sums[0], 0) / n)

    def density(self, x: ArrayLike) -> Array:
        return np.zeros(np.shape(x))

    def take(self, index: NDArray[np.intp]) -> Law:
        return self

    @property
    def mean(self) -> Array:
        return np.asarray(self._mean)

    @property
    def variance(self) -> Array:
        return np.asarray(self._moments[0])

    @property
    def third_moment(self) -> Array:
        return np.asarray(self._moments[1])

    @property
    def fourth_moment(self) -> Array:
        return np.asarray(self._moments[2])

    @property
    def skewness(self) -> Array:
        return self._standardized_moment(3)

    @property
    def kurtosis(self) -> Array:
        return self._standardized_moment(4) - 3

    def _standardized_moment(self, order: int) -> Array:
        if self._extreme:
            unit, _ = unit_law(self)
            return unit.skewness if order == 3 else unit.kurtosis + 3
        std = float(self.std)
        if std == 0:
            return np.asarray(np.nan)
        return np.asarray((((self.samples - self._mean) / std) ** order).mean())

    def decay_start(self) -> Array:
        return np.asarray(np.abs(self.samples[[0, -1]]).max())

    def entropy(self) -> Array:
        """Vasicek's spacing estimate with m = round(sqrt(n) / 2); -inf when a tie fills a spacing."""
        x, n = self.samples, self.samples.size
        m = max(1, round(np.sqrt(n) / 2))
        i = np.arange(n)
        gaps = x[np.minimum(i + m, n - 1)] - x[np.maximum(i - m, 0)]
        if np.any(gaps <= 0):
            return np.asarray(-np.inf)
        return np.asarray(np.log(n / (2 * m) * gaps).mean())

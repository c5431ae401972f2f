"""Streaming moments: what one pass over data leaves behind, how two such summaries merge, and what is read off them.

A state is float64 [..., 8]: count, mean, M2, M3, M4, min, max, nonfinite, where M_p is the sum of (x - mean)^p.
Everything but the last entry is over the finite elements. States merge by the pairwise formulas of Chan, Golub &
LeVeque (1979) and Pebay (2008, SAND2008-6212); raw powers are never summed, since they cancel when the mean is far
from zero.

A histogram is int64 [..., 258, 2] over |x| in log-linear bins read off the float32 bits: bin 0 holds |x| < 2^-16
(zeros too), bins 1 to 256 cut each octave from 2^-16 to 2^16 into 8 equal parts, bin 257 holds |x| >= 2^16. The last
axis is (count, sum of the low 20 mantissa bits): integers, so histograms add up exactly in any order, and still give
the sum of |x| in each inner bin exactly for float32 data.

Needs NumPy alone.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
NanPolicy = Literal["propagate", "omit", "raise"]

_NAN_POLICIES: tuple[str, ...] = get_args(NanPolicy)
STATE_SIZE = 8
HISTOGRAM_BINS = 258
COUNT, MEAN, M2, M3, M4, MIN, MAX, NONFINITE = range(STATE_SIZE)

_EXPONENT_MIN, _OCTAVES, _PER_OCTAVE = -16, 32, 8


def histogram_edges() -> Float64:
    """The 259 edges of the 258 bins: 0, 2^-16, ..., 2^16, inf. Bin i holds edges[i] <= |x| < edges[i + 1]."""
    octave, part = np.divmod(np.arange(_OCTAVES * _PER_OCTAVE + 1), _PER_OCTAVE)
    inner = np.ldexp(1.0 + part / _PER_OCTAVE, octave + _EXPONENT_MIN)
    return np.concatenate([[0.0], inner, [np.inf]])


def histogram_sums(histogram: Int64) -> Float64:
    """The sum of |x| in each bin, float64 [..., 258], of an int64 [..., 258, 2] histogram.

    Exact for the 256 inner bins of float32, bfloat16 or float16 data. Bin 0 takes the middle of its interval, count *
    2^-17; bin 257, which has no upper edge, takes the lower bound count * 2^16.
    """
    histogram = _checked_histogram(histogram)
    count, low = histogram[..., 0].astype(np.float64), histogram[..., 1].astype(np.float64)
    lower = histogram_edges()[:-1]
    lower[0] = 2.0 ** (_EXPONENT_MIN - 1)
    unit = np.zeros(HISTOGRAM_BINS)
    unit[1:-1] = np.ldexp(1.0, np.repeat(np.arange(_OCTAVES), _PER_OCTAVE) + _EXPONENT_MIN - 23)
    return count * lower + low * unit


def merge_states(a: Float64, b: Float64) -> Float64:
    """The state of the union of two samples; float64 [..., 8] each, broadcast against each other."""
    n_a, mean_a, m2_a, m3_a, m4_a = np.moveaxis(a, -1, 0)[:5]
    n_b, mean_b, m2_b, m3_b, m4_b = np.moveaxis(b, -1, 0)[:5]
    n = n_a + n_b
    total = np.maximum(n, 1.0)
    share_a, share_b = n_a / total, n_b / total
    # An empty sample has mean 0, which must not pull the other's mean.
    delta = np.where((n_a > 0) & (n_b > 0), mean_b - mean_a, 0.0)
    out = np.empty(np.broadcast_shapes(a.shape, b.shape))
    out[..., COUNT] = n
    out[..., MEAN] = np.where(n_a > 0, mean_a + delta * share_b, mean_b)
    out[..., M2] = m2_a + m2_b + delta**2 * n_a * share_b
    out[..., M3] = (
        m3_a + m3_b + delta**3 * n_a * share_b * (share_a - share_b) + 3 * delta * (share_a * m2_b - share_b * m2_a)
    )
    out[..., M4] = (
        m4_a
        + m4_b
        + delta**4 * n_a * share_b * (share_a**2 - share_a * share_b + share_b**2)
        + 6 * delta**2 * (share_a**2 * m2_b + share_b**2 * m2_a)
        + 4 * delta * (share_a * m3_b - share_b * m3_a)
    )
    out[..., MIN] = np.minimum(a[..., MIN], b[..., MIN])
    out[..., MAX] = np.maximum(a[..., MAX], b[..., MAX])
    out[..., NONFINITE] = a[..., NONFINITE] + b[..., NONFINITE]
    return out


def empty_state(shape: tuple[int, ...] = ()) -> Float64:
    """The state of no data, float64 [*shape, 8]: the neutral element of `merge_states`."""
    state = np.zeros((*shape, STATE_SIZE))
    state[..., MIN] = np.inf
    state[..., MAX] = -np.inf
    return state


class Moments:
    """Mean, variance, skewness, kurtosis, extremes and perhaps a histogram of |x|, of one sample or an array of them.

    Properties have the shape of the array of samples and follow SciPy: population (biased) moments, excess kurtosis,
    NaN for skewness and kurtosis of a constant or empty sample. `a + b` is the union of two samples, `m[i]` picks from
    the array, `m.pool(axis)` is the union over an axis.

    nan_policy says what NaN and infinities in the data do: "propagate" makes every statistic of that sample NaN, "omit"
    describes the finite elements, "raise" refuses with ValueError. They are counted in `.nonfinite` in any case.
    """

    __slots__ = ("histogram", "nan_policy", "state")

    state: Float64
    histogram: Int64 | None
    nan_policy: NanPolicy

    def __init__(self, state: Float64, histogram: Int64 | None, nan_policy: NanPolicy) -> None:
        if nan_policy == "raise" and (bad := int(state[..., NONFINITE].sum())):
            raise ValueError(f"x: expected finite values with nan_policy='raise', got {bad} NaN or infinite elements")
        self.state = state
        self.histogram = histogram
        self.nan_policy = nan_policy

    @classmethod
    def from_state(
        cls, state: ArrayLike, histogram: ArrayLike | None = None, nan_policy: NanPolicy = "propagate"
    ) -> "Moments":
        """Moments from their state.

        Args:
            state: Real numbers [..., 8], as float64.
            histogram: int64 [..., 258, 2] of the same leading shape, or None.
            nan_policy: "propagate", "omit" or "raise".

        Returns:
            An array of samples of the leading shape.

        Raises:
            TypeError: The state or the histogram does not hold real numbers, or has a mask.
            ValueError: A shape or nan_policy does not fit; or nan_policy is "raise" and an element was not finite.
        """
        check_nan_policy(nan_policy)
        state = _real_numbers("state", state).astype(np.float64, copy=False)
        if state.ndim == 0 or state.shape[-1] != STATE_SIZE:
            raise ValueError(f"state: expected shape [..., {STATE_SIZE}], got {list(state.shape)}")
        if histogram is not None:
            histogram = _checked_histogram(_real_numbers("histogram", histogram))
            if histogram.shape[:-2] != state.shape[:-1]:
                expected = [*state.shape[:-1], HISTOGRAM_BINS, 2]
                raise ValueError(f"histogram: expected shape {expected} to match state, got {list(histogram.shape)}")
        return cls(state, histogram, nan_policy)

    @classmethod
    def empty(
        cls, shape: tuple[int, ...] = (), histogram: bool = False, nan_policy: NanPolicy = "propagate"
    ) -> "Moments":
        """Moments of no data, the neutral element of `+`.

        Args:
            shape: Of the array of samples; () for a single one.
            histogram: Whether the moments have a histogram.
            nan_policy: "propagate", "omit" or "raise".

        Returns:
            Moments whose counts are all 0.
        """
        counts = np.zeros((*shape, HISTOGRAM_BINS, 2), dtype=np.int64) if histogram else None
        return cls.from_state(empty_state(shape), counts, nan_policy)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.state.shape[:-1]

    @property
    def count(self) -> Any:
        """Number of finite elements."""
        return self.state[..., COUNT][()]

    @property
    def nonfinite(self) -> Any:
        """Number of NaN and infinite elements."""
        return self.state[..., NONFINITE][()]

    @property
    def mean(self) -> Any:
        return self._statistic(self.state[..., MEAN])

    @property
    def variance(self) -> Any:
        """Population variance, M2 / count."""
        return self._statistic(self._per_element(M2))

    @property
    def std(self) -> Any:
        return self._statistic(np.sqrt(self._per_element(M2)))

    @property
    def rms(self) -> Any:
        """sqrt(E x^2)."""
        return self._statistic(np.sqrt(self._per_element(M2) + self.state[..., MEAN] ** 2))

    @property
    def skewness(self) -> Any:
        """E (x - mean)^3 / variance^(3/2)."""
        return self._statistic(self._standardized(M3, 1.5))

    @property
    def kurtosis(self) -> Any:
        """Excess kurtosis, E (x - mean)^4 / variance^2 - 3."""
        return self._statistic(self._standardized(M4, 2.0) - 3.0)

    @property
    def min(self) -> Any:
        return self._statistic(self.state[..., MIN])

    @property
    def max(self) -> Any:
        return self._statistic(self.state[..., MAX])

    def pool(self, axis: int = 0) -> "Moments":
        """The union of the samples along an axis of the array of samples.

        Args:
            axis: The axis; a negative one counts from the last.

        Returns:
            Moments without that axis.

        Raises:
            ValueError: There is no such axis.
        """
        if not -len(self.shape) <= axis < len(self.shape):
            raise ValueError(
                f"axis: expected one of the {len(self.shape)} axes of shape {list(self.shape)}, got {axis}"
            )
        axis %= len(self.shape)
        state = np.moveaxis(self.state, axis, 0)
        # A tree of pairwise merges: rounding grows with the logarithm of the length.
        while len(state) > 1:
            half = len(state) // 2
            state = np.concatenate([merge_states(state[:half], state[half : 2 * half]), state[2 * half :]])
        pooled = state[0] if len(state) else empty_state(state.shape[1:-1])
        histogram = None if self.histogram is None else self.histogram.sum(axis=axis)
        return Moments(pooled, histogram, self.nan_policy)

    def __add__(self, other: "Moments") -> "Moments":
        if not isinstance(other, Moments):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"cannot merge moments of shapes {list(self.shape)} and {list(other.shape)}")
        if self.nan_policy != other.nan_policy:
            raise ValueError(f"cannot merge moments of nan_policy {self.nan_policy!r} and {other.nan_policy!r}")
        if (self.histogram is None) != (other.histogram is None):
            raise ValueError("cannot merge moments with a histogram and moments without one")
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            histogram = self.histogram + other.histogram
        return Moments(merge_states(self.state, other.state), histogram, self.nan_policy)

    def __radd__(self, other: object) -> "Moments":
        """`sum` of a list of moments begins with 0."""
        return self if isinstance(other, int) and not isinstance(other, bool) and other == 0 else NotImplemented

    def __getitem__(self, index: Any) -> "Moments":
        index = (*(index if isinstance(index, tuple) else (index,)), Ellipsis, slice(None))
        state = self.state[index]
        histogram = None if self.histogram is None else self.histogram[(*index, slice(None))]
        return Moments(state, histogram, self.nan_policy)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("moments of a single sample have no len()")
        return self.shape[0]

    def __iter__(self) -> Iterator["Moments"]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> tuple[Float64, Int64 | None, NanPolicy]:
        return self.state, self.histogram, self.nan_policy

    def __setstate__(self, saved: tuple[Float64, Int64 | None, NanPolicy]) -> None:
        self.state, self.histogram, self.nan_policy = saved

    def __repr__(self) -> str:
        if self.shape:
            return f"Moments(shape={list(self.shape)}, count={int(self.state[..., COUNT].sum())})"
        return (
            f"Moments(count={int(self.count)}, mean={self.mean:.6g}, std={self.std:.6g}, "
            f"skewness={self.skewness:.4g}, kurtosis={self.kurtosis:.4g}, nonfinite={int(self.nonfinite)})"
        )

    def _per_element(self, power: int) -> Float64:
        count = self.state[..., COUNT]
        return np.where(count > 0, self.state[..., power] / np.maximum(count, 1.0), np.nan)

    def _standardized(self, power: int, exponent: float) -> Float64:
        """A central moment over a power of the variance; NaN where that is only rounding of the mean, as in SciPy."""
        variance = self._per_element(M2)
        constant = ~(variance > (np.finfo(np.float64).resolution * self.state[..., MEAN]) ** 2)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.where(constant, np.nan, self._per_element(power) / variance**exponent)

    def _statistic(self, value: Float64) -> Any:
        usable = self.state[..., COUNT] > 0
        if self.nan_policy != "omit":
            usable = usable & (self.state[..., NONFINITE] == 0)
        return np.where(usable, value, np.nan)[()]


def check_nan_policy(nan_policy: str) -> None:
    if nan_policy not in _NAN_POLICIES:
        raise ValueError(f"nan_policy: expected 'propagate', 'omit' or 'raise', got {nan_policy!r}")


def _real_numbers(name: str, values: ArrayLike) -> NDArray[Any]:
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, got a masked array")
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected real numbers, got {array.dtype}")
    return array


def _checked_histogram(histogram: Any) -> Int64:
    if histogram.shape[-2:] != (HISTOGRAM_BINS, 2) or histogram.dtype.kind not in "iu":
        got = f"{histogram.dtype} {list(histogram.shape)}"
        raise ValueError(f"histogram: expected integers of shape [..., {HISTOGRAM_BINS}, 2], got {got}")
    counts: Int64 = histogram.astype(np.int64, copy=False)
    return counts

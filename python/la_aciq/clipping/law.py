"""A law of one value X, described by what a clip optimizer asks of it.

Everything here rests on the one-sided partial moments

    above(t, k) = E[(X - t)^k ; X > t],    below(t, k) = E[(t - X)^k ; X < t],    k = 0, 1, 2,

whose sum at +-a gives the tail of abs(X): P(abs(X) > a), E(abs(X) - a)+ and E((abs(X) - a)+)^2. `sigma` is always the
standard deviation (not the family's scale parameter), so that laws of equal `sigma` have equal power. Parameters may
be arrays: a law of shape [P] is P laws, and `above(t, k)` broadcasts t against it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import LaAciqError
from .checks import LARGEST_SCALE, LEAST_SCALE, Array


class Law(ABC):
    """A law (or an array of laws, of shape `shape`) with finite variance."""

    shape: tuple[int, ...]
    # Whether squares of values leave float64's range, so that nothing but `unit_law` may be asked of the law.
    _extreme = False

    def _magnitude(self) -> Array:
        """About the rms, without squares: [...] of shape `shape`."""
        return self.rms

    def _over(self, scale: Array) -> Law:
        """The law of X / scale, for powers of two that broadcast against `shape`."""
        if np.all(scale == 1):
            return self
        raise LaAciqError(f"law: expected a law that can be rescaled, got {type(self).__name__}")

    @abstractmethod
    def above(self, t: ArrayLike, order: int) -> Array:
        """E[(X - t)^order ; X > t], the upper partial moment.

        Args:
            t: threshold in units of X; broadcasts against `shape`.
            order: 0, 1 or 2.

        Returns:
            float64 of the broadcast shape, in units of X^order.
        """

    @abstractmethod
    def below(self, t: ArrayLike, order: int) -> Array:
        """E[(t - X)^order ; X < t], the lower partial moment.

        Args:
            t: threshold in units of X; broadcasts against `shape`.
            order: 0, 1 or 2.

        Returns:
            float64 of the broadcast shape, in units of X^order.
        """

    @abstractmethod
    def density(self, x: ArrayLike) -> Array:
        """Probability density (zero where the law is a set of point masses).

        Args:
            x: where, in units of X; broadcasts against `shape`.

        Returns:
            float64 of the broadcast shape, per unit of X.
        """

    @abstractmethod
    def take(self, index: NDArray[np.intp]) -> Law:
        """The laws at these positions of the flattened array.

        Args:
            index: integers of any shape. A single law (shape ()) stands for every position.

        Returns:
            Laws of the shape of `index`; a single law returns itself.
        """

    def decay_start(self) -> Array:
        """A t0 >= 0 such that t^2 P(X > t) and t^2 P(X < -t) do not grow for t >= t0; inf where none is known.

        The error of a codebook with a zero does not fall beyond the clip whose first threshold is t0 (see
        `clipping.scan`). In units of X, shape `shape`.
        """
        return np.full(self.shape, np.inf)

    @property
    @abstractmethod
    def mean(self) -> Array:
        """E X."""

    @property
    @abstractmethod
    def variance(self) -> Array:
        """Central second moment."""

    @property
    @abstractmethod
    def third_moment(self) -> Array:
        """Central third moment; NaN where it does not exist."""

    @property
    @abstractmethod
    def fourth_moment(self) -> Array:
        """Central fourth moment; inf where it does not exist."""

    @abstractmethod
    def entropy(self) -> Array:
        """Differential entropy in nats; -inf for point masses."""

    @property
    def size(self) -> int:
        """How many laws this object holds."""
        return int(np.prod(self.shape, dtype=np.int64))

    def tail(self, a: ArrayLike, order: int) -> Array:
        """E[(abs(X) - a)^order ; abs(X) > a]: the tail's mass, the mean excess and the mean squared excess.

        Args:
            a: clips >= 0 in units of X; broadcasts against `shape`.
            order: 0, 1 or 2.

        Returns:
            float64 of the broadcast shape, in units of X^order.
        """
        a = np.asarray(a, dtype=np.float64)
        return self.above(a, order) + self.below(-a, order)

    def tail_mass(self, a: ArrayLike) -> Array:
        """P(abs(X) > a).

        Args:
            a: clips >= 0 in units of X; broadcasts against `shape`.

        Returns:
            float64 of the broadcast shape, from 0 to 1.
        """
        return self.tail(a, 0)

    def tail_excess(self, a: ArrayLike) -> Array:
        """E(abs(X) - a)+, the mean excess over a clip.

        Args:
            a: clips >= 0 in units of X; broadcasts against `shape`.

        Returns:
            float64 of the broadcast shape, in units of X.
        """
        return self.tail(a, 1)

    def tail_square(self, a: ArrayLike) -> Array:
        """E((abs(X) - a)+)^2, the clipping error of a symmetric clip.

        Args:
            a: clips >= 0 in units of X; broadcasts against `shape`.

        Returns:
            float64 of the broadcast shape, in units of X squared.
        """
        return self.tail(a, 2)

    @property
    def power(self) -> Array:
        """E X^2 about zero (the variance when the mean is zero): what normalized errors are divided by."""
        return self.variance + self.mean**2

    @property
    def rms(self) -> Array:
        """Square root of the power."""
        return np.sqrt(self.power)

    def power_beyond(self, t: ArrayLike) -> Array:
        """E[X^2 ; abs(X) > t], the part of the power that lies beyond a threshold.

        Args:
            t: thresholds >= 0 in units of X; broadcasts against `shape`.

        Returns:
            float64 of the broadcast shape, in units of X squared.
        """
        t = np.asarray(t, dtype=np.float64)
        return np.asarray(self.tail(t, 2) + 2 * t * self.tail(t, 1) + t**2 * self.tail(t, 0))

    @property
    def mean_abs(self) -> Array:
        """E abs(X)."""
        return self.tail(0.0, 1)

    @property
    def std(self) -> Array:
        """Standard deviation."""
        return np.sqrt(self.variance)

    @property
    def skewness(self) -> Array:
        """Central third moment over variance^1.5; NaN for a constant."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.variance > 0, self.third_moment / self.variance**1.5, np.nan)

    @property
    def kurtosis(self) -> Array:
        """Excess kurtosis mu_4 / mu_2^2 - 3; inf when the fourth moment is, NaN for a constant."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.variance > 0, self.fourth_moment / self.variance**2 - 3, np.nan)


def check_law(law: object) -> Law:
    """`law`, or an error that says what a law is and which scales it may have."""
    if not isinstance(law, Law):
        raise TypeError(f"law: expected a clipping law such as Gaussian(), got {type(law).__name__}")
    if law._extreme:
        raise ValueError(
            f"law: expected a scale from {LEAST_SCALE:.1e} to {LARGEST_SCALE:.1e}, whose squares are float64 numbers, "
            f"got {law!r}: rescale the values"
        )
    return law


def unit_law(law: object) -> tuple[Law, Array | None]:
    """The law of X / scale and the scale, of shape `shape`, for computations that are right at any scale.

    Scales are powers of two, so that dividing and multiplying by them is exact. None stands for ones: laws whose
    squares are float64 numbers stay as they are.
    """
    if isinstance(law, Law) and law._extreme:
        scale = power_of_two(law._magnitude())
        return check_law(law._over(scale)), scale
    return check_law(law), None


def power_of_two(magnitude: Array) -> Array:
    """The power of two next above each magnitude."""
    return np.asarray(np.ldexp(1.0, np.frexp(magnitude)[1]))


def common_unit(laws: Sequence[Law]) -> tuple[list[Law], float]:
    """Laws of X over one scale for all, and that scale: 1 unless one of them is extreme."""
    if not any(law._extreme for law in laws):
        return list(laws), 1.0
    scale = power_of_two(np.asarray(max(float(np.max(law._magnitude())) for law in laws)))
    return [check_law(law._over(scale)) for law in laws], float(scale)


def check_single(law: object) -> Law:
    """`law` as a single law of shape (), or an error."""
    law = check_law(law)
    if law.size != 1:
        raise ValueError(f"law: expected a single law, got {law.size} of them")
    return law if law.shape == () else law.take(np.zeros((), dtype=np.intp))


def list_of_laws(laws: object) -> list[Law]:
    """`laws` as a list, or a TypeError."""
    if isinstance(laws, (str, bytes, Law, Mapping)) or not isinstance(laws, Iterable):
        raise TypeError(f"laws: expected a sequence of clipping laws, got {type(laws).__name__}")
    result = []
    for law in laws:
        if not isinstance(law, Law):
            raise TypeError(f"laws: expected clipping laws, got {type(law).__name__}")
        result.append(law)
    return result

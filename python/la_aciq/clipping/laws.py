"""Laws of one value X, described by what a clip optimizer asks of them.

Everything here rests on the one-sided partial moments

    above(t, k) = E[(X - t)^k ; X > t],    below(t, k) = E[(t - X)^k ; X < t],    k = 0, 1, 2,

whose sum at +-a gives the tail of abs(X): P(abs(X) > a), E(abs(X) - a)+ and E((abs(X) - a)+)^2. `sigma` is always the
standard deviation (not the family's scale parameter), so that laws of equal `sigma` have equal power. Parameters may
be arrays: a law of shape [P] is P laws, and `above(t, k)` broadcasts t against it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import integrate, special

Array = NDArray[np.float64]

_SQRT_HALF_PI = float(np.sqrt(np.pi / 2))


def _as_finite(name: str, value: ArrayLike) -> Array:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number or an array of numbers, got {value!r}") from error
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite, got {_show(array[~np.isfinite(array)])}")
    return array


def _as_positive(name: str, value: ArrayLike) -> Array:
    array = _as_finite(name, value)
    if not np.all(array > 0):
        raise ValueError(f"{name} must be positive, got {_show(array[~(array > 0)])}")
    return array


def _show(bad: Array) -> float:
    return float(np.ravel(bad)[0])


class Law(ABC):
    """A law (or an array of laws, of shape `shape`) with finite variance."""

    shape: tuple[int, ...]

    @abstractmethod
    def above(self, t: ArrayLike, order: int) -> Array:
        """E[(X - t)^order ; X > t] for order 0, 1, 2; t broadcasts against `shape`."""

    @abstractmethod
    def below(self, t: ArrayLike, order: int) -> Array:
        """E[(t - X)^order ; X < t] for order 0, 1, 2; t broadcasts against `shape`."""

    @abstractmethod
    def density(self, x: ArrayLike) -> Array:
        """Probability density at x (zero where the law is a set of point masses)."""

    @abstractmethod
    def take(self, index: NDArray[np.intp]) -> Law:
        """The laws at these positions of the flattened array; a single law (shape ()) stands for every position."""

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
        """E[(abs(X) - a)^order ; abs(X) > a] for a >= 0: the tail mass, the expected excess and its square for
        order 0, 1, 2.
        """
        a = np.asarray(a, dtype=np.float64)
        return self.above(a, order) + self.below(-a, order)

    def tail_mass(self, a: ArrayLike) -> Array:
        """P(abs(X) > a)."""
        return self.tail(a, 0)

    def tail_excess(self, a: ArrayLike) -> Array:
        """E(abs(X) - a)+, in units of X."""
        return self.tail(a, 1)

    def tail_square(self, a: ArrayLike) -> Array:
        """E((abs(X) - a)+)^2, in units of X squared: the clipping error of a symmetric clip a."""
        return self.tail(a, 2)

    @property
    def power(self) -> Array:
        """E X^2 about zero (the variance when the mean is zero): what normalized errors are divided by."""
        return self.variance + self.mean**2

    @property
    def rms(self) -> Array:
        """Square root of the power."""
        return np.sqrt(self.power)

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


class _Family(Law):
    """A symmetric location-scale family. Subclasses give the standard member's partial moments for z >= 0."""

    def __init__(self, sigma: ArrayLike, mean: ArrayLike, **parameters: Array) -> None:
        arrays = {"sigma": _as_positive("sigma", sigma), "mean": _as_finite("mean", mean), **parameters}
        try:
            self.shape = np.broadcast_shapes(*(array.shape for array in arrays.values()))
        except ValueError as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise ValueError(
                f"parameters of {type(self).__name__} must broadcast together, got shapes {shapes}"
            ) from error
        self._parameters = {name: np.broadcast_to(array, self.shape) for name, array in arrays.items()}

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value.tolist()}" for name, value in self._parameters.items())
        return f"{type(self).__name__}({inside})"

    @property
    def sigma(self) -> Array:
        """Standard deviation."""
        return self._parameters["sigma"]

    @property
    def mean(self) -> Array:
        return self._parameters["mean"]

    @property
    def variance(self) -> Array:
        return self.sigma**2

    @property
    def third_moment(self) -> Array:
        return np.zeros(self.shape)

    @property
    def fourth_moment(self) -> Array:
        return self.variance**2 * (3 + self._excess_kurtosis())

    @property
    def _scale(self) -> Array:
        """The family's own scale parameter."""
        return self.sigma / np.sqrt(self._standard_variance())

    def take(self, index: NDArray[np.intp]) -> Law:
        if self.shape == ():
            return self
        return type(self)(**{name: np.ravel(value)[index] for name, value in self._parameters.items()})

    def above(self, t: ArrayLike, order: int) -> Array:
        return self._one_sided(np.asarray(t, dtype=np.float64) - self.mean, order)

    def below(self, t: ArrayLike, order: int) -> Array:
        return self._one_sided(self.mean - np.asarray(t, dtype=np.float64), order)

    def _one_sided(self, distance: Array, order: int) -> Array:
        z = distance / self._scale
        far = self._partial(np.abs(z), order)
        # Reflection: below its centre, a symmetric law's partial moment is the whole moment less the mirrored tail.
        if order == 0:
            near = 1 - far
        elif order == 1:
            near = far + np.abs(z)
        else:
            near = self._standard_variance() + z**2 - far
        return np.asarray(np.where(z >= 0, far, near) * self._scale**order)

    def density(self, x: ArrayLike) -> Array:
        z = np.abs(np.asarray(x, dtype=np.float64) - self.mean) / self._scale
        return np.asarray(self._standard_density(z) / self._scale)

    def entropy(self) -> Array:
        return np.asarray(self._standard_entropy() + np.log(self._scale))

    @abstractmethod
    def _partial(self, z: Array, order: int) -> Array: ...

    @abstractmethod
    def _standard_density(self, z: Array) -> Array: ...

    @abstractmethod
    def _standard_variance(self) -> Array | float: ...

    @abstractmethod
    def _standard_entropy(self) -> Array | float: ...

    @abstractmethod
    def _excess_kurtosis(self) -> Array | float: ...


class Gaussian(_Family):
    """Normal law with standard deviation `sigma` and mean `mean` (scalars or arrays that broadcast)."""

    def __init__(self, sigma: ArrayLike = 1.0, mean: ArrayLike = 0.0) -> None:
        super().__init__(sigma, mean)

    def _partial(self, z: Array, order: int) -> Array:
        # Written with the Mills ratio (1 - Phi) / phi, so that relative precision survives where 1 - Phi underflows to
        # rounding.
        mills = _SQRT_HALF_PI * special.erfcx(z / np.sqrt(2))
        if order == 0:
            factor = mills
        elif order == 1:
            factor = 1 - z * mills
        else:
            factor = (1 + z**2) * mills - z
        return np.asarray(self._standard_density(z) * factor)

    def _standard_density(self, z: Array) -> Array:
        return np.asarray(np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi))

    def _standard_variance(self) -> float:
        return 1.0

    def _standard_entropy(self) -> float:
        return 0.5 * float(np.log(2 * np.pi * np.e))

    def _excess_kurtosis(self) -> float:
        return 0.0


class Laplace(_Family):
    """Double exponential law; its scale is b = sigma / sqrt(2)."""

    def __init__(self, sigma: ArrayLike = 1.0, mean: ArrayLike = 0.0) -> None:
        super().__init__(sigma, mean)

    def _partial(self, z: Array, order: int) -> Array:
        return np.asarray((0.5, 0.5, 1.0)[order] * np.exp(-z))

    def _standard_density(self, z: Array) -> Array:
        return np.asarray(0.5 * np.exp(-z))

    def _standard_variance(self) -> float:
        return 2.0

    def _standard_entropy(self) -> float:
        return 1 + float(np.log(2.0))

    def _excess_kurtosis(self) -> float:
        return 3.0


class Logistic(_Family):
    """Logistic law; its scale is sigma sqrt(3) / pi."""

    def __init__(self, sigma: ArrayLike = 1.0, mean: ArrayLike = 0.0) -> None:
        super().__init__(sigma, mean)

    def _partial(self, z: Array, order: int) -> Array:
        w = np.exp(-z)
        if order == 0:
            return np.asarray(w / (1 + w))
        if order == 1:
            return np.asarray(np.log1p(w))
        # 2 * -Li2(-w); the dilogarithm's power series where 1 + w would round w away.
        n = np.arange(1, 13)
        series = -((-w[..., None]) ** n / n**2).sum(-1)
        return np.asarray(2 * np.where(w < 0.05, series, -special.spence(1 + w)))

    def _standard_density(self, z: Array) -> Array:
        w = np.exp(-z)
        return np.asarray(w / (1 + w) ** 2)

    def _standard_variance(self) -> float:
        return np.pi**2 / 3

    def _standard_entropy(self) -> float:
        return 2.0

    def _excess_kurtosis(self) -> float:
        return 1.2


class Uniform(_Family):
    """Uniform law on mean +- sqrt(3) sigma."""

    def __init__(self, sigma: ArrayLike = 1.0, mean: ArrayLike = 0.0) -> None:
        super().__init__(sigma, mean)

    def _partial(self, z: Array, order: int) -> Array:
        inside = np.maximum(1 - z, 0)
        return np.asarray(inside ** (order + 1) / (2, 4, 6)[order])

    def _standard_density(self, z: Array) -> Array:
        return np.where(z <= 1, 0.5, 0.0)

    def _standard_variance(self) -> float:
        return 1 / 3

    def _standard_entropy(self) -> float:
        return float(np.log(2.0))

    def _excess_kurtosis(self) -> float:
        return -1.2


class StudentT(_Family):
    """Student t law with `nu` > 2 degrees of freedom, scaled to standard deviation `sigma`; kurtosis is inf for nu
    <= 4.
    """

    def __init__(self, nu: ArrayLike, sigma: ArrayLike = 1.0, mean: ArrayLike = 0.0) -> None:
        degrees = _as_finite("nu", nu)
        if not np.all(degrees > 2):
            raise ValueError(
                f"nu must be greater than 2 (the variance is infinite otherwise), got {_show(degrees[~(degrees > 2)])}"
            )
        super().__init__(sigma, mean, nu=degrees)

    @property
    def nu(self) -> Array:
        """Degrees of freedom."""
        return self._parameters["nu"]

    def _partial(self, z: Array, order: int) -> Array:
        nu = self.nu
        mass = special.stdtr(nu, -z)
        if order == 0:
            return np.asarray(mass)
        # (nu + z^2) f has derivative -(nu - 1) z f: both partial moments follow by parts.
        weighted = (nu + z**2) * self._standard_density(z)
        first = weighted / (nu - 1)
        if order == 1:
            return np.asarray(np.maximum(first - z * mass, 0))
        second = (z * weighted + nu * mass) / (nu - 2)
        return np.asarray(np.maximum(second - 2 * z * first + z**2 * mass, 0))

    def _standard_density(self, z: Array) -> Array:
        nu = self.nu
        return np.asarray(_gamma_ratio(nu / 2) / np.sqrt(nu * np.pi) * np.exp(-(nu + 1) / 2 * np.log1p(z**2 / nu)))

    def _standard_variance(self) -> Array:
        return self.nu / (self.nu - 2)

    def _standard_entropy(self) -> Array:
        nu = self.nu
        digammas = (nu + 1) / 2 * (special.psi((nu + 1) / 2) - special.psi(nu / 2))
        return np.asarray(digammas - np.log(_gamma_ratio(nu / 2) / np.sqrt(nu * np.pi)))

    def _excess_kurtosis(self) -> Array:
        return np.where(self.nu > 4, 6 / np.where(self.nu > 4, self.nu - 4, 1), np.inf)


def _gamma_ratio(x: Array) -> Array:
    """Gamma(x + 1/2) / Gamma(x), also where the difference of two log-gammas would lose digits (large x)."""
    series = 1 - 1 / (8 * x) + 1 / (128 * x**2) + 5 / (1024 * x**3) - 21 / (32768 * x**4) - 399 / (262144 * x**5)
    direct = np.exp(special.gammaln(np.minimum(x, 50) + 0.5) - special.gammaln(np.minimum(x, 50)))
    return np.asarray(np.where(x > 50, np.sqrt(x) * series, direct))


class GeneralizedGaussian(_Family):
    """Density proportional to exp(-abs(x / s)^beta), scaled to standard deviation `sigma`; beta 1 is Laplace, 2
    Gaussian.
    """

    def __init__(self, beta: ArrayLike, sigma: ArrayLike = 1.0, mean: ArrayLike = 0.0) -> None:
        super().__init__(sigma, mean, beta=_as_positive("beta", beta))

    @property
    def beta(self) -> Array:
        """Shape: the exponent of abs(x)."""
        return self._parameters["beta"]

    def _partial(self, z: Array, order: int) -> Array:
        y = z**self.beta
        moments = [0.5 * self._moment_ratio(k) * special.gammaincc((k + 1) / self.beta, y) for k in range(order + 1)]
        if order == 0:
            return np.asarray(moments[0])
        if order == 1:
            return np.asarray(np.maximum(moments[1] - z * moments[0], 0))
        return np.asarray(np.maximum(moments[2] - 2 * z * moments[1] + z**2 * moments[0], 0))

    def _moment_ratio(self, k: int) -> Array:
        """E abs(Z)^k of the standard member."""
        return np.asarray(np.exp(special.gammaln((k + 1) / self.beta) - special.gammaln(1 / self.beta)))

    def _standard_density(self, z: Array) -> Array:
        return np.asarray(self.beta / 2 * np.exp(-(z**self.beta) - special.gammaln(1 / self.beta)))

    def _standard_variance(self) -> Array:
        return self._moment_ratio(2)

    def _standard_entropy(self) -> Array:
        return np.asarray(1 / self.beta + np.log(2 / self.beta) + special.gammaln(1 / self.beta))

    def _excess_kurtosis(self) -> Array:
        return np.asarray(self._moment_ratio(4) / self._moment_ratio(2) ** 2 - 3)


class Mixture(Law):
    """X drawn from `laws[i]` with probability `weights[i]` (a mixture of laws, not a sum of variables).

    `weights` is [n], or [..., n] for an array of mixtures; the component laws' shapes broadcast with its leading axes.
    """

    def __init__(self, laws: Sequence[Law], weights: ArrayLike) -> None:
        if not laws:
            raise ValueError("laws must hold at least one law, got an empty sequence")
        for law in laws:
            if not isinstance(law, Law):
                raise TypeError(f"laws must be clipping laws, got {type(law).__name__}")
        w = _as_finite("weights", weights)
        if w.ndim == 0 or w.shape[-1] != len(laws):
            raise ValueError(f"weights must have one entry per law ({len(laws)}) on the last axis, got shape {w.shape}")
        if np.any(w < 0):
            raise ValueError(f"weights must not be negative, got {_show(w[w < 0])}")
        total = w.sum(-1)
        if not np.allclose(total, 1, rtol=0, atol=1e-9):
            raise ValueError(f"weights must sum to one, got {_show(total[~np.isclose(total, 1, rtol=0, atol=1e-9)])}")
        self.laws = tuple(laws)
        self.weights = w
        self.shape = np.broadcast_shapes(w.shape[:-1], *(law.shape for law in laws))

    def __repr__(self) -> str:
        return f"Mixture({list(self.laws)!r}, weights={self.weights.tolist()})"

    def _blend(self, values: Sequence[ArrayLike]) -> Array:
        total: Any = 0.0
        for i, value in enumerate(values):
            weight = self.weights[..., i]
            # A component of weight zero contributes nothing, even when its own moment is infinite.
            total = total + np.where(weight > 0, weight * np.where(weight > 0, value, 0.0), 0.0)
        return np.asarray(total)

    def above(self, t: ArrayLike, order: int) -> Array:
        return self._blend([law.above(t, order) for law in self.laws])

    def below(self, t: ArrayLike, order: int) -> Array:
        return self._blend([law.below(t, order) for law in self.laws])

    def density(self, x: ArrayLike) -> Array:
        return self._blend([law.density(x) for law in self.laws])

    def take(self, index: NDArray[np.intp]) -> Law:
        if self.shape == ():
            return self
        laws = []
        for law in self.laws:
            # Bring each component to the mixture's shape before picking positions of the flattened array.
            positions = np.broadcast_to(np.arange(law.size).reshape(law.shape), self.shape).ravel()
            laws.append(law.take(positions[index]))
        weights = np.broadcast_to(self.weights, (*self.shape, len(self.laws))).reshape(-1, len(self.laws))
        return Mixture(laws, weights[index])

    @property
    def mean(self) -> Array:
        return np.broadcast_to(self._blend([law.mean for law in self.laws]), self.shape)

    @property
    def variance(self) -> Array:
        d = [law.mean - self.mean for law in self.laws]
        return self._blend([law.variance + e**2 for law, e in zip(self.laws, d, strict=True)])

    @property
    def third_moment(self) -> Array:
        d = [law.mean - self.mean for law in self.laws]
        return self._blend(
            [law.third_moment + 3 * e * law.variance + e**3 for law, e in zip(self.laws, d, strict=True)]
        )

    @property
    def fourth_moment(self) -> Array:
        d = [law.mean - self.mean for law in self.laws]
        return self._blend(
            [
                law.fourth_moment + 4 * e * law.third_moment + 6 * e**2 * law.variance + e**4
                for law, e in zip(self.laws, d, strict=True)
            ]
        )

    def entropy(self) -> Array:
        """By adaptive quadrature of -f ln f (absolute accuracy 1e-8), one law at a time."""
        result = np.empty(self.size)
        for i in range(self.size):
            law = self.take(np.asarray([i])) if self.shape else self
            result[i] = _entropy_by_quadrature(law)
        return result.reshape(self.shape)


def _entropy_by_quadrature(law: Law) -> float:
    if isinstance(law, Mixture) and any(
        w > 0 and np.isneginf(np.min(part.entropy())) for w, part in zip(np.ravel(law.weights), law.laws, strict=True)
    ):
        return -np.inf

    def integrand(x: float) -> float:
        f = float(np.ravel(law.density(x))[0])
        return -f * float(np.log(f)) if f > 0 else 0.0

    # Nodes at the scales and edges of every component, so that narrow parts are not stepped over.
    parts = law.laws if isinstance(law, Mixture) else (law,)
    nodes = {float(np.ravel(p.mean)[0]) + k * float(np.ravel(p.std)[0]) for p in parts for k in _ENTROPY_NODES}
    points = sorted(nodes)
    total = integrate.quad(integrand, -np.inf, points[0], epsabs=1e-10, limit=200)[0]
    total += integrate.quad(integrand, points[-1], np.inf, epsabs=1e-10, limit=200)[0]
    for lo, hi in pairwise(points):
        total += integrate.quad(integrand, lo, hi, epsabs=1e-10, limit=200)[0]
    return float(total)


_ENTROPY_NODES = (-30.0, -8.0, -float(np.sqrt(3)), -0.3, 0.0, 0.3, float(np.sqrt(3)), 8.0, 30.0)


class Empirical(Law):
    """The empirical law of samples (any shape, flattened): every statistic is the sample's own, with no smoothing.

    For a calibration histogram use `Empirical.from_histogram`. Accuracy: rounding of prefix sums in float64, about
    1e-15 E X^2 absolute.
    """

    def __init__(self, samples: ArrayLike) -> None:
        x = _as_finite("samples", samples).ravel()
        if x.size == 0:
            raise ValueError("samples must not be empty")
        self.shape = ()
        self.samples = np.sort(x)
        # Central moments about the mean: raw power sums would cancel when the mean is large.
        self._mean = float(x.mean())
        d = x - self._mean
        self._moments = [float((d**k).mean()) for k in (2, 3, 4)]
        self._prefix = [np.concatenate([[0.0], np.cumsum(self.samples**k)]) for k in (0, 1, 2)]
        self._suffix = [np.concatenate([np.cumsum((self.samples**k)[::-1])[::-1], [0.0]]) for k in (0, 1, 2)]

    @staticmethod
    def from_histogram(histogram: ArrayLike) -> Law:
        """The law of a calibration log-histogram [..., 258, 2] (see `HistogramLaw`)."""
        from .histogram import HistogramLaw

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

    def entropy(self) -> Array:
        """Vasicek's spacing estimate with m = round(sqrt(n) / 2); -inf when a tie fills a spacing."""
        x, n = self.samples, self.samples.size
        m = max(1, round(np.sqrt(n) / 2))
        i = np.arange(n)
        gaps = x[np.minimum(i + m, n - 1)] - x[np.maximum(i - m, 0)]
        if np.any(gaps <= 0):
            return np.asarray(-np.inf)
        return np.asarray(np.log(n / (2 * m) * gaps).mean())

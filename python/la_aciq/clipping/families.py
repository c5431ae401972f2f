"""Families of symmetric laws with closed-form partial moments."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ..errors import LaAciqError
from .checks import LARGEST_LAW, LEAST_SCALE, Array, beyond_squares, finite_array, first, positive_array, scale_array
from .law import Law

_SQRT_HALF_PI = float(np.sqrt(np.pi / 2))


class Family(Law):
    """A symmetric location-scale family. Subclasses give the standard member's partial moments for z >= 0."""

    def __init__(self, sigma: ArrayLike, mean: ArrayLike, **parameters: Array) -> None:
        arrays = {"sigma": scale_array("sigma", sigma), "mean": finite_array("mean", mean), **parameters}
        if np.any(np.abs(arrays["mean"]) > LARGEST_LAW):
            raise ValueError(
                f"mean: expected a magnitude of at most {LARGEST_LAW:.1e}, got {np.abs(arrays['mean']).max()}"
            )
        try:
            self.shape = np.broadcast_shapes(*(array.shape for array in arrays.values()))
        except ValueError as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise ValueError(
                f"parameters of {type(self).__name__}: expected shapes that broadcast together, got {shapes}"
            ) from error
        self._parameters = {name: np.broadcast_to(array, self.shape) for name, array in arrays.items()}
        self._extreme = bool(np.any(beyond_squares(arrays["sigma"]) | beyond_squares(self._magnitude())))

    def _magnitude(self) -> Array:
        return np.hypot(self.sigma, self.mean)

    def _over(self, scale: Array) -> Law:
        sigma = self.sigma / scale
        if np.any(sigma < LEAST_SCALE):
            raise LaAciqError(
                f"law: expected a standard deviation of at least {LEAST_SCALE:.1e} of its mean and of the other laws, "
                f"got {first(sigma[sigma < LEAST_SCALE])}"
            )
        return type(self)(**{**self._parameters, "sigma": sigma, "mean": self.mean / scale})

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
    def std(self) -> Array:
        return self.sigma

    @property
    def rms(self) -> Array:
        return np.hypot(self.sigma, self.mean)

    @property
    def skewness(self) -> Array:
        return np.zeros(self.shape)

    @property
    def kurtosis(self) -> Array:
        return np.broadcast_to(np.asarray(self._excess_kurtosis(), dtype=np.float64), self.shape)

    def tail(self, a: ArrayLike, order: int) -> Array:
        if not np.any(self.mean):
            return 2 * self.above(a, order)
        return super().tail(a, order)

    def decay_start(self) -> Array:
        # x^2 P(X > x) falls where x f(x) / P(X > x) >= 2. For every family here z f(z) / P(Z > z) grows with z, and
        # so does its product with x / z, where z is the distance from a center on the other side of zero.
        offset = np.abs(self.mean)
        t = self.rms + offset
        for _ in range(200):
            near, far = (t - offset) / self._scale, (t + offset) / self._scale
            falling = np.full(self.shape, True)
            for z in (near, far):
                mass = self._partial(z, 0)
                share = np.where(z == far, t / (t + offset), 1.0)
                falling &= share * z * self._standard_density(z) >= 2 * mass
            if falling.all():
                return np.asarray(t)
            t = np.where(falling, t, 1.25 * t)
        return np.where(falling, t, np.inf)

    @property
    def _scale(self) -> Array:
        """The family's own scale parameter."""
        return self.sigma / np.sqrt(self._standard_variance())

    @classmethod
    def stack(cls, laws: Sequence[Family]) -> Family:
        """Single laws of this family as one array of laws: [len(laws)]."""
        names = laws[0]._parameters
        return cls(**{name: np.stack([law._parameters[name] for law in laws]) for name in names})

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
        # Reflection: below its center, a symmetric law's partial moment is the whole moment less the mirrored tail.
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


class Gaussian(Family):
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


class Laplace(Family):
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


class Logistic(Family):
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


class Uniform(Family):
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


class StudentT(Family):
    """Student t law with `nu` > 2 degrees of freedom, scaled to standard deviation `sigma`; kurtosis is inf for nu
    <= 4.
    """

    def __init__(self, nu: ArrayLike, sigma: ArrayLike = 1.0, mean: ArrayLike = 0.0) -> None:
        degrees = finite_array("nu", nu)
        if not np.all(degrees > 2):
            raise ValueError(
                f"nu: expected values above 2, where the variance is finite, got {first(degrees[~(degrees > 2)])}"
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


_LEAST_BETA = 0.05  # below it the fourth moment of the standard member leaves float64's digits


def _beta(beta: ArrayLike) -> Array:
    array = positive_array("beta", beta)
    if np.any(array < _LEAST_BETA):
        raise ValueError(f"beta: expected values of at least {_LEAST_BETA}, got {first(array[array < _LEAST_BETA])}")
    return array


class GeneralizedGaussian(Family):
    """Density proportional to exp(-abs(x / s)^beta), scaled to standard deviation `sigma`; beta 1 is Laplace, 2
    Gaussian.
    """

    def __init__(self, beta: ArrayLike, sigma: ArrayLike = 1.0, mean: ArrayLike = 0.0) -> None:
        super().__init__(sigma, mean, beta=_beta(beta))

    @property
    def beta(self) -> Array:
        """Shape: the exponent of abs(x)."""
        return self._parameters["beta"]

    def _partial(self, z: Array, order: int) -> Array:
        moments = [0.5 * self._moment_ratio(k) * self._upper_share(z, k) for k in range(order + 1)]
        if order == 0:
            return np.asarray(moments[0])
        if order == 1:
            return np.asarray(np.maximum(moments[1] - z * moments[0], 0))
        return np.asarray(np.maximum(moments[2] - 2 * z * moments[1] + z**2 * moments[0], 0))

    def _upper_share(self, z: Array, k: int) -> Array:
        """E[abs(Z)^k ; abs(Z) > z] / E abs(Z)^k: the regularized upper incomplete gamma function of z^beta."""
        order = (k + 1) / self.beta
        with np.errstate(over="ignore", under="ignore"):
            y = z**self.beta
            # Its series at 0, which needs z alone where z^beta is too small for a float64.
            small = 1 - z ** (k + 1) / special.gamma(1 + order)
        return np.asarray(np.where(y < 1e-20, small, special.gammaincc(order, y)))

    def _moment_ratio(self, k: int) -> Array:
        """E abs(Z)^k of the standard member."""
        order, one = (k + 1) / self.beta, 1 / self.beta
        return np.asarray(np.exp(special.gammaln(1 + order) - special.gammaln(1 + one)) / (k + 1))

    def _standard_density(self, z: Array) -> Array:
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(0.5 * np.exp(-(z**self.beta) - special.gammaln(1 + 1 / self.beta)))

    def _standard_variance(self) -> Array:
        return self._moment_ratio(2)

    def _standard_entropy(self) -> Array:
        return np.asarray(1 / self.beta + np.log(2.0) + special.gammaln(1 + 1 / self.beta))

    def _excess_kurtosis(self) -> Array:
        return np.asarray(self._moment_ratio(4) / self._moment_ratio(2) ** 2 - 3)

"""The laws in the tables of the theory page, and quantities of laws that only the page needs."""

from typing import Any

import numpy as np
from scipy import optimize

from la_aciq.clipping import (
    Gaussian,
    GeneralizedGaussian,
    Laplace,
    Law,
    Logistic,
    Mixture,
    StudentT,
    Uniform,
    mse,
    optimal,
)

RULE_LAWS: list[tuple[str, Law]] = [
    ("Gaussian", Gaussian()),
    ("t, nu = 10", StudentT(10)),
    ("t, nu = 6", StudentT(6)),
    ("Laplace", Laplace()),
    ("t, nu = 5", StudentT(5)),
    ("GG, beta = 0.5", GeneralizedGaussian(0.5)),
    ("GG, beta = 4", GeneralizedGaussian(4)),
    ("uniform", Uniform()),
]
LIMIT_LAWS: list[tuple[str, Law]] = [
    ("uniform", Uniform()),
    ("Gaussian", Gaussian()),
    ("logistic", Logistic()),
    ("Laplace", Laplace()),
    ("t, nu = 5", StudentT(5)),
    ("GG, beta = 0.5", GeneralizedGaussian(0.5)),
]


def model(law: Law, clips: Any, bits: int = 4) -> Any:
    """The error of the convex model at these clips."""
    return mse(law, clips, bits, "midrise", "aciq")


def symmetric(law: Law, levels_each_side: int = 7) -> tuple[float, float]:
    """Best clip and error of the odd symmetric codebook (q Delta, |q| <= 7, Delta = a / 7), which the package lacks."""
    j = np.arange(1, levels_each_side + 1) - 0.5

    def error(a: float) -> float:
        step = a / levels_each_side
        return float(law.power - 2 * step * law.tail(j * step, 1).sum())

    best = optimize.minimize_scalar(error, bounds=(0.5, 10), method="bounded", options={"xatol": 1e-10})
    return float(best.x), float(best.fun)


def scale_mixture(p: float) -> Mixture:
    """Gaussian scale mixture of variance 1 and excess kurtosis 3, with probability p of the larger variance."""
    small, large = 1 - np.sqrt(p / (1 - p)), 1 + np.sqrt((1 - p) / p)
    return Mixture([Gaussian(np.sqrt(small)), Gaussian(np.sqrt(large))], [1 - p, p])


def sample_kurtosis(x: Any) -> float:
    """Excess kurtosis of a sample, by its own moments."""
    d = x - x.mean()
    return float((d**4).mean() / (d**2).mean() ** 2 - 3)


def light_slope(kappa: float) -> float:
    """Difference quotient of the generalized Gaussian's best error from the uniform law to excess kurtosis `kappa`."""
    beta = float(
        np.exp(optimize.brentq(lambda b: float(GeneralizedGaussian(np.exp(b)).kurtosis) - kappa, 0, 12, xtol=1e-14))
    )
    return float((float(optimal(GeneralizedGaussian(beta)).mse) - 4.0**-4) / (kappa + 1.2))


def local_minima(law: Law, bits: int = 4) -> int:
    """Local minima of the exact error on a fine grid."""
    m = mse(law, np.linspace(0.5, 8, 200_001), bits)
    return int(((m[1:-1] < m[:-2]) & (m[1:-1] < m[2:])).sum())


def ratio_floor(bits: int, codebook: str) -> float:
    """The least worst-case excess error of any function of E|X| / sigma.

    The worst case is over generalized Gaussians of exponent >= 1/2 and Student t laws.
    """
    worst = 0.0
    for ratio in np.linspace(0.55, 0.79, 13):

        def beta(b: float, ratio: float = ratio) -> float:
            return float(GeneralizedGaussian(np.exp(b)).mean_abs) - ratio

        def nu(b: float, ratio: float = ratio) -> float:
            return float(StudentT(2 + np.exp(b)).mean_abs) - ratio

        laws = [
            GeneralizedGaussian(np.exp(optimize.brentq(beta, np.log(0.3), np.log(2.0)))),
            StudentT(2 + np.exp(optimize.brentq(nu, np.log(1e-3), np.log(1e6)))),
        ]
        best = [optimal(law, bits, codebook) for law in laws]

        def excess(a: float, laws: list[Law] = laws, best: list[Any] = best) -> float:
            return max(float(mse(law, a, bits, codebook) / b.mse - 1) for law, b in zip(laws, best, strict=True))

        ends = sorted(float(b.alpha) for b in best)
        minimax = optimize.minimize_scalar(excess, bounds=tuple(ends), method="bounded", options={"xatol": 1e-7})
        worst = max(worst, float(minimax.fun))
    return worst

"""Clips that others have printed, and functions that reproduce them under their own conventions."""

from __future__ import annotations

import numpy as np
from scipy import optimize

from .checks import Array, count
from .families import Gaussian
from .law import Law, check_law

# Banner et al. 2019 (the tables in the authors' code), bits 1 to 8: in units of sigma, and of b = E|X|. Their digits
# are cut off, not rounded (2.559 is printed as 2.55), with two exceptions: 1.2399 as 1.24 and 5.0286 as 5.03.
BANNER_GAUSS = (1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92)
BANNER_LAPLACE = (1.86, 2.83, 3.89, 5.03, 6.20, 7.41, 8.64, 9.89)
# Max 1960, uniform quantizer of a unit Gaussian: levels -> step. His table ends at 36 levels.
MAX_STEPS = {2: 1.596, 4: 0.9957, 8: 0.5860, 16: 0.3352, 32: 0.1881}


def banner_clip(law: Law, bits: int) -> Array:
    """The convex model's optimum with K = 4^bits (a step of 2 alpha / 2^bits), bits >= 1, for an array of laws.

    For a Laplace law it is b W(3 4^bits) in closed form, W the Lambert function.
    """
    law, bits = check_law(law), count("bits", bits, 1)
    c = 4.0**-bits / 3
    flat = law.take(np.arange(law.size))

    def root(i: int) -> float:
        one = flat.take(np.asarray([i])) if flat.shape else flat
        top = float(np.ravel(one.mean_abs)[0]) / c
        return float(
            optimize.brentq(lambda a: float(np.ravel(one.tail(a, 1))[0]) - c * a, 0, top, xtol=1e-300, rtol=1e-14)
        )

    return np.array([root(i) for i in range(law.size)]).reshape(law.shape)


def uniform_gaussian_quantizer(levels: int) -> tuple[float, float]:
    """Step and error of the best uniform quantizer of a unit Gaussian with an even number of levels, ends included
    (Max 1960).
    """
    levels = count("levels", levels, 2)
    if levels % 2:
        raise ValueError(f"levels: expected an even number of at least 2, got {levels}")
    law = Gaussian()
    j = np.arange(1, levels // 2)

    def error(step: float) -> float:
        tails = float(law.tail(j * step, 1).sum())
        return float(1 - step * law.mean_abs + step**2 / 4 - 2 * step * tails)

    def slope(step: float) -> float:
        t = j * step
        return float(-law.mean_abs + step / 2 - 2 * law.tail(t, 1).sum() + 2 * step * (j * law.tail(t, 0)).sum())

    # One minimum between these: the step is 1.6 for two levels and falls more slowly than 1 / levels.
    step = float(optimize.brentq(slope, 2.5 / levels, 12 / levels**0.7, xtol=1e-14))
    return step, error(step)

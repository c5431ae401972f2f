"""Profiles of made-up data, with histograms and moments by plain NumPy."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from la_aciq import Moments
from la_aciq.profile.profile import Profile, SiteStats

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


def log_histogram(x: NDArray[np.float64]) -> NDArray[np.int64]:
    """int64 [258, 2] of |x| as float32: by comparing with the edges, and the low 20 bits of the mantissa."""
    magnitude = np.abs(x).astype(np.float32)
    edges = np.concatenate([[0.0], *[2.0**e * (1 + np.arange(8) / 8) for e in range(-16, 16)], [2.0**16]])
    bin_of = np.searchsorted(edges, magnitude, side="right") - 1
    histogram = np.zeros((258, 2), np.int64)
    np.add.at(histogram[:, 0], bin_of, 1)
    np.add.at(histogram[:, 1], bin_of, magnitude.view(np.int32) & ((1 << 20) - 1))
    return histogram


def moments_state(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [8]: count, mean, M2, M3, M4, min, max, nonfinite."""
    if not x.size:
        return np.array([0, 0, 0, 0, 0, np.inf, -np.inf, 0.0])
    d = x - x.mean()
    return np.array([x.size, x.mean(), (d**2).sum(), (d**3).sum(), (d**4).sum(), x.min(), x.max(), 0.0])


def synthetic_profile(
    languages: Mapping[str, Mapping[str, Draw]], sink: Draw, values: int, groups: int = 2, seed: int = 0
) -> Profile:
    """A profile with, per language, site and group, `values` draws; sites whose name ends in .output are keys."""
    rng = np.random.default_rng(seed)
    names = list(next(iter(languages.values())))
    rows = ("und", *languages, "sink")
    sites = {}
    for name in names:
        data = [[law[name](rng, values) for _ in range(groups)] for law in languages.values()]
        pooled = [np.concatenate(parts) for parts in zip(*data, strict=True)]
        table = [pooled, *data, [sink(rng, values) for _ in range(groups)]]
        moments = Moments.from_state(
            np.stack([[moments_state(x) for x in row] for row in table]),
            np.stack([[log_histogram(x) for x in row] for row in table]),
        )
        key = name.endswith(".output")
        sites[name] = SiteStats("key" if key else "input", name.split(".")[1], 8 * groups, 8, moments)
    layers = {name if name.endswith(".output") else name.removesuffix(".in"): name for name in names}
    return Profile(rows, sites, layers)


def normal(sigma: float) -> Draw:
    return lambda rng, n: rng.normal(0, sigma, n)


def student(nu: float, sigma: float) -> Draw:
    return lambda rng, n: rng.standard_t(nu, n) * sigma / np.sqrt(nu / (nu - 2))

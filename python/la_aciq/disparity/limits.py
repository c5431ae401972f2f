"""How small the error can be at all: rate-distortion limits and the best scalar quantizer, for any law.

All functions take a law and give errors in units of X squared. For squared error and B bits per value:

- `gaussian_distortion`  D(B) = sigma^2 4^-B: the rate-distortion function of a Gaussian, and an upper bound for every
  law of that variance;
- `shannon_lower_bound`  e^(2 h) / (2 pi e) 4^-B <= D(B), with h the differential entropy (Cover & Thomas, ch. 10);
- `lloyd_max`            the best quantizer with 2^B values placed freely (Lloyd 1982, Max 1960);
- `panter_dite`          (integral of f^(1/3))^3 / 12 4^-B, what Lloyd-Max tends to for many levels (Panter & Dite
  1951).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import integrate, linalg

from ..clipping.checks import Array, check_bits
from ..clipping.histogram import HistogramLaw
from ..clipping.law import Law, check_law, check_single
from ..clipping.optimal import optimal
from ..errors import LaAciqError


def gaussian_distortion(law: Law, bits: int) -> Array:
    """The rate-distortion function of a Gaussian, variance x 4^-bits (Shannon 1948).

    Each bit quarters the distortion. No law of this variance is harder to code.

    Args:
        law: the law, or laws, of X.
        bits: bits per value, 2 to 8.

    Returns:
        float64 of `law.shape`, in units of X squared.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bits is not from 2 to 8.
    """
    return np.asarray(check_law(law).variance * 4.0 ** -check_bits(bits))


def shannon_lower_bound(law: Law, bits: int) -> Array:
    """Shannon's lower bound, e^(2 h) / (2 pi e) 4^-bits with h the entropy (Cover and Thomas, chapter 10).

    No code of `bits` bits per value has a smaller error. For a Gaussian the bound is the rate-distortion function.

    Args:
        law: the law, or laws, of X.
        bits: bits per value, 2 to 8.

    Returns:
        float64 of `law.shape`, in units of X squared; 0 for point masses.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bits is not from 2 to 8.
    """
    return np.asarray(entropy_power(law) * 4.0 ** -check_bits(bits))


def entropy_power(law: Law) -> Array:
    """e^(2 h) / (2 pi e): the variance of the Gaussian of equal entropy h, at most the law's variance.

    Args:
        law: the law, or laws, of X.

    Returns:
        float64 of `law.shape`, in units of X squared; 0 for point masses.

    Raises:
        TypeError: `law` is no law.
    """
    return np.asarray(np.exp(2 * check_law(law).entropy()) / (2 * np.pi * np.e))


def panter_dite(law: Law, bits: int) -> float:
    """High-resolution error of the best quantizer, (integral of f^(1/3))^3 / 12 4^-bits (Panter and Dite 1951).

    By quadrature, with a relative accuracy of 1e-8.

    Args:
        law: a single law with a density f.
        bits: bits per value, 2 to 8.

    Returns:
        The error in units of X squared; infinite if the integral is.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the law is not single, or bits is not from 2 to 8.
    """
    law = check_single(law)
    levels = 2.0 ** check_bits(bits)
    return float(_cube_root_mass(law) ** 3 / 12 / levels**2)


def panter_dite_constant(law: Law) -> float:
    """The error of `panter_dite` over `gaussian_distortion`: (integral of f^(1/3))^3 / (12 variance).

    2.72 for a Gaussian, 4.5 for a Laplace law, 1 for a uniform one.

    Args:
        law: a single law with a density f.

    Returns:
        The constant, without a unit.

    Raises:
        TypeError: `law` is no law.
        ValueError: the law is not single.
    """
    law = check_single(law)
    return _cube_root_mass(law) ** 3 / 12 / float(law.variance)


def _cube_root_mass(law: Law) -> float:
    if isinstance(law, HistogramLaw):
        # Constant inside bins.
        edges, p = law.edges, law.bin_probabilities.ravel()
        inside = p[:-1] > 0
        width = np.diff(edges)[:-1]
        densities = p[:-1][inside] / (2 * width[inside])
        return 2 * float(np.sum(np.cbrt(densities) * width[inside]))

    def integrand(x: float) -> float:
        return float(np.cbrt(np.ravel(law.density(x))[0]))

    total = 0.0
    for lo, hi in pairwise([-np.inf, *_nodes(law), np.inf]):
        total += _integrate(integrand, lo, hi)
    return total


def _integrate(function: Any, lo: float, hi: float) -> float:
    return float(integrate.quad(function, lo, hi, epsabs=0, epsrel=1e-10, limit=500)[0])


def _nodes(law: Law) -> list[float]:
    """Where the density may bend: scales around the center of the law and of its parts."""
    parts = getattr(law, "laws", (law,))
    marks = (0.0, 0.1, 0.5, 1.0, float(np.sqrt(3)), 4.0, 12.0, 50.0)
    points = {
        float(np.ravel(part.mean)[0]) + sign * mark * float(np.ravel(part.std)[0])
        for part in parts
        for mark in marks
        for sign in (-1, 1)
    }
    return sorted(points)


@dataclass(frozen=True)
class LloydMax:
    """A quantizer with free values: `values` [2^bits] ascending, and its `mse`. `residual`: largest |value -
    centroid| / std.
    """

    values: Array
    mse: float
    residual: float


def lloyd_max(law: Law, bits: int = 4) -> LloydMax:
    """The best quantizer of a single law with a density: values free, each the centroid of its nearest-value cell.

    Newton's method on the centroid conditions (a tridiagonal system) from two starts: the companded quantizer of Panter
    and Dite, and the best partition whose cuts lie on a grid, by dynamic programming (Bruce 1965), which finds the
    right one of several stationary points. The better result is returned; the global optimum lies at most what the grid
    costs below it. For log-concave densities there is one stationary point (Fleischer 1964).

    Args:
        law: a single law with a density.
        bits: bits per value, 2 to 8.

    Returns:
        The quantizer, its values and error in units of X and X squared.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the law is not single, or bits is not from 2 to 8.
        LaAciqError: no start leads to values that are centroids to 1e-6 of the standard deviation: the tails are too
            heavy for float64.
    """
    bits = check_bits(bits)
    law = check_single(law)
    quantizers = [_stationary(law, start) for start in (_companded(law, 2**bits), _best_on_grid(law, 2**bits))]
    usable = [quantizer for quantizer in quantizers if quantizer.residual <= 1e-6 and np.isfinite(quantizer.mse)]
    if not usable:
        raise LaAciqError(
            f"law: expected values that are centroids of their cells in float64, got a residual of "
            f"{min(quantizer.residual for quantizer in quantizers):.2g} standard deviations at {bits} bits"
        )
    return min(usable, key=lambda quantizer: quantizer.mse)


def _stationary(law: Law, values: Array) -> LloydMax:
    """The stationary quantizer that Newton's method reaches from these values."""
    for _ in range(200):
        cell = _Cells(law, values)
        move = cell.centroids - values
        if float(np.max(np.abs(move)) / law.std) < 1e-12:
            break
        step = cell.newton_step()
        for _ in range(30):
            trial = values + step
            # Near the optimum the error changes less than it is rounded, which differs between CPUs.
            if np.all(np.diff(trial) > 0) and _Cells(law, trial).mse <= cell.mse * (1 + 1e-13):
                break
            step = step / 2
        else:
            trial = cell.centroids  # Lloyd's own step never makes the error larger.
        if np.array_equal(trial, values):
            break
        values = trial
    cell = _Cells(law, values)
    return LloydMax(values, cell.mse, float(np.max(np.abs(cell.centroids - values)) / law.std))


def _best_on_grid(law: Law, levels: int) -> Array:
    """Centroids of the best partition into `levels` cells with cuts on a grid: O(levels grid^2)."""
    grid = _companded(law, max(400, 2 * levels))
    std = float(law.std)
    mass_above = np.concatenate([[1.0], np.ravel(law.above(grid, 0)), [0.0]])
    first_above = (
        np.concatenate([[float(law.mean)], np.ravel(law.above(grid, 1)) + grid * mass_above[1:-1], [0.0]]) / std
    )
    # Cells from cut i to cut j lose their power less mass times centroid squared; the power is the same for all.
    mass, first = mass_above[:, None] - mass_above, first_above[:, None] - first_above
    kept = np.where(mass > 1e-16, first**2 / np.where(mass > 1e-16, mass, 1), 0.0)
    kept[np.tril_indices(len(kept))] = -np.inf
    best, origin = kept[0].copy(), []
    for _ in range(levels - 1):
        total = best[:, None] + kept
        origin.append(total.argmax(0))
        best = total.max(0)
    cuts = [len(kept) - 1]
    for source in reversed(origin):
        cuts.append(int(source[cuts[-1]]))
    cuts = [0, *reversed(cuts)]
    pairs = list(pairwise(cuts))
    return np.array([first[i, j] / mass[i, j] * std if mass[i, j] > 1e-16 else np.nan for i, j in pairs])


class _Cells:
    """The cells of nearest values: their mass and centroid, by differences of the law's partial moments."""

    def __init__(self, law: Law, values: Array) -> None:
        self.law, self.values = law, values
        self.cuts = (values[1:] + values[:-1]) / 2
        mass_above = np.ravel(law.above(self.cuts, 0))
        first_above = np.ravel(law.above(self.cuts, 1)) + self.cuts * mass_above
        mean = float(np.ravel(law.mean)[0])
        self.mass = -np.diff(np.concatenate([[1.0], mass_above, [0.0]]))
        self.first = -np.diff(np.concatenate([[mean], first_above, [0.0]]))

    @property
    def centroids(self) -> Array:
        return np.where(self.mass > 1e-300, self.first / np.where(self.mass > 1e-300, self.mass, 1), self.values)

    @property
    def mse(self) -> float:
        y = self.values
        return float(np.ravel(self.law.power)[0] - 2 * y @ self.first + y**2 @ self.mass)

    def newton_step(self) -> Array:
        """Solution of J step = -F with F_i = integral over cell i of (y_i - x) f(x) dx."""
        y, f = self.values, np.ravel(self.law.density(self.cuts))
        to_upper, to_lower = (y[:-1] - self.cuts) * f / 2, (y[1:] - self.cuts) * f / 2
        bands = np.zeros((3, len(y)))
        bands[1] = self.mass
        bands[1, :-1] += to_upper
        bands[1, 1:] -= to_lower
        bands[0, 1:] = to_upper
        bands[2, :-1] = -to_lower
        with np.errstate(all="ignore"):
            try:
                step = linalg.solve_banded((1, 1), bands, self.first - y * self.mass)
            except (linalg.LinAlgError, ValueError):
                return self.centroids - y
        return np.asarray(step) if np.all(np.isfinite(step)) else self.centroids - y


def _companded(law: Law, levels: int) -> Array:
    """Quantiles of the density proportional to f^(1/3), on a grid out to where the tail mass is below 1e-9."""
    mean, std = float(np.ravel(law.mean)[0]), float(np.ravel(law.std)[0])
    reach = std
    while float(np.ravel(law.tail(abs(mean) + reach, 0))[0]) > 1e-9 and reach < 1e6 * std:
        reach *= 1.3
    x = np.unique(np.concatenate([mean + s * std * np.geomspace(1e-3, reach / std, 4000) for s in (-1, 1)] + [[mean]]))
    weight = np.cbrt(np.ravel(law.density(x)))
    total = np.concatenate([[0.0], np.cumsum((weight[1:] + weight[:-1]) / 2 * np.diff(x))])
    return np.asarray(np.interp((np.arange(levels) + 0.5) / levels * total[-1], total, x))


@dataclass(frozen=True)
class Limits:
    """Errors of one law at one number of bits, all divided by its power E X^2, from the least to the largest
    reachable.
    """

    shannon: float
    gaussian: float
    lloyd_max: float
    panter_dite: float
    quantizer: float

    def decibels(self) -> dict[str, float]:
        """How far the clipped uniform quantizer is above each of the others, in dB (inf where that one is 0)."""
        names = ("shannon", "gaussian", "lloyd_max", "panter_dite")
        with np.errstate(divide="ignore"):
            return {name: float(10 * np.log10(np.divide(self.quantizer, getattr(self, name)))) for name in names}


def limits(law: Law, bits: int = 4, codebook: str = "midrise") -> Limits:
    """The clipped uniform quantizer at its best clip beside the limits.

    Args:
        law: a single law with a density.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`, of the uniform quantizer.

    Returns:
        The errors, each divided by E X^2.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the law is not single, or an argument is not among its choices.
        LaAciqError: the law is too extreme for `lloyd_max` or `optimal`.
    """
    law, bits = check_single(law), check_bits(bits)
    power = float(np.ravel(law.power)[0])
    return Limits(
        shannon=float(np.ravel(shannon_lower_bound(law, bits))[0]) / power,
        gaussian=float(np.ravel(gaussian_distortion(law, bits))[0]) / power,
        lloyd_max=lloyd_max(law, bits).mse / power,
        panter_dite=panter_dite(law, bits) / power,
        quantizer=float(np.ravel(optimal(law, bits, codebook).normalized_mse)[0]),
    )


def language_limits(profile: Any, bits: int = 4, codebook: str = "midrise") -> dict[str, Limits]:
    """`limits` of every language, averaged over the layer inputs of a profile: D_lambda(bits) beside what could be
    reached.

    Each layer input counts once, as the law of all its values of that language (its histogram summed over groups).

    Args:
        profile: a `la_aciq.Profile`.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.

    Returns:
        By language the averages of the errors, each divided by E X^2.

    Raises:
        TypeError: bits is not an integer, or the codebook not a string.
        ValueError: an argument is not among its choices, or the profile has no layer input or no values of a language.
        LaAciqError: a law is too extreme for `lloyd_max` or `optimal`.
    """
    names = [name for name, site in profile.sites.items() if site.kind == "input"]
    if not names:
        raise ValueError("profile: expected at least one site of kind 'input', got none")
    result = {}
    for language in profile.languages:
        row = tuple(profile.entries).index(language)
        each = []
        for name in names:
            histogram = np.asarray(profile.sites[name].moments.histogram)[row].sum(0)
            if histogram[..., 0].sum() > 0:
                each.append(limits(HistogramLaw(histogram), bits, codebook))
        if not each:
            raise ValueError(f"profile: expected values of every language, got none of {language!r}")
        means = {name: float(np.mean([getattr(x, name) for x in each])) for name in Limits.__dataclass_fields__}
        result[language] = Limits(**means)
    return result

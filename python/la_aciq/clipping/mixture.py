"""Mixtures of laws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import integrate

from .checks import Array, finite_array, first
from .families import Family
from .law import Law, list_of_laws, unit_law


class Mixture(Law):
    """X drawn from `laws[i]` with probability `weights[i]` (a mixture of laws, not a sum of variables).

    `weights` is [n], or [..., n] for an array of mixtures; the component laws' shapes broadcast with its leading axes.
    """

    def __init__(self, laws: Sequence[Law], weights: ArrayLike) -> None:
        laws = list_of_laws(laws)
        if not laws:
            raise ValueError("laws: expected at least one law, got none")
        w = finite_array("weights", weights)
        if w.ndim == 0 or w.shape[-1] != len(laws):
            raise ValueError(
                f"weights: expected one weight per law ({len(laws)}) on the last axis, got shape {w.shape}"
            )
        if np.any(w < 0):
            raise ValueError(f"weights: expected values of at least 0, got {first(w[w < 0])}")
        total = w.sum(-1)
        if not np.allclose(total, 1, rtol=0, atol=1e-9):
            raise ValueError(
                f"weights: expected a sum of one, got {first(total[~np.isclose(total, 1, rtol=0, atol=1e-9)])}"
            )
        self.laws = tuple(laws)
        self.weights = w
        self.shape = np.broadcast_shapes(w.shape[:-1], *(law.shape for law in laws))
        self._extreme = any(law._extreme for law in self.laws)
        # Components of one family are evaluated together, as one array of laws.
        self._families = _by_family(self.laws, w) if self.shape == () else []

    def __repr__(self) -> str:
        return f"Mixture({list(self.laws)!r}, weights={self.weights.tolist()})"

    def _magnitude(self) -> Array:
        each = [
            np.where(self.weights[..., i] > 0, np.broadcast_to(law._magnitude(), self.shape), 0.0)
            for i, law in enumerate(self.laws)
        ]
        return np.asarray(np.max(each, axis=0))

    def _over(self, scale: Array) -> Law:
        return Mixture([law._over(scale) for law in self.laws], self.weights)

    def _blend(self, values: Sequence[ArrayLike]) -> Array:
        total: Any = 0.0
        for i, value in enumerate(values):
            weight = self.weights[..., i]
            # A component of weight zero contributes nothing, even when its own moment is infinite.
            total = total + np.where(weight > 0, weight * np.where(weight > 0, value, 0.0), 0.0)
        return np.asarray(total)

    def _moment(self, name: str, t: ArrayLike, *order: int) -> Array:
        """A partial moment, which the method `name` of every component gives."""
        if not self._families:
            return self._blend([getattr(law, name)(t, *order) for law in self.laws])
        each = np.asarray(t, dtype=np.float64)[..., None]
        total: Any = 0.0
        for law, weights in self._families:
            total = total + (getattr(law, name)(each, *order) * weights).sum(-1)
        return np.asarray(total)

    def above(self, t: ArrayLike, order: int) -> Array:
        return self._moment("above", t, order)

    def below(self, t: ArrayLike, order: int) -> Array:
        return self._moment("below", t, order)

    def tail(self, a: ArrayLike, order: int) -> Array:
        return self._moment("tail", a, order)

    def density(self, x: ArrayLike) -> Array:
        return self._moment("density", x)

    def decay_start(self) -> Array:
        return np.broadcast_to(
            np.max(
                [
                    np.where(self.weights[..., i] > 0, np.broadcast_to(law.decay_start(), self.shape), 0.0)
                    for i, law in enumerate(self.laws)
                ],
                axis=0,
            ),
            self.shape,
        )

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

    @cached_property
    def mean(self) -> Array:
        return np.broadcast_to(self._blend([law.mean for law in self.laws]), self.shape)

    @cached_property
    def variance(self) -> Array:
        d = [law.mean - self.mean for law in self.laws]
        return self._blend([law.variance + e**2 for law, e in zip(self.laws, d, strict=True)])

    @cached_property
    def third_moment(self) -> Array:
        d = [law.mean - self.mean for law in self.laws]
        return self._blend(
            [law.third_moment + 3 * e * law.variance + e**3 for law, e in zip(self.laws, d, strict=True)]
        )

    @cached_property
    def fourth_moment(self) -> Array:
        d = [law.mean - self.mean for law in self.laws]
        return self._blend(
            [
                law.fourth_moment + 4 * e * law.third_moment + 6 * e**2 * law.variance + e**4
                for law, e in zip(self.laws, d, strict=True)
            ]
        )

    @property
    def skewness(self) -> Array:
        return self._standardized_moments()[0]

    @property
    def kurtosis(self) -> Array:
        return self._standardized_moments()[1]

    def _standardized_moments(self) -> tuple[Array, Array]:
        """Skewness and excess kurtosis, from components in units of the mixture's standard deviation: powers of the
        values themselves may leave the range of float64.
        """
        if self._extreme:
            unit, _ = unit_law(self)
            return unit.skewness, unit.kurtosis
        std = np.where(self.std > 0, self.std, np.nan)
        third, fourth = [], []
        for law in self.laws:
            s, d = law.std / std, (law.mean - self.mean) / std
            with np.errstate(invalid="ignore"):
                third_of_part = np.where(s > 0, law.skewness * s**3, 0.0)
                fourth_of_part = np.where(s > 0, (law.kurtosis + 3) * s**4, 0.0)
            third.append(third_of_part + 3 * d * s**2 + d**3)
            fourth.append(fourth_of_part + 4 * d * third_of_part + 6 * d**2 * s**2 + d**4)
        blended = self._blend(third), self._blend(fourth) - 3
        return np.where(np.isnan(std), np.nan, blended[0]), np.where(np.isnan(std), np.nan, blended[1])

    def entropy(self) -> Array:
        """By adaptive quadrature of -f ln f (absolute accuracy 1e-8), one law at a time."""
        result = np.empty(self.size)
        for i in range(self.size):
            law = self.take(np.asarray([i])) if self.shape else self
            result[i] = _entropy_by_quadrature(law)
        return result.reshape(self.shape)


def _by_family(laws: Sequence[Law], weights: Array) -> list[tuple[Law, Array]]:
    """Components of positive weight as arrays of laws [m] with their weights [m], one pair per family."""
    members: dict[type, list[int]] = {}
    for i, law in enumerate(laws):
        if weights[i] > 0:
            members.setdefault(type(law) if isinstance(law, Family) else Law, []).append(i)
    arrays: list[tuple[Law, Array]] = []
    for family, index in members.items():
        if issubclass(family, Family):
            arrays.append((family.stack([law for i in index if isinstance(law := laws[i], Family)]), weights[index]))
        else:
            # A law of another kind stands alone; its trailing axis of length one is the array's.
            arrays.extend((laws[i], weights[[i]]) for i in index)
    return arrays


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

"""The effective law of a language: the mixture of its layers' laws, weighted by a_l(lambda).

Central moments of a mixture with weights w_i, means m_i, variances s_i^2 and third and fourth central moments, with
d_i = m_i - m:

    mu_2 = sum w_i (s_i^2 + d_i^2)
    mu_3 = sum w_i (mu3_i + 3 d_i s_i^2 + d_i^3)
    mu_4 = sum w_i (mu4_i + 4 d_i mu3_i + 6 d_i^2 s_i^2 + d_i^4)

The kurtosis mu_4 / mu_2^2 - 3 is not the weighted mean of the layers' kurtoses, and skewed layers enter through 4 d_i
mu3_i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..clipping.checks import Array
from ..clipping.language_objectives import normalized_weights
from ..clipping.law import Law
from ..ops.streaming import COUNT, M2, M3, M4, MEAN


class EffectiveLaw:
    """Moments of a mixture whose weights may change one at a time, each change costing O(1).

    `moments` is [n, 4]: mean, variance, third and fourth central moment of each component; `weights` [n] need not sum
    to one. Sums of moments about a fixed reference point are kept, so a change of one weight adds one term to five
    sums.
    """

    def __init__(self, moments: ArrayLike, weights: ArrayLike, names: Sequence[str] | None = None) -> None:
        components = np.asarray(moments, dtype=np.float64)
        if components.ndim != 2 or components.shape[1] != 4 or not len(components):
            raise ValueError(f"moments must have shape [n, 4] with n >= 1, got {list(components.shape)}")
        if not np.all(np.isfinite(components)):
            raise ValueError("moments must be finite")
        if np.any(components[:, 1] < 0):
            raise ValueError(f"variances must not be negative, got {components[:, 1].min()}")
        self._weights = normalized_weights("weights", weights).copy()
        if self._weights.shape != (len(components),):
            raise ValueError(f"weights must have shape [{len(components)}], got {list(self._weights.shape)}")
        self.names = tuple(names) if names is not None else tuple(str(i) for i in range(len(components)))
        # About the mean of the first weights: raw moments about zero would cancel when means are large.
        self._reference = float(self._weights @ components[:, 0])
        self._about = _about(components, components[:, 0] - self._reference)
        self._sums = self._weights @ self._about

    @classmethod
    def from_laws(cls, laws: Sequence[Law], weights: ArrayLike) -> EffectiveLaw:
        """The effective law of single laws (each of shape ())."""
        rows = [[float(x) for x in (law.mean, law.variance, law.third_moment, law.fourth_moment)] for law in laws]
        return cls(rows, weights)

    @property
    def weights(self) -> Array:
        """Current weights, summing to one: [n]."""
        return np.asarray(self._weights / self._weights.sum())

    def update(self, component: int, weight: float) -> None:
        """Give one component a new weight, relative to the others' current ones, in constant time."""
        if not np.isfinite(weight) or weight < 0:
            raise ValueError(f"weight must be finite and not negative, got {weight}")
        if self._weights.sum() - self._weights[component] + weight <= 0:
            raise ValueError("weight must leave at least one component of positive weight, got 0")
        self._sums = self._sums + (weight - self._weights[component]) * self._about[component]
        self._weights[component] = weight

    def _central(self, order: int) -> float:
        raw = self._sums / self._sums[0]
        d = raw[1]
        return float(sum(comb(order, k) * raw[k] * (-d) ** (order - k) for k in range(order + 1)))

    @property
    def mean(self) -> float:
        """E X."""
        return float(self._reference + self._sums[1] / self._sums[0])

    @property
    def variance(self) -> float:
        """mu_2."""
        return max(self._central(2), 0.0)

    @property
    def std(self) -> float:
        """Square root of mu_2."""
        return float(np.sqrt(self.variance))

    @property
    def skewness(self) -> float:
        """mu_3 / mu_2^1.5; NaN for a constant."""
        return self._central(3) / self.variance**1.5 if self.variance > 0 else float("nan")

    @property
    def kurtosis(self) -> float:
        """kappa_eff = mu_4 / mu_2^2 - 3; NaN for a constant."""
        return self._central(4) / self.variance**2 - 3 if self.variance > 0 else float("nan")


def _about(components: Array, d: Array) -> Array:
    """Moments of order 0 to 4 about a reference at distance d below each mean: [n, 5]."""
    _, variance, third, fourth = components.T
    return np.stack(
        [
            np.ones_like(d),
            d,
            variance + d**2,
            third + 3 * d * variance + d**3,
            fourth + 4 * d * third + 6 * d**2 * variance + d**4,
        ],
        axis=-1,
    )


def effective(profile: Any, weights: Mapping[str, float] | None = None) -> dict[str, EffectiveLaw]:
    """The effective law of every language of a profile, over its layer inputs.

    `weights` gives a_l(lambda) by site name (all languages alike); by default a site weighs as many values as it has
    seen of the language, so that the effective law is that of one value drawn from everything the language put through
    the model.
    """
    sites = [name for name, site in profile.sites.items() if site.kind == "input"]
    if not sites:
        raise ValueError("profile must hold at least one site of kind 'input', got none")
    if weights is not None:
        unknown = sorted(set(weights) - set(sites))
        if unknown:
            raise ValueError(f"weights must name input sites of the profile, got {unknown[0]!r}")
    pooled = [profile.sites[name].moments.pool(1).state for name in sites]
    result = {}
    for language in profile.languages:
        row = tuple(profile.entries).index(language)
        state = np.stack([s[row] for s in pooled])
        seen = state[:, COUNT] > 0
        if not seen.any():
            raise ValueError(f"profile must hold values of every language, got none of {language!r}")
        n = state[seen, COUNT]
        moments = np.stack([state[seen, MEAN], *(state[seen, k] / n for k in (M2, M3, M4))], axis=-1)
        names = [name for name, use in zip(sites, seen, strict=True) if use]
        share = n if weights is None else [weights.get(name, 0.0) for name in names]
        result[language] = EffectiveLaw(moments, share, names)
    return result

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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..clipping.checks import Array, check_bits, finite_array, number
from ..clipping.kurtosis import kurtosis_rule
from ..clipping.language_objectives import normalized_weights
from ..clipping.law import Law, check_single
from ..ops.streaming import COUNT, M2, M3, M4, MEAN


class EffectiveLaw:
    """Moments of a mixture of layers, computed from the layers' moments and the current weights.

    A moment costs one pass over the components. (Sums that are only updated would not do: a weight that was once large,
    or a component far from the others, leaves its rounding behind when it goes.)
    """

    def __init__(self, moments: ArrayLike, weights: ArrayLike, names: Sequence[str] | None = None) -> None:
        """Args:
        moments: float [n, 4], n >= 1: mean, variance, third and fourth central moment of each component.
        weights: float [n], not negative, not all zero; they need not sum to one.
        names: [n], for messages; numbers unless given.

        Raises:
            TypeError: moments or weights are not real numbers.
            ValueError: a shape, a negative variance or weight, a value that is not finite.
        """
        self._components = finite_array("moments", moments)
        if self._components.ndim != 2 or self._components.shape[1] != 4 or not len(self._components):
            raise ValueError(f"moments: expected shape [n, 4] with n >= 1, got {list(self._components.shape)}")
        if np.any(self._components[:, 1] < 0):
            raise ValueError(f"moments: expected variances of at least 0, got {self._components[:, 1].min()}")
        self._weights = normalized_weights("weights", weights).copy()
        if self._weights.shape != (len(self._components),):
            raise ValueError(f"weights: expected shape [{len(self._components)}], got {list(self._weights.shape)}")
        self.names = tuple(names) if names is not None else tuple(str(i) for i in range(len(self._components)))

    @classmethod
    def from_laws(cls, laws: Sequence[Law], weights: ArrayLike) -> EffectiveLaw:
        """The effective law of single laws.

        Args:
            laws: laws of shape (), with a third and a fourth moment.
            weights: float [n], not negative, not all zero; they need not sum to one.

        Returns:
            The effective law.

        Raises:
            TypeError: a law is no law, or weights are not real numbers.
            ValueError: a law is not single, a moment is not finite, or weights have another shape or are not valid.
        """
        singles = [check_single(law) for law in laws]
        rows = [[float(x) for x in (law.mean, law.variance, law.third_moment, law.fourth_moment)] for law in singles]
        return cls(rows, weights)

    @property
    def weights(self) -> Array:
        """Current weights, summing to one: float64 [n]."""
        largest = self._weights.max()
        return np.asarray(self._weights / largest / (self._weights / largest).sum())

    def update(self, component: int, weight: float) -> None:
        """Give one component a new weight, relative to the others' current ones.

        Args:
            component: its number.
            weight: finite, not negative; at least one component must keep a positive weight.

        Raises:
            TypeError: weight is not a number.
            ValueError: weight is negative or not finite, or no component would have a positive weight.
        """
        weight = number("weight", weight)
        if weight < 0:
            raise ValueError(f"weight: expected a number of at least 0, got {weight}")
        changed = self._weights.copy()
        changed[component] = weight
        if not np.any(changed > 0):
            raise ValueError("weight: expected at least one component of positive weight, got 0 for the last one")
        self._weights = changed

    def _distances(self) -> tuple[Array, Array, Array, Array]:
        """Components of positive weight: weights, distances of their means from the mixture's, and moments [4, m]."""
        used = self._weights > 0
        weights, components = self.weights[used], self._components[used]
        reference = components[np.argmax(weights), 0]
        offset = components[:, 0] - reference
        return weights, offset - weights @ offset, components.T, np.asarray(reference + weights @ offset)

    @property
    def mean(self) -> float:
        """E X, in units of X."""
        return float(self._distances()[3])

    @property
    def variance(self) -> float:
        """mu_2, in units of X squared."""
        w, d, moments, _ = self._distances()
        return float(w @ (moments[1] + d**2))

    @property
    def std(self) -> float:
        """Square root of mu_2."""
        return float(np.sqrt(self.variance))

    @property
    def skewness(self) -> float:
        """mu_3 / mu_2^1.5; NaN for a constant."""
        w, d, (_, variance, third, _), _ = self._distances()
        if self.variance == 0:
            return float("nan")
        return float(w @ (third + 3 * d * variance + d**3) / self.variance**1.5)

    @property
    def kurtosis(self) -> float:
        """kappa_eff = mu_4 / mu_2^2 - 3; NaN for a constant."""
        w, d, (_, variance, third, fourth), _ = self._distances()
        if self.variance == 0:
            return float("nan")
        return float(w @ (fourth + 4 * d * third + 6 * d**2 * variance + d**4) / self.variance**2 - 3)


def source_clip(
    law: EffectiveLaw,
    bits: int = 4,
    coefficients: str = "published",
    codebook: str = "midrise",
    objective: str = "exact",
) -> float:
    """The source document's clip of a language, sigma_eff g(kappa_eff, B), in units of X.

    g is a rule for alpha* / sigma from the excess kurtosis (`clipping.kurtosis_rule`). One clip for all layers, from a
    statistic that does not determine the clip: kept for comparison with clips by layer.

    Args:
        law: the effective law of the language (`effective`).
        bits: 2 to 8; 4 for the published coefficients.
        coefficients: `published` (2.5, 0.3), `fitted` or `spline`.
        codebook: `midrise` or `midtread`, what the fitted rules are for.
        objective: `exact` or `aciq`, likewise.

    Returns:
        The clip, in units of X.

    Raises:
        ValueError: the law is a constant, or an argument is not among its choices.
    """
    check_bits(bits)
    if not isinstance(law, EffectiveLaw):
        raise TypeError(f"law: expected an EffectiveLaw, got {type(law).__name__}")
    if not law.std > 0:
        raise ValueError("law: expected positive variance, got a constant")
    # Rounding may put a two-point law's kurtosis below -2, where none is.
    return law.std * float(kurtosis_rule(max(law.kurtosis, -2.0), bits, coefficients, codebook, objective))


def effective(profile: Any, weights: Mapping[str, float] | None = None) -> dict[str, EffectiveLaw]:
    """The effective law of every language of a profile, over its layer inputs.

    Args:
        profile: a `la_aciq.Profile`.
        weights: a_l(lambda) by site name, all languages alike. By default a site weighs as many values as it has seen
            of the language, so that the effective law is that of one value drawn from everything the language put
            through the model. A site that is not named weighs 0.

    Returns:
        By language its effective law, with one component per site that has values of the language.

    Raises:
        ValueError: the profile has no layer input or no values of a language, or weights name other sites, are
            negative or all zero.
    """
    sites = [name for name, site in profile.sites.items() if site.kind == "input"]
    if not sites:
        raise ValueError("profile: expected at least one site of kind 'input', got none")
    if weights is not None:
        unknown = sorted(set(weights) - set(sites))
        if unknown:
            raise ValueError(f"weights: expected input sites of the profile, got {unknown[0]!r}")
    pooled = [profile.sites[name].moments.pool(1).state for name in sites]
    result = {}
    for language in profile.languages:
        row = tuple(profile.entries).index(language)
        state = np.stack([s[row] for s in pooled])
        seen = state[:, COUNT] > 0
        if not seen.any():
            raise ValueError(f"profile: expected values of every language, got none of {language!r}")
        n = state[seen, COUNT]
        moments = np.stack([state[seen, MEAN], *(state[seen, k] / n for k in (M2, M3, M4))], axis=-1)
        names = [name for name, use in zip(sites, seen, strict=True) if use]
        share = n if weights is None else [weights.get(name, 0.0) for name in names]
        result[language] = EffectiveLaw(moments, share, names)
    return result

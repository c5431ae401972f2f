"""One clip for several languages, chosen on their normalized errors e_i(alpha) = MSE_i(alpha) / E X_i^2.

Language objectives, for weights w that sum to one (equal unless given):

- `mean`, `weighted`   sum_i w_i e_i
- `minimax`            max_i e_i over the languages of positive weight
- `variance`           sum_i w_i e_i + penalty sum_i w_i (e_i - mean)^2, the weight of the disparity
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..choices import LANGUAGE_OBJECTIVES
from .checks import Array, check_choice, real_array
from .histogram import Bins, HistogramLaw
from .histogram_optimum import errors_on_grid, optimal_bins, scan_grid
from .objectives import mse_unchecked


def language_weights_array(
    language_objective: str, languages: Sequence[str], weights: Mapping[str, float] | None
) -> Array:
    """Weights of `languages` in order, summing to one: equal unless named (`weighted` needs them; `mean` has none)."""
    check_choice("language_objective", language_objective, LANGUAGE_OBJECTIVES)
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(f"language_weights: expected a mapping of languages to weights, got {type(weights).__name__}")
    if weights is None:
        if language_objective == "weighted":
            raise ValueError("language_weights: expected weights for language_objective='weighted', got None")
        return np.full(len(languages), 1 / max(1, len(languages)))
    if language_objective == "mean":
        raise ValueError("language_weights: expected None for language_objective='mean', got weights")
    unknown = sorted(set(weights) - set(languages))
    if unknown:
        raise ValueError(f"language_weights: expected languages of the profile, got {unknown[0]!r}")
    return normalized_weights("language_weights", [weights.get(language, 0.0) for language in languages])


def normalized_weights(name: str, weights: ArrayLike) -> Array:
    """Finite, non-negative weights of positive sum, divided by it."""
    w = real_array(name, weights)
    if not np.all(np.isfinite(w)) or np.any(w < 0) or w.sum() <= 0:
        raise ValueError(f"{name}: expected finite weights, none negative and not all zero, got {w.tolist()}")
    return np.asarray(w / w.sum())


def combine(errors: Array, weights: Array, language_objective: str, penalty: float = 1.0) -> Array:
    """The language objective of normalized errors [languages, ...] under weights [languages, ...] (columns sum to
    one).
    """
    if language_objective == "minimax":
        return np.asarray(np.where(weights > 0, errors, -np.inf).max(0))
    mean = (weights * errors).sum(0)
    if language_objective == "variance":
        mean = mean + penalty * (weights * (errors - mean) ** 2).sum(0)
    return np.asarray(mean)


def shared_bins(
    bins: Bins,
    weights: Array,
    bits: int,
    codebook: str,
    objective: str,
    language_objective: str,
    penalty: float = 1.0,
) -> Array:
    """The shared clip of every group: bins [languages, groups, 258], weights [languages, groups] >= 0 -> alpha
    [groups].

    A mean of normalized errors is the error of one mixture, with weights w_i / E X_i^2: solved as one histogram. The
    other objectives scan the same grid of clips and close in on the best by repeated subdivision (relative accuracy
    1e-4).
    """
    languages, groups = weights.shape
    power = bins.moment(2)
    weights = weights / weights.sum(0)
    share = np.divide(weights, power, out=np.zeros_like(weights), where=weights > 0)
    share /= share.sum(0)
    mixture = Bins(np.einsum("lg,lgb->gb", share, bins.weight), np.einsum("lg,lgb->gb", share, bins.offset))
    alpha, _ = optimal_bins(mixture, bits, codebook, objective)
    if language_objective in ("mean", "weighted"):
        return alpha
    power = np.where(weights > 0, power, 1.0)[..., None]
    law = HistogramLaw.from_bins(Bins(*(x.reshape(languages * groups, -1) for x in (bins.weight, bins.offset))))
    octave = np.floor(np.log2(alpha)).astype(np.int64)
    grid = scan_grid()
    errors = errors_on_grid(law, np.tile(octave, languages), bits, codebook, objective).reshape(languages, groups, -1)
    best = combine(errors / power, weights[..., None], language_objective, penalty).argmin(-1)
    center, ratio = 2.0**octave * grid[best], grid[1] / grid[0]
    for _ in range(_SUBDIVISIONS):
        clips = center[:, None] * ratio ** np.linspace(-1, 1, 2 * _PARTS + 1)
        each = law.take(np.arange(languages * groups)[:, None])
        errors = mse_unchecked(each, np.tile(clips, (languages, 1)), bits, codebook, objective).reshape(
            languages, groups, -1
        )
        best = combine(errors / power, weights[..., None], language_objective, penalty).argmin(-1)
        center, ratio = clips[np.arange(groups), best], ratio ** (1 / _PARTS)
    return np.asarray(center)


_SUBDIVISIONS, _PARTS = 4, 6  # 3 % between grid clips, divided by 6 four times

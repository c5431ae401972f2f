"""What sharing one clip costs each language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._deprecated import old_fields
from ..clipping.checks import Array, check_problem
from ..clipping.histogram import Bins, HistogramLaw
from ..clipping.histogram_optimum import optimal_bins
from ..clipping.language_objectives import language_weights_array, shared_bins
from ..clipping.objectives import mse_unchecked


@old_fields(own="separate")
@dataclass(frozen=True)
class RegretTable:
    """Relative excess of the normalized error (MSE / E X^2) under a shared clip over that under a separate one.

    Attributes:
        kinds: kinds of layers (`down_proj`, ...), and `key` and `value` for sites of the cache.
        languages: BCP-47 tags.
        separate: float64 [kinds, languages], the normalized error when each language has its own clip, averaged over
            groups and layers. NaN where a language has no values.
        shared: float64 [kinds, languages], the same under the shared clip.
    """

    kinds: tuple[str, ...]
    languages: tuple[str, ...]
    separate: Array
    shared: Array

    @property
    def excess(self) -> Array:
        """(shared - separate) / separate, float64 [kinds, languages]: 0.05 means that sharing costs 5 % more error."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.shared / self.separate - 1)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Layer kind -> language -> excess, for JSON."""
        return {
            kind: dict(zip(self.languages, map(float, excess), strict=True))
            for kind, excess in zip(self.kinds, self.excess, strict=True)
        }


def regret(
    profile: Any,
    bits: int = 4,
    codebook: str = "midrise",
    objective: str = "exact",
    language_objective: str = "mean",
) -> RegretTable:
    """What one clip for all languages costs each of them, per layer kind, at one clip per group.

    Each group of channels of each site is one problem. The shared clip minimizes the language objective over all
    languages, the separate clip the language's error alone (no shrinkage: this is what sharing costs on the calibration
    data, an upper bound on what separate clips can gain).

    Args:
        profile: a `la_aciq.Profile`; its histograms are int64 [entries, groups, 258, 2] per site.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.
        objective: the error of a clip: `exact`, `in_range` or `aciq`.
        language_objective: what the shared clip minimizes: `mean`, `minimax` or `variance`. All languages weigh the
            same.

    Returns:
        The normalized errors by kind of layer and language.

    Raises:
        TypeError: bits is not an integer, or a choice is not a string.
        ValueError: an argument is not among its choices, language_objective is `weighted`, or the profile has no
            language.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    languages = tuple(profile.languages)
    if not languages:
        raise ValueError("profile: expected at least one language, got none")
    weights = language_weights_array(language_objective, languages, None)
    entries = [tuple(profile.entries).index(language) for language in languages]
    sums: dict[str, list[Array]] = {}
    for site in profile.sites.values():
        histogram = np.asarray(site.moments.histogram)[entries]
        present = histogram[..., 0].sum(-1) > 0
        bins = Bins.from_histogram(histogram)
        shape = (*present.shape, -1)
        weight = np.where(present[..., None], bins.weight.reshape(shape), 0)
        offset = np.where(present[..., None], bins.offset.reshape(shape), 0)
        usable = present.any(0)
        common = np.full(present.shape[1], np.nan)
        common[usable] = shared_bins(
            Bins(weight[:, usable], offset[:, usable]),
            weights[:, None] * present[:, usable],
            bits,
            codebook,
            objective,
            language_objective,
        )
        flat = Bins(weight[present], offset[present])
        law = HistogramLaw.from_bins(flat)
        separate = optimal_bins(flat, bits, codebook, objective)[1]
        clips = np.broadcast_to(common, present.shape)[present]
        shared = mse_unchecked(law, clips, bits, codebook, objective)
        # A clip found by search may miss the optimum by its tolerance; the separate clip is at least as good as the
        # shared one.
        separate = np.minimum(separate, shared)
        kind = site.layer_kind if site.kind == "input" else site.kind
        totals = sums.setdefault(kind, [np.zeros(len(languages)) for _ in range(3)])
        language_of = np.nonzero(present)[0]
        for total, values in zip(totals, (separate / law.power, shared / law.power, np.ones(len(clips))), strict=True):
            np.add.at(total, language_of, values)
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = {kind: (separate / count, shared / count) for kind, (separate, shared, count) in sums.items()}
    return RegretTable(
        kinds=tuple(errors),
        languages=languages,
        separate=np.asarray([separate for separate, _ in errors.values()]),
        shared=np.asarray([shared for _, shared in errors.values()]),
    )

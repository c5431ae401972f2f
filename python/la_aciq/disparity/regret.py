"""What sharing one clip costs each language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..clipping.checks import Array, check_problem
from ..clipping.histogram import Bins, HistogramLaw
from ..clipping.histogram_optimum import optimal_bins
from ..clipping.language_objectives import language_weights_array, shared_bins
from ..clipping.objectives import mse_unchecked


@dataclass(frozen=True)
class RegretTable:
    """Relative excess of the normalized error under a shared clip over the error under the language's own clip.

    `excess` is float64 [kinds, languages]: 0.05 means that sharing costs this language 5 % more error in layers of
    this kind. `own` and `shared` are the normalized errors behind it, averaged over groups and layers. NaN where a
    language has no values.
    """

    kinds: tuple[str, ...]
    languages: tuple[str, ...]
    own: Array
    shared: Array

    @property
    def excess(self) -> Array:
        """(shared - own) / own, [kinds, languages]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.shared / self.own - 1)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Layer kind -> language -> excess, for JSON."""
        return {
            kind: dict(zip(self.languages, map(float, row), strict=True))
            for kind, row in zip(self.kinds, self.excess, strict=True)
        }


def regret(
    profile: Any,
    bits: int = 4,
    codebook: str = "midrise",
    objective: str = "exact",
    language_objective: str = "mean",
) -> RegretTable:
    """Shared against own clips, per layer kind and language, at one clip per group.

    Each group of channels of each site is one problem. The shared clip minimizes the language objective over all
    languages, the own clip the language's error alone (no shrinkage: this is what sharing costs on the calibration
    data, an upper bound on what separate clips can gain). Kinds are the layers' (`down_proj`, ...), and `key` and
    `value` for cache sites.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    languages = tuple(profile.languages)
    if not languages:
        raise ValueError("profile must hold at least one language, got none")
    weights = language_weights_array(language_objective, languages, None)
    rows = [tuple(profile.entries).index(language) for language in languages]
    sums: dict[str, list[Array]] = {}
    for site in profile.sites.values():
        histogram = np.asarray(site.moments.histogram)[rows]
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
        own = optimal_bins(flat, bits, codebook, objective)[1]
        given = np.broadcast_to(common, present.shape)[present]
        forced = mse_unchecked(law, given, bits, codebook, objective)
        kind = site.layer_kind if site.kind == "input" else site.kind
        total = sums.setdefault(kind, [np.zeros(len(languages)) for _ in range(3)])
        where = np.nonzero(present)[0]
        # A clip found by search may miss the optimum by its tolerance; the own clip is at least as good as the shared
        # one.
        for into, values in zip(
            total, (np.minimum(own, forced) / law.power, forced / law.power, np.ones(len(where))), strict=True
        ):
            np.add.at(into, where, values)
    with np.errstate(invalid="ignore", divide="ignore"):
        table = {kind: (own / count, shared / count) for kind, (own, shared, count) in sums.items()}
    return RegretTable(
        kinds=tuple(table),
        languages=languages,
        own=np.asarray([own for own, _ in table.values()]),
        shared=np.asarray([shared for _, shared in table.values()]),
    )

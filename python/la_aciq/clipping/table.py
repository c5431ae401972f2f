"""From a calibration profile to the clips that inference reads.

Rows of a table are the profile's: `und` first, then the languages, then token classes such as `sink`. Row `und` serves
every language that is not in the table, so its clip is shared and chosen under a language objective; a token class
always has a clip of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..choices import CODEBOOKS, LANGUAGE_OBJECTIVES, OBJECTIVES, SHARINGS, TABLE_GRANULARITIES
from ..errors import LaAciqError
from ..ops.rotation import block_size
from .checks import Array, check_bits, check_choice, check_problem, number
from .histogram import Bins
from .histogram_optimum import optimal_bins
from .language_objectives import language_weights_array, shared_bins

# A language's clip from n values is drawn toward `und`'s with the weight of this many values. At INT4, 1024 values of
# a Gaussian leave alpha* uncertain by +-9 % (95 %), which is more than languages differ by, and 100,000 by +-1 %: the
# prior fades between the two.
PRIOR_SAMPLES = 1024


@dataclass(frozen=True)
class ClipTable:
    """Clips per layer, row and group.

    `alpha`, `shape`: layer name -> float32 [rows, groups]; `shape` is alpha over the rms of the values it was chosen
    for, the factor that the dynamic operation multiplies a row's own rms with. `shrinkage`: layer name -> float32
    [rows, groups], the share of the pooled law in the law a clip was chosen for (0: own data alone; 1: no data, the
    row uses `und`'s clip).
    """

    rows: tuple[str, ...]
    alpha: dict[str, NDArray[np.float32]]
    shape: dict[str, NDArray[np.float32]]
    shrinkage: dict[str, NDArray[np.float32]]
    bits: int
    codebook: str
    objective: str
    granularity: str
    sharing: str
    language_objective: str

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_choice("codebook", self.codebook, CODEBOOKS)
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("granularity", self.granularity, TABLE_GRANULARITIES)
        check_choice("sharing", self.sharing, SHARINGS)
        check_choice("language_objective", self.language_objective, LANGUAGE_OBJECTIVES)
        if not self.rows or self.rows[0] != "und":
            raise ValueError(f"rows must start with 'und', got {self.rows[:1]}")
        if not self.alpha.keys() == self.shape.keys() == self.shrinkage.keys():
            raise ValueError("alpha, shape and shrinkage must name the same layers")
        for layer, alpha in self.alpha.items():
            for name, values in (("alpha", alpha), ("shape", self.shape[layer]), ("shrinkage", self.shrinkage[layer])):
                if values.ndim != 2 or values.shape != (len(self.rows), alpha.shape[-1]) or values.dtype != np.float32:
                    raise ValueError(
                        f"{name} of layer {layer!r} must be float32 [{len(self.rows)}, groups], "
                        f"got {values.dtype} {list(values.shape)}"
                    )
                good = np.isfinite(values) & ((values > 0) if name != "shrinkage" else (values >= 0) & (values <= 1))
                if not good.all():
                    row, group = np.argwhere(~good)[0]
                    expected = "from 0 to 1" if name == "shrinkage" else "finite and positive"
                    raise ValueError(
                        f"{name} of layer {layer!r} must be {expected}, "
                        f"got {values[row, group]} for {self.rows[row]!r}, group {group}"
                    )

    def row(self, tag: str) -> int:
        """Index of the row that serves a BCP-47 tag (or a token class by its name): the closest language, else
        `und`.
        """
        if tag in self.rows:
            return self.rows.index(tag)
        from ..tags import match

        languages = self.rows[: self.rows.index("sink")] if "sink" in self.rows else self.rows
        return self.rows.index(match(tag, languages))

    def to_arrays(self) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
        """Arrays by name, and metadata for JSON: together a checkpoint's copy of the table (`from_arrays` reads it
        back).
        """
        arrays = {
            f"{field}/{layer}": values for field in _ARRAY_FIELDS for layer, values in getattr(self, field).items()
        }
        metadata: dict[str, Any] = {name: getattr(self, name) for name in _METADATA_FIELDS}
        return arrays, {**metadata, "rows": list(self.rows)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> ClipTable:
        """The inverse of `to_arrays`; ValueError names the first thing that is missing or not valid."""
        missing = [name for name in ("rows", *_METADATA_FIELDS) if name not in metadata]
        if missing:
            raise ValueError(f"metadata of a clip table must have {missing[0]!r}, got {sorted(metadata)}")
        fields: dict[str, dict[str, NDArray[np.float32]]] = {field: {} for field in _ARRAY_FIELDS}
        for name, values in arrays.items():
            field, _, layer = name.partition("/")
            if field not in fields or not layer:
                raise ValueError(
                    f"arrays of a clip table must be named alpha/, shape/ or shrinkage/ and a layer, got {name!r}"
                )
            fields[field][layer] = np.asarray(values)
        chosen: dict[str, Any] = {name: metadata[name] for name in _METADATA_FIELDS}
        return cls(
            rows=tuple(metadata["rows"]),
            alpha=fields["alpha"],
            shape=fields["shape"],
            shrinkage=fields["shrinkage"],
            **chosen,
        )


_ARRAY_FIELDS = ("alpha", "shape", "shrinkage")
_METADATA_FIELDS = ("bits", "codebook", "objective", "granularity", "sharing", "language_objective")


def table(
    profile: Any,
    bits: int = 4,
    codebook: str = "midrise",
    objective: str = "exact",
    granularity: str = "group",
    sharing: str = "language",
    language_objective: str = "mean",
    language_weights: Mapping[str, float] | None = None,
    penalty: float = 1.0,
) -> ClipTable:
    """Clips for every layer of a profile (and every key and value site, under the site's name).

    granularity: `group` one clip per group of channels, `layer` one per layer, `model` one for all layer inputs (and
    one for all keys, one for all values): the scheme of the source document, kept for comparison. sharing: `language`
    gives each language its own clip, `pooled` gives all of them `und`'s. language_objective: what the shared clip
    minimizes over the languages' normalized errors e_i: `mean`, `weighted` (sum of w_i e_i), `minimax` (the largest
    e_i of a positive weight), or `variance`, the disparity-weighted error sum of w_i e_i + penalty sum of w_i (e_i -
    mean)^2. language_weights: w by language, normalized here (a language that is not named weighs 0); equal unless
    named. penalty: the weight of the disparity, >= 0; read with `variance` alone.

    Cost: O(rows x groups x layers) independent problems of one matrix-vector product each.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    check_choice("granularity", granularity, TABLE_GRANULARITIES)
    check_choice("sharing", sharing, SHARINGS)
    rows = tuple(profile.entries)
    languages = tuple(profile.languages)
    weights = language_weights_array(language_objective, languages, language_weights)
    penalty = number("penalty", penalty)
    if penalty < 0:
        raise ValueError(f"penalty must not be negative, got {penalty}")
    chosen = _Choice(rows, languages, weights, bits, codebook, objective, sharing, language_objective, penalty)

    solved: dict[str, _Clips] = {}
    names = list(profile.sites)
    if granularity == "model":
        for kind in dict.fromkeys(site.kind for site in profile.sites.values()):
            members = [name for name in names if profile.sites[name].kind == kind]
            total = sum(_histogram(profile, name).sum(axis=1, keepdims=True) for name in members)
            between = np.mean([_between(profile, name).mean(keepdims=True) for name in members], axis=0)
            clips = chosen.solve([total], [between], [f"all {kind} sites"])[0]
            for name in members:
                solved[name] = clips.spread(_histogram(profile, name).shape[1])
    else:
        batch: list[str] = []
        for i, name in enumerate(names):
            batch.append(name)
            histograms, between_each = [_histogram(profile, n) for n in batch], [_between(profile, n) for n in batch]
            if granularity == "layer":
                histograms = [h.sum(axis=1, keepdims=True) for h in histograms]
                between_each = [b.mean(keepdims=True) for b in between_each]
            if i + 1 == len(names) or sum(math.prod(h.shape[:2]) for h in histograms) >= _BATCH:
                for done, clips in zip(batch, chosen.solve(histograms, between_each, batch), strict=True):
                    solved[done] = clips.spread(_histogram(profile, done).shape[1])
                batch = []

    site_of = dict(profile.layers)
    unread = [name for name in names if name not in set(site_of.values())]
    site_of.update({name: name for name in unread})
    return ClipTable(
        rows=rows,
        alpha={layer: solved[site].alpha for layer, site in site_of.items()},
        shape={layer: solved[site].shape for layer, site in site_of.items()},
        shrinkage={layer: solved[site].shrinkage for layer, site in site_of.items()},
        bits=bits,
        codebook=codebook,
        objective=objective,
        granularity=granularity,
        sharing=sharing,
        language_objective=language_objective,
    )


_BATCH = 2048  # problems solved together: enough to keep the matrix product busy, little enough memory


def _histogram(profile: Any, site: str) -> NDArray[np.int64]:
    histogram = profile.sites[site].moments.histogram
    if histogram is None:
        raise ValueError(f"profile must hold histograms, got none for site {site!r}")
    return np.asarray(histogram)


def _between(profile: Any, site: str) -> Array:
    """Mean squared distance of the languages' centers from the pooled one, per element of each group: [groups].

    A rotation spreads a distance over its block; where groups are parts of a block each is given an equal share.
    """
    stats = profile.sites[site]
    center = profile.centers.get(site)
    groups = -(-stats.k // stats.group_size)
    if center is None or not profile.languages:
        return np.zeros(groups)
    languages = [profile.entries.index(tag) for tag in profile.languages]
    squared = np.mean((center[languages].astype(np.float64) - center[0]) ** 2, axis=0)
    if profile.metadata["rotation"]["enabled"]:
        squared = np.repeat(squared.reshape(-1, block := block_size(stats.k)).mean(axis=1), block)
    starts = np.arange(0, stats.k, stats.group_size)
    return np.asarray(np.add.reduceat(squared, starts) / np.diff([*starts, stats.k]))


@dataclass(frozen=True)
class _Clips:
    """Clips of one site, float32 [rows, groups]."""

    alpha: NDArray[np.float32]
    shape: NDArray[np.float32]
    shrinkage: NDArray[np.float32]

    def spread(self, groups: int) -> _Clips:
        full = (len(self.alpha), groups)
        return _Clips(*(np.broadcast_to(x, full).copy() for x in (self.alpha, self.shape, self.shrinkage)))


@dataclass(frozen=True)
class _Choice:
    """The choices of one table, and the solution of sites under them."""

    rows: tuple[str, ...]
    languages: tuple[str, ...]
    weights: Array
    bits: int
    codebook: str
    objective: str
    sharing: str
    language_objective: str
    penalty: float

    def solve(self, histograms: list[NDArray[np.int64]], between: list[Array], names: list[str]) -> list[_Clips]:
        """Clips for histograms [rows, groups, 258, 2], side by side along the groups.

        between: [groups] each, the mean squared distance of the languages' centers from the pooled one. The histograms
        are about the languages' own centers; what is centered with the pooled one is wider by that much.
        """
        counts = np.concatenate([h[..., 0].sum(-1) for h in histograms], axis=1).astype(np.float64)
        group_names = [name for name, h in zip(names, histograms, strict=True) for _ in range(h.shape[1])]
        rows, groups = counts.shape
        with_mass = counts > 0
        bins = Bins.from_histogram(np.concatenate(histograms, axis=1))
        weight = np.where(with_mass[..., None], bins.weight.reshape(rows, groups, -1), 0)
        offset = np.where(with_mass[..., None], bins.offset.reshape(rows, groups, -1), 0)
        if not with_mass[0].all():
            raise LaAciqError(
                f"profile must have values in every group, got none for {group_names[int(np.argmin(with_mass[0]))]!r}: "
                "calibrate on more text"
            )

        spoken = np.asarray([self.rows.index(language) for language in self.languages], dtype=np.intp)
        shrinkage = np.where(with_mass, 0.0, 1.0)
        shrinkage[spoken] = PRIOR_SAMPLES / (counts[spoken] + PRIOR_SAMPLES)
        rms = np.sqrt(Bins(weight, offset).moment(2))

        if len(spoken):
            presence = self.weights[:, None] * with_mass[spoken]
            shared = shared_bins(
                Bins(weight[spoken], offset[spoken]),
                presence,
                self.bits,
                self.codebook,
                self.objective,
                self.language_objective,
                self.penalty,
            )
        else:
            shared = optimal_bins(Bins(weight[0], offset[0]), self.bits, self.codebook, self.objective)[0]

        alpha = np.broadcast_to(shared, (rows, groups)).copy()
        own = with_mass.copy()
        own[0] = False
        if self.sharing == "pooled":
            own[spoken] = False
        alpha[own] = optimal_bins(Bins(weight[own], offset[own]), self.bits, self.codebook, self.objective)[0]
        # In logarithms: a language of a tenth of the others' scale must not be pulled by their variance.
        alpha = np.where(own, alpha ** (1 - shrinkage) * shared**shrinkage, shared)
        rms = np.where(with_mass, rms, 1.0) ** (1 - shrinkage) * rms[0] ** shrinkage
        if self.sharing == "pooled":
            shrinkage[spoken] = 1
        with np.errstate(divide="ignore", invalid="ignore"):
            within = np.where(with_mass[spoken], rms[spoken] ** 2, np.nan) if len(spoken) else rms[:1] ** 2
            wider = np.sqrt(1 + np.nan_to_num(np.concatenate(between) / np.nanmean(within, axis=0), posinf=0.0))
        common = ~own
        common[[i for i in range(rows) if i and i not in spoken]] = False
        clips = alpha * np.where(common, wider, 1)
        parts = np.cumsum([h.shape[1] for h in histograms])[:-1]
        columns = [np.split(x.astype(np.float32), parts, axis=1) for x in (clips, alpha / rms, shrinkage)]
        return [_Clips(a, s, k) for a, s, k in zip(*columns, strict=True)]

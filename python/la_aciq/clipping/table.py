"""From a calibration profile to the clips that inference reads.

The entries of a table are the profile's: `und` first, then the languages, then token classes such as `sink`. Entry
`und` serves every language that is not in the table, so its clip is shared and chosen under a language objective; a
token class always has a clip of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._deprecated import old_fields, warn_renamed
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


@old_fields(rows="entries", alpha="clips", shape="clip_factors")
@dataclass(frozen=True)
class ClipTable:
    """Clips per layer, entry and group.

    Attributes:
        entries: what the tables have entries for: `und`, then languages as BCP-47 tags, then token classes.
        clips: by layer float32 [entries, groups], in units of the layer's input.
        clip_factors: by layer float32 [entries, groups]: the clip over the rms of the values that it was chosen for.
            The dynamic operation multiplies the rms of each row of x with it.
        shrinkage: by layer float32 [entries, groups]: the share of the pooled law in the law that a clip was chosen
            for. 0: the language's data alone. 1: the entry has no data, or shares the clip of `und`.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.
        objective: `exact`, `in_range` or `aciq`.
        granularity: `group`, `layer` or `model`.
        sharing: `language` or `pooled`.
        language_objective: `mean`, `weighted`, `minimax` or `variance`.
    """

    entries: tuple[str, ...]
    clips: dict[str, NDArray[np.float32]]
    clip_factors: dict[str, NDArray[np.float32]]
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
        if not self.entries or self.entries[0] != "und":
            raise ValueError(f"entries: expected 'und' first, got {self.entries[:1]}")
        if not self.clips.keys() == self.clip_factors.keys() == self.shrinkage.keys():
            raise ValueError("clips, clip_factors and shrinkage: expected arrays of the same layers, got others")
        for layer, clips in self.clips.items():
            shape = (len(self.entries), clips.shape[-1])
            for name in _STORED_AS:
                values = getattr(self, name)[layer]
                if values.ndim != 2 or values.shape != shape or values.dtype != np.float32:
                    raise ValueError(
                        f"{name} of layer {layer!r}: expected float32 [{len(self.entries)}, groups], "
                        f"got {values.dtype} {list(values.shape)}"
                    )
                good = np.isfinite(values) & ((values > 0) if name != "shrinkage" else (values >= 0) & (values <= 1))
                if not good.all():
                    entry, group = np.argwhere(~good)[0]
                    expected = "shares from 0 to 1" if name == "shrinkage" else "finite and positive values"
                    raise ValueError(
                        f"{name} of layer {layer!r}: expected {expected}, "
                        f"got {values[entry, group]} for {self.entries[entry]!r}, group {group}"
                    )

    def entry(self, tag: str) -> int:
        """Index of the entry that serves a language.

        Args:
            tag: a BCP-47 tag, or the name of a token class.

        Returns:
            The index of the entry of that name, else of the closest language in the table, else 0 (`und`).
        """
        if tag in self.entries:
            return self.entries.index(tag)
        from ..tags import match

        languages = self.entries[: self.entries.index("sink")] if "sink" in self.entries else self.entries
        return self.entries.index(match(tag, languages))

    def row(self, tag: str) -> int:
        """The old name of `entry`.

        Args:
            tag: a BCP-47 tag, or the name of a token class.

        Returns:
            What `entry` returns.
        """
        warn_renamed("ClipTable.row", "ClipTable.entry")
        return self.entry(tag)

    def to_arrays(self) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
        """Arrays by name, and metadata for JSON: together a checkpoint's copy of the table (`from_arrays` reads it
        back).
        """
        arrays = {
            f"{prefix}/{layer}": values
            for field, prefix in _STORED_AS.items()
            for layer, values in getattr(self, field).items()
        }
        metadata: dict[str, Any] = {name: getattr(self, name) for name in _METADATA_FIELDS}
        return arrays, {**metadata, "rows": list(self.entries)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> ClipTable:
        """The inverse of `to_arrays`.

        Args:
            arrays: float32 [entries, groups] by `alpha/<layer>`, `shape/<layer>` and `shrinkage/<layer>`: the clips,
                the clip factors and the shares of the pooled law.
            metadata: `rows` (the names of the entries), `bits`, `codebook`, `objective`, `granularity`, `sharing` and
                `language_objective`.

        Returns:
            The table.

        Raises:
            TypeError: bits is not an integer, or a choice is not a string.
            ValueError: something is missing, has another shape or dtype, or is not valid; the message names the first.
        """
        missing = [name for name in ("rows", *_METADATA_FIELDS) if name not in metadata]
        if missing:
            raise ValueError(f"metadata: expected {missing[0]!r} of a clip table, got {sorted(metadata)}")
        field_of = {prefix: field for field, prefix in _STORED_AS.items()}
        fields: dict[str, Any] = {field: {} for field in _STORED_AS}
        for name, values in arrays.items():
            prefix, _, layer = name.partition("/")
            if prefix not in field_of or not layer:
                raise ValueError(f"arrays: expected names of alpha/, shape/ or shrinkage/ and a layer, got {name!r}")
            fields[field_of[prefix]][layer] = np.asarray(values)
        settings = {name: metadata[name] for name in _METADATA_FIELDS}
        return cls(entries=tuple(metadata["rows"]), **fields, **settings)


# By field the name in files. Files keep the names that older versions wrote, as they keep "rows" for the entries.
_STORED_AS = {"clips": "alpha", "clip_factors": "shape", "shrinkage": "shrinkage"}
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

    Each entry and group is a problem of its own, solved on its histogram (`optimal_histogram`). A language with few
    values is drawn toward the pooled clip: n values have the weight n / (n + 1024), in logarithms. Cost: O(entries x
    groups x layers) products of a matrix and a vector.

    Args:
        profile: a `la_aciq.Profile`; its histograms are int64 [entries, groups, 258, 2] per site.
        bits: bits per value, 2 to 8.
        codebook: `midrise` or `midtread`.
        objective: the error of a clip: `exact`, `in_range` or `aciq` (see `mse`).
        granularity: `group`: one clip per group of channels. `layer`: one per layer. `model`: one for all layer
            inputs, one for all keys and one for all values, the scheme of the source document, kept for comparison.
        sharing: `language` gives each language its own clip; `pooled` gives all languages the clip of `und`.
        language_objective: what a shared clip minimizes over the languages' normalized errors e_i (MSE / E X^2):
            `mean`, `weighted` (the sum of w_i e_i), `minimax` (the largest e_i of a positive weight), or `variance`,
            the disparity-weighted error: the sum of w_i e_i + penalty times the sum of w_i (e_i - mean)^2.
        language_weights: w by language, >= 0, divided here by their sum; a language that is not named weighs 0. None:
            all weigh the same. `weighted` needs weights, `mean` refuses them.
        penalty: the weight of the disparity, >= 0; read with `variance` alone.

    Returns:
        The table.

    Raises:
        TypeError: bits is not an integer, a choice is not a string, or language_weights is not a mapping.
        ValueError: an argument is not among its choices, weights name other languages than the profile's, are negative
            or all zero, or the profile has no histograms.
        LaAciqError: a group of a site has no values.
    """
    bits, codebook, objective = check_problem(bits, codebook, objective)
    check_choice("granularity", granularity, TABLE_GRANULARITIES)
    check_choice("sharing", sharing, SHARINGS)
    entries = tuple(profile.entries)
    languages = tuple(profile.languages)
    weights = language_weights_array(language_objective, languages, language_weights)
    penalty = number("penalty", penalty)
    if penalty < 0:
        raise ValueError(f"penalty: expected a number of at least 0, got {penalty}")
    chosen = _Choice(entries, languages, weights, bits, codebook, objective, sharing, language_objective, penalty)

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
                for site, clips in zip(batch, chosen.solve(histograms, between_each, batch), strict=True):
                    solved[site] = clips.spread(_histogram(profile, site).shape[1])
                batch = []

    site_of = dict(profile.layers)
    unread = [name for name in names if name not in set(site_of.values())]
    site_of.update({name: name for name in unread})
    return ClipTable(
        entries=entries,
        clips={layer: solved[site].clips for layer, site in site_of.items()},
        clip_factors={layer: solved[site].factors for layer, site in site_of.items()},
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
        raise ValueError(f"profile: expected histograms, got none for site {site!r}")
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
    """Clips of one site, float32 [entries, groups]."""

    clips: NDArray[np.float32]
    factors: NDArray[np.float32]
    shrinkage: NDArray[np.float32]

    def spread(self, groups: int) -> _Clips:
        full = (len(self.clips), groups)
        return _Clips(*(np.broadcast_to(x, full).copy() for x in (self.clips, self.factors, self.shrinkage)))


@dataclass(frozen=True)
class _Choice:
    """The choices of one table, and the solution of sites under them."""

    entries: tuple[str, ...]
    languages: tuple[str, ...]
    weights: Array
    bits: int
    codebook: str
    objective: str
    sharing: str
    language_objective: str
    penalty: float

    def solve(self, histograms: list[NDArray[np.int64]], between: list[Array], names: list[str]) -> list[_Clips]:
        """Clips for histograms [entries, groups, 258, 2], side by side along the groups.

        between: [groups] each, the mean squared distance of the languages' centers from the pooled one. The histograms
        are about the languages' own centers; what is centered with the pooled one is wider by that much.
        """
        counts = np.concatenate([h[..., 0].sum(-1) for h in histograms], axis=1).astype(np.float64)
        group_names = [name for name, h in zip(names, histograms, strict=True) for _ in range(h.shape[1])]
        entries, groups = counts.shape
        with_mass = counts > 0
        bins = Bins.from_histogram(np.concatenate(histograms, axis=1))
        weight = np.where(with_mass[..., None], bins.weight.reshape(entries, groups, -1), 0)
        offset = np.where(with_mass[..., None], bins.offset.reshape(entries, groups, -1), 0)
        if not with_mass[0].all():
            raise LaAciqError(
                f"profile: expected values in every group, got none for {group_names[int(np.argmin(with_mass[0]))]!r}: "
                "calibrate on more text"
            )

        spoken = np.asarray([self.entries.index(language) for language in self.languages], dtype=np.intp)
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

        alpha = np.broadcast_to(shared, (entries, groups)).copy()
        separate = with_mass.copy()
        separate[0] = False
        if self.sharing == "pooled":
            separate[spoken] = False
        alpha[separate] = optimal_bins(
            Bins(weight[separate], offset[separate]), self.bits, self.codebook, self.objective
        )[0]
        # In logarithms: a language of a tenth of the others' scale must not be pulled by their variance.
        alpha = np.where(separate, alpha ** (1 - shrinkage) * shared**shrinkage, shared)
        rms = np.where(with_mass, rms, 1.0) ** (1 - shrinkage) * rms[0] ** shrinkage
        if self.sharing == "pooled":
            shrinkage[spoken] = 1
        with np.errstate(divide="ignore", invalid="ignore"):
            within = np.where(with_mass[spoken], rms[spoken] ** 2, np.nan) if len(spoken) else rms[:1] ** 2
            wider = np.sqrt(1 + np.nan_to_num(np.concatenate(between) / np.nanmean(within, axis=0), posinf=0.0))
        common = ~separate
        common[[i for i in range(entries) if i and i not in spoken]] = False
        clips = alpha * np.where(common, wider, 1)
        parts = np.cumsum([h.shape[1] for h in histograms])[:-1]
        columns = [np.split(x.astype(np.float32), parts, axis=1) for x in (clips, alpha / rms, shrinkage)]
        return [_Clips(*columns_of_site) for columns_of_site in zip(*columns, strict=True)]

"""What calibration measures of one language, and how the languages add up to a profile.

Histograms and counts are integers. Moments and sums of inputs are float64, and the order in which they are added
depends on the languages alone: one process measures a language, and languages are added in the order of the profile's
entries. The result is therefore bit-identical for any number of processes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from ..ops.streaming import HISTOGRAM_BINS, Moments
from ..profile.profile import Kind, Profile, histogram_window
from ..profile.second_moments import SecondMoments
from ..tags import SINK

Sums = Mapping[str, tuple[NDArray[np.float64], int]]  # by site, the sum of the inputs [K] and their number


@dataclass(frozen=True)
class LanguageStatistics:
    """What was measured of one language. Its first tokens are apart: they belong to the profile's entry "sink".

    Attributes:
        tag: the language.
        sites: (kind, K, group size) by site; empty when only the sums were taken.
        layers: the site of each layer.
        moments: moments [groups] by site, without the first tokens.
        first_moments: moments [groups] by site of the first tokens.
        sums: of the inputs as they are, for the centers, without the first tokens.
        first_sums: likewise, of the first tokens.
    """

    tag: str
    sites: Mapping[str, tuple[Kind, int, int]]
    layers: Mapping[str, str]
    moments: Mapping[str, Moments]
    first_moments: Mapping[str, Moments]
    sums: Sums
    first_sums: Sums

    def to_bytes(self) -> bytes:
        """A safetensors file for another process; histograms are cut to the bins between the first and last used."""
        tensors: dict[str, NDArray[Any]] = {}
        windows: dict[str, int] = {}
        counts: dict[str, int] = {}
        for tokens, moments, sums in (
            ("other", self.moments, self.sums),
            ("first", self.first_moments, self.first_sums),
        ):
            for site, of_site in moments.items():
                histogram = np.asarray(of_site.histogram)
                first, last = histogram_window(histogram)
                windows[f"{tokens}.{site}"] = first
                tensors[f"{tokens}.{site}.state"] = np.ascontiguousarray(of_site.state)
                tensors[f"{tokens}.{site}.histogram"] = np.ascontiguousarray(histogram[:, first:last])
            for site, (total, count) in sums.items():
                counts[f"{tokens}.{site}"] = count
                tensors[f"{tokens}.{site}.sum"] = np.ascontiguousarray(total)
        description = {
            "tag": self.tag,
            "sites": self.sites,
            "layers": self.layers,
            "windows": windows,
            "counts": counts,
        }
        data: bytes = safetensors.numpy.save(tensors, {"language": json.dumps(description)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "LanguageStatistics":
        """The statistics of what `to_bytes` returned."""
        tensors = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        description = json.loads(header["__metadata__"]["language"])
        moments: dict[str, dict[str, Moments]] = {"other": {}, "first": {}}
        sums: dict[str, dict[str, tuple[NDArray[np.float64], int]]] = {"other": {}, "first": {}}
        for name, start in description["windows"].items():
            tokens, _, site = name.partition(".")
            window = tensors[f"{name}.histogram"]
            histogram = np.zeros((len(window), HISTOGRAM_BINS, 2), dtype=np.int64)
            histogram[:, start : start + window.shape[1]] = window
            moments[tokens][site] = Moments.from_state(tensors[f"{name}.state"], histogram)
        for name, count in description["counts"].items():
            tokens, _, site = name.partition(".")
            sums[tokens][site] = tensors[f"{name}.sum"], count
        sites = {site: (kind, k, group_size) for site, (kind, k, group_size) in description["sites"].items()}
        return cls(
            description["tag"],
            sites,
            description["layers"],
            moments["other"],
            moments["first"],
            sums["other"],
            sums["first"],
        )


class ProfileBuilder:
    """Adds up the statistics of languages, in the order in which they come, to a profile.

    Attributes:
        languages: by tag, the moments [groups] by site.
    """

    def __init__(self) -> None:
        self.languages: dict[str, Mapping[str, Moments]] = {}
        self._sites: dict[str, tuple[Kind, int, int]] = {}
        self._layers: dict[str, str] = {}
        self._sink: dict[str, Moments] = {}
        self._means: dict[str, dict[str, NDArray[np.float64]]] = {}
        self._sink_sums: dict[str, tuple[NDArray[np.float64], int]] = {}

    @classmethod
    def of(cls, partial: Profile) -> "ProfileBuilder":
        """A builder with the languages of a profile; the sums for its centers have to be added again."""
        builder = cls()
        builder._sites = {name: (site.kind, site.k, site.group_size) for name, site in partial.sites.items()}
        builder._layers = dict(partial.layers)
        builder._sink = {site: moments for site, moments in partial.entry(SINK).items() if moments.count.any()}
        builder.languages = {
            tag: {site: moments for site, moments in partial.entry(tag).items() if moments.count.any()}
            for tag in partial.languages
        }
        return builder

    def add(self, statistics: LanguageStatistics) -> None:
        """Add what was measured of a language."""
        self._means[statistics.tag] = {site: total / count for site, (total, count) in statistics.sums.items()}
        for site, (total, count) in statistics.first_sums.items():
            before = self._sink_sums.get(site)
            self._sink_sums[site] = (total, count) if before is None else (before[0] + total, before[1] + count)
        if not statistics.sites:
            return
        self.languages[statistics.tag] = statistics.moments
        self._sites |= statistics.sites
        self._layers |= statistics.layers
        for site, moments in statistics.first_moments.items():
            self._sink[site] = self._sink[site] + moments if site in self._sink else moments

    def profile(self, metadata: Mapping[str, Any], second_moments: SecondMoments | None) -> Profile:
        """The profile of the languages so far.

        Args:
            metadata: that of the profile of all languages, in whose order the entries are.
            second_moments: over the same languages, or None.
        """
        languages = [tag for tag in metadata["tokens"] if tag in self.languages]
        of_these = {key: {tag: metadata[key][tag] for tag in languages} for key in ("tokens", "texts")}
        measured = {tag: self.languages[tag] for tag in languages}
        centers = self._centers(languages) if metadata["center"] else {}
        return Profile.from_languages(
            measured, self._sink, self._sites, self._layers, {**metadata, **of_these}, second_moments, centers
        )

    def _centers(self, languages: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Means of the inputs by site, float32 [entries, K]: `und` (the mean of the languages' means), the languages,
        the sink. An entry that never reached a site has the mean of `und`.
        """
        means = {tag: self._means[tag] for tag in languages}
        means[SINK] = {site: total / count for site, (total, count) in self._sink_sums.items()}
        centers = {}
        for site, (kind, k, _) in self._sites.items():
            if kind != "input":
                continue
            of_site = {entry: by_site[site] for entry, by_site in means.items() if site in by_site}
            reached = [of_site[tag] for tag in languages if tag in of_site] or list(of_site.values()) or [np.zeros(k)]
            pooled = np.stack(reached).mean(axis=0)
            centers[site] = np.stack([pooled, *(of_site.get(entry, pooled) for entry in (*languages, SINK))]).astype(
                np.float32
            )
        return centers

"""Parts of a calibration: what was measured of each language, wherever it was, and how it adds up to a profile.

Histograms and counts are integers. Moments and sums of inputs are float64, rounded in an order that the languages alone
decide: a language is measured in one place, and languages are added in the order of the profile's rows. So who measured
what is not to be seen in the result, not in its last bit.
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
class Part:
    """What was measured of one language; `first` is of its first tokens, which the profile's row "sink" is of.

    sites: (kind, k, group size) by site; empty when only the sums were taken. layers: the site of each layer. own,
    first: moments [groups] by site. own_sums, first_sums: of the inputs as they are, for the centers.
    """

    tag: str
    sites: Mapping[str, tuple[Kind, int, int]]
    layers: Mapping[str, str]
    own: Mapping[str, Moments]
    first: Mapping[str, Moments]
    own_sums: Sums
    first_sums: Sums

    def to_bytes(self) -> bytes:
        """As a safetensors file, for another process; histograms are cut to the window of bins that hold anything."""
        tensors: dict[str, NDArray[Any]] = {}
        windows: dict[str, int] = {}
        counts: dict[str, int] = {}
        for row, moments, sums in (("own", self.own, self.own_sums), ("first", self.first, self.first_sums)):
            for site, one in moments.items():
                histogram = np.asarray(one.histogram)
                first, last = histogram_window(histogram)
                windows[f"{row}.{site}"] = first
                tensors[f"{row}.{site}.state"] = np.ascontiguousarray(one.state)
                tensors[f"{row}.{site}.histogram"] = np.ascontiguousarray(histogram[:, first:last])
            for site, (total, count) in sums.items():
                counts[f"{row}.{site}"] = count
                tensors[f"{row}.{site}.sum"] = np.ascontiguousarray(total)
        description = {
            "tag": self.tag,
            "sites": self.sites,
            "layers": self.layers,
            "windows": windows,
            "counts": counts,
        }
        data: bytes = safetensors.numpy.save(tensors, {"part": json.dumps(description)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Part":
        """What `to_bytes` gave."""
        tensors = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        description = json.loads(header["__metadata__"]["part"])
        rows: dict[str, dict[str, Moments]] = {"own": {}, "first": {}}
        sums: dict[str, dict[str, tuple[NDArray[np.float64], int]]] = {"own": {}, "first": {}}
        for name, start in description["windows"].items():
            row, _, site = name.partition(".")
            cut = tensors[f"{name}.histogram"]
            histogram = np.zeros((len(cut), HISTOGRAM_BINS, 2), dtype=np.int64)
            histogram[:, start : start + cut.shape[1]] = cut
            rows[row][site] = Moments.from_state(tensors[f"{name}.state"], histogram)
        for name, count in description["counts"].items():
            row, _, site = name.partition(".")
            sums[row][site] = tensors[f"{name}.sum"], count
        sites = {site: (kind, k, group_size) for site, (kind, k, group_size) in description["sites"].items()}
        return cls(
            description["tag"], sites, description["layers"], rows["own"], rows["first"], sums["own"], sums["first"]
        )


class Parts:
    """Parts added up, in the order in which they come.

    languages: by tag, what was measured of it by site.
    """

    def __init__(self) -> None:
        self.languages: dict[str, Mapping[str, Moments]] = {}
        self._sites: dict[str, tuple[Kind, int, int]] = {}
        self._layers: dict[str, str] = {}
        self._sink: dict[str, Moments] = {}
        self._means: dict[str, dict[str, NDArray[np.float64]]] = {}
        self._sink_sums: dict[str, tuple[NDArray[np.float64], int]] = {}

    @classmethod
    def of(cls, partial: Profile) -> "Parts":
        """Those that a profile is of; the sums for its centers are to be added again."""
        parts = cls()
        parts._sites = {name: (site.kind, site.k, site.group_size) for name, site in partial.sites.items()}
        parts._layers = dict(partial.layers)
        parts._sink = {site: moments for site, moments in partial.row(SINK).items() if moments.count.any()}
        parts.languages = {
            tag: {site: moments for site, moments in partial.row(tag).items() if moments.count.any()}
            for tag in partial.languages
        }
        return parts

    def add(self, part: Part) -> None:
        """Add what was measured of a language."""
        self._means[part.tag] = {site: total / count for site, (total, count) in part.own_sums.items()}
        for site, (total, count) in part.first_sums.items():
            before = self._sink_sums.get(site)
            self._sink_sums[site] = (total, count) if before is None else (before[0] + total, before[1] + count)
        if not part.sites:
            return
        self.languages[part.tag] = part.own
        self._sites |= part.sites
        self._layers |= part.layers
        for site, moments in part.first.items():
            self._sink[site] = self._sink[site] + moments if site in self._sink else moments

    def profile(self, metadata: Mapping[str, Any], second_moments: SecondMoments | None) -> Profile:
        """The profile of the languages so far. metadata: that of all languages, which are in its order."""
        languages = [tag for tag in metadata["tokens"] if tag in self.languages]
        own = {key: {tag: metadata[key][tag] for tag in languages} for key in ("tokens", "texts")}
        measured = {tag: self.languages[tag] for tag in languages}
        centers = self._centers(languages) if metadata["center"] else {}
        return Profile.from_languages(
            measured, self._sink, self._sites, self._layers, {**metadata, **own}, second_moments, centers
        )

    def _centers(self, languages: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Means of the inputs by site, float32 [rows, K]: of the pooled row (the mean of the languages'), the languages
        and the sink. A row that never reached a site has the pooled mean.
        """
        means = {tag: self._means[tag] for tag in languages}
        means[SINK] = {site: total / count for site, (total, count) in self._sink_sums.items()}
        made = {}
        for site, (kind, k, _) in self._sites.items():
            if kind != "input":
                continue
            own = {row: by_site[site] for row, by_site in means.items() if site in by_site}
            reached = [own[tag] for tag in languages if tag in own] or list(own.values()) or [np.zeros(k)]
            pooled = np.stack(reached).mean(axis=0)
            made[site] = np.stack([pooled, *(own.get(row, pooled) for row in (*languages, SINK))]).astype(np.float32)
        return made

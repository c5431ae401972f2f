"""What calibration measured, in memory and on disk.

A profile folder holds two files, or three:

    profile.json         the entries (under "rows"), layers and sites, the settings they were measured with, the version
                         of LA-ACIQ that wrote the folder, and a checksum
    profile.safetensors  per site `<site>.state` float64 [entries, groups, 8] and `<site>.histogram` int64 [entries,
                         groups, bins, 2], cut to the bins between the first and the last used one; with centers also
                         `<site>.center` float32 [entries, K] of the inputs of linear layers
    second_moments.safetensors  when they were measured: by site of kind "input" float32 [K (K + 1) / 2], the upper
                         triangle of the sum of x x^T over all tokens, row by row

The checksum covers all files: an edited or truncated one is refused, because it would give other clips.
"""

import dataclasses
import functools
import hashlib
import json
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from .. import __version__
from .._deprecated import warn_renamed
from .._files import new_folder
from ..errors import LaAciqError
from ..ops.streaming import (
    COUNT,
    HISTOGRAM_BINS,
    M2,
    M4,
    MAX,
    MIN,
    NONFINITE,
    STATE_SIZE,
    Moments,
    histogram_edges,
    histogram_sums,
)
from ..tags import SINK, UND, canonical
from .second_moments import SecondMoments

SCHEMA = 1
JSON_FILE = "profile.json"
TENSOR_FILE = "profile.safetensors"
SECOND_MOMENTS_FILE = "second_moments.safetensors"

Kind = Literal["input", "key", "value"]


@dataclass(frozen=True)
class SiteStats:
    """Statistics of one place in the model: the input of linear layers, or an attention layer's keys or values (as its
    INT4 cache stores them).

    Attributes:
        kind: "input", "key" or "value".
        layer_kind: last component of the layer's name, for example "down_proj".
        k: elements per token.
        group_size: elements that share a group (k itself for one group per token; the last group may be short).
        moments: [entries, groups], with histogram [entries, groups, 258, 2].
    """

    kind: Kind
    layer_kind: str
    k: int
    group_size: int
    moments: Moments

    @property
    def groups(self) -> int:
        """Groups per token."""
        return -(-self.k // self.group_size)

    @property
    def histogram(self) -> NDArray[np.int64]:
        """int64 [entries, groups, 258, 2]: per bin the number of elements and the bits of their sum."""
        if self.moments.histogram is None:
            raise ValueError("moments: expected statistics with a histogram, got some without")
        return self.moments.histogram

    def tail_sums(self, alpha: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Number and sum of |x| over the elements with |x| > alpha.

        Exact where alpha is an edge of the histogram. Inside a bin the elements are taken as evenly spread about their
        mean, which is off by at most that bin's count and sum. A bin without an upper edge (alpha >= 2^16) counts as
        above alpha.

        Args:
            alpha: clips of at least 0; broadcasts against [entries, groups].

        Returns:
            The number and the sum, float64 [entries, groups] each.

        Raises:
            ValueError: a clip is negative or NaN.
        """
        alpha = np.broadcast_to(np.asarray(alpha, dtype=np.float64), self.moments.shape)
        if not np.all(alpha >= 0):
            raise ValueError(f"alpha: expected clips of at least 0, got {alpha[~(alpha >= 0)][0]}")
        edges = histogram_edges()
        count, total = self.histogram[..., 0].astype(np.float64), histogram_sums(self.histogram)
        bin_ = np.minimum(np.searchsorted(edges, alpha, side="right") - 1, HISTOGRAM_BINS - 1)[..., None]
        beyond = np.arange(HISTOGRAM_BINS) > bin_
        count_above, sum_above = (count * beyond).sum(-1), (total * beyond).sum(-1)

        low, high = edges[bin_[..., 0]], edges[bin_[..., 0] + 1]
        here, here_sum = (np.take_along_axis(a, bin_, axis=-1)[..., 0] for a in (count, total))
        open_ended = np.isinf(high)
        share = np.where(open_ended, 1.0, (high - alpha) / np.where(open_ended, 1.0, high - low))
        mean = np.where(here > 0, here_sum / np.maximum(here, 1.0), low)
        mean_above = np.where(open_ended, np.maximum(mean, alpha), np.clip(mean + (alpha - low) / 2, alpha, high))
        return count_above + share * here, sum_above + share * here * mean_above


@dataclass(frozen=True)
class Profile:
    """Statistics of a model's activations per layer, language and group.

    Attributes:
        entries: ("und", the languages as BCP-47 tags, "sink"). "und" pools the languages; "sink" is the first token of
            every sequence, in any language, which no other entry includes.
        sites: the statistics, by site name.
        layers: for each linear layer the name of the site of its input (layers that read the very same tensor, such as
            q, k and v projections, share one). Each site "cache.<attention layer>.key" and "cache.<attention
            layer>.value" stands for itself.
        metadata: "fingerprint" and "architecture" of the model, "rotation" {"enabled", "seed"} (of inputs),
            "group_size", "seqlen", "ignore" (layers left out), "center", "tokens" {language: tokens read, from the
            start of its text}, "texts" {language: SHA-256 of those token ids}, "versions".
        second_moments: by site of kind "input" the sum of x x^T over every token of every language, sink included,
            float32 [K, K], of inputs as the site's other statistics have them (rotated, less centers); None when they
            were not measured.
        centers: by site of kind "input" the mean input of each entry, float32 [entries, K], before any rotation. The
            site's statistics are then those of inputs less the mean of their language; those of the sink are of the
            inputs as they are. The center of "und" is the mean of the languages' centers. Empty when inputs were
            measured as they are.
    """

    entries: tuple[str, ...]
    sites: dict[str, SiteStats]
    layers: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)
    second_moments: SecondMoments | None = None
    centers: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages, as BCP-47 tags: the entries between "und" and "sink"."""
        return self.entries[1:-1]

    @property
    def rows(self) -> tuple[str, ...]:
        """The old name of `entries`."""
        warn_renamed("Profile.rows", "Profile.entries")
        return self.entries

    @classmethod
    def from_languages(
        cls,
        languages: Mapping[str, Mapping[str, Moments]],
        sink: Mapping[str, Moments],
        sites: Mapping[str, tuple[Kind, int, int]],
        layers: Mapping[str, str],
        metadata: Mapping[str, Any],
        second_moments: SecondMoments | None = None,
        centers: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> "Profile":
        """The profile of statistics by language. Its entry "und" is the union of the languages.

        Args:
            languages: by tag the moments [groups] by site. A site that a language has nothing of (an expert that it
                never reaches) gets an empty entry.
            sink: moments [groups] by site of first tokens.
            sites: (kind, k, group_size) by site.
            layers: the site of each layer.
            metadata: as in `Profile`.
            second_moments: as in `Profile`.
            centers: as in `Profile`.

        Returns:
            The profile.
        """
        stats = {}
        for name, (kind, k, group_size) in sites.items():
            empty = Moments.empty((-(-k // group_size),), histogram=True)
            by_language = [measured.get(name, empty) for measured in languages.values()]
            # `pool` sums in an order that depends on how many there are and on nothing else: a resumed run gives the
            # same bits.
            pooled = _stack(by_language).pool(0) if by_language else empty
            moments = _stack([pooled, *by_language, sink.get(name, empty)])
            stats[name] = SiteStats(kind, name.rpartition(".")[2], k, group_size, moments)
        site_centers = {name: center for name, center in (centers or {}).items() if name in stats}
        return cls((UND, *languages, SINK), stats, dict(layers), dict(metadata), second_moments, site_centers)

    @classmethod
    def merge(cls, *profiles: "Profile") -> "Profile":
        """The profile of all the texts that these profiles of one model are of, taken together.

        Entries of the same language are united, others stand beside each other. Histograms and counts are exact;
        moments do not depend on the order beyond float64 rounding, second moments beyond float32 rounding. The center
        of an entry that several profiles have is the mean of their centers, and its statistics stay those about the
        center of each profile.

        Args:
            profiles: of one model, measured with the same settings.

        Returns:
            One profile.

        Raises:
            LaAciqError: the profiles differ in model, settings or layers, or only some have second moments.
            ValueError: there is no profile.
        """
        if not profiles:
            raise ValueError("profiles: expected at least one to merge, got none")
        first = profiles[0]
        for other in profiles[1:]:
            for key in ("fingerprint", "rotation", "group_size", "seqlen", "ignore", "center"):
                if other.metadata.get(key) != first.metadata.get(key):
                    raise LaAciqError(
                        f"profiles of different {key} cannot be merged: "
                        f"{first.metadata.get(key)} and {other.metadata.get(key)}"
                    )
            if other.layers != first.layers:
                raise LaAciqError("profiles of different layers cannot be merged")
            if (other.second_moments is None) != (first.second_moments is None):
                raise LaAciqError("profiles with and without second moments cannot be merged")
        languages = list(dict.fromkeys(tag for profile in profiles for tag in profile.languages))

        def united(entry: str) -> dict[str, Moments]:
            measured = [profile.entry(entry) for profile in profiles if entry in profile.entries]
            return {name: _stack([by_site[name] for by_site in measured]).pool(0) for name in first.sites}

        centers = {site: _merged_centers(profiles, site, languages) for site in first.centers}
        tokens: dict[str, int] = {}
        for profile in profiles:
            for tag, count in profile.metadata.get("tokens", {}).items():
                tokens[tag] = tokens.get(tag, 0) + count
        hashes = {
            tag: _hash_together([p.metadata["texts"][tag] for p in profiles if tag in p.metadata.get("texts", {})])
            for tag in languages
        }
        second_moments = [profile.second_moments for profile in profiles if profile.second_moments is not None]
        return cls.from_languages(
            {tag: united(tag) for tag in languages},
            united(SINK),
            {name: (site.kind, site.k, site.group_size) for name, site in first.sites.items()},
            first.layers,
            {**first.metadata, "tokens": {tag: tokens.get(tag, 0) for tag in languages}, "texts": hashes},
            functools.reduce(operator.add, second_moments) if second_moments else None,
            centers,
        )

    def entry(self, name: str) -> dict[str, Moments]:
        """The moments of one entry.

        Args:
            name: "und", a language of `languages`, or "sink".

        Returns:
            Moments [groups] by site.

        Raises:
            LaAciqError: there is no such entry.
        """
        if name not in self.entries:
            raise LaAciqError(f"the profile has no entry {name!r}; it has {', '.join(self.entries)}")
        index = self.entries.index(name)
        return {site: stats.moments[index] for site, stats in self.sites.items()}

    def row(self, name: str) -> dict[str, Moments]:
        """The old name of `entry`.

        Args:
            name: as for `entry`.

        Returns:
            What `entry` returns.
        """
        warn_renamed("Profile.row", "Profile.entry")
        return self.entry(name)

    def check_fingerprint(self, fingerprint: str) -> None:
        """Check that the profile was measured on a model.

        Args:
            fingerprint: that of the model (`models.fingerprint`).

        Raises:
            LaAciqError: the profile was measured on another model.
        """
        measured = self.metadata.get("fingerprint")
        if fingerprint != measured:
            raise LaAciqError(
                "the profile was measured on another model: "
                f"its fingerprint is {str(measured)[:12]}, the model's is {fingerprint[:12]}"
            )

    def save(self, folder: str | os.PathLike[str], force: bool = False) -> None:
        """Write the profile's folder, complete or not at all.

        Args:
            folder: the folder.
            force: replace an existing folder that holds a profile and nothing else.

        Raises:
            LaAciqError: the folder exists or cannot be written.
        """
        tensors: dict[str, NDArray[Any]] = {}
        sites = {}
        for name, site in self.sites.items():
            first, last = histogram_window(site.histogram)
            tensors[f"{name}.state"] = np.ascontiguousarray(site.moments.state)
            tensors[f"{name}.histogram"] = np.ascontiguousarray(site.histogram[:, :, first:last])
            sites[name] = {
                "kind": site.kind,
                "layer_kind": site.layer_kind,
                "k": site.k,
                "group_size": site.group_size,
                "bins": [first, last],
            }
        tensors |= {f"{name}.center": np.ascontiguousarray(center) for name, center in self.centers.items()}
        data = save_tensors(tensors)
        description = {
            "format": "la-aciq profile",
            "schema": SCHEMA,
            "written_by": f"la-aciq {__version__}",
            "rows": list(self.entries),
            "metadata": self.metadata,
            "layers": self.layers,
            "sites": sites,
        }
        with new_folder(folder, JSON_FILE, force) as temporary:
            if self.second_moments is not None:
                self.second_moments.save(temporary / SECOND_MOMENTS_FILE)
                description["second_moments"] = {"sha256": _sha256(temporary / SECOND_MOMENTS_FILE)}
            description["checksum"] = _checksum(description, data)
            (temporary / TENSOR_FILE).write_bytes(data)
            (temporary / JSON_FILE).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Profile":
        """Read and check a profile's folder.

        Args:
            folder: the folder that `save` wrote, in this version or an older one.

        Returns:
            The profile; its second moments are read from the file when they are used.

        Raises:
            LaAciqError: a file is missing, edited, cut short or of a newer schema. The message names it.
        """
        path = Path(folder)
        try:
            text = (path / JSON_FILE).read_bytes()
            data = (path / TENSOR_FILE).read_bytes()
        except OSError as error:
            raise LaAciqError(f"{str(path)!r} is not a profile folder: {error.strerror}: {error.filename}") from error
        try:
            description = json.loads(text)
        except ValueError as error:
            raise LaAciqError(f"{path / JSON_FILE} is not JSON ({error}); it was edited or cut short") from error
        if not isinstance(description, dict) or description.get("format") != "la-aciq profile":
            raise LaAciqError(f"{path / JSON_FILE} does not describe a LA-ACIQ profile")
        if description.get("schema") != SCHEMA:
            raise LaAciqError(
                f"{path / JSON_FILE} has schema {description.get('schema')!r}; "
                f"this version of la-aciq reads schema {SCHEMA}"
            )
        if description.pop("checksum", None) != _checksum(description, data):
            raise LaAciqError(
                f"profile {str(path)!r} does not match its checksum: a file was edited or cut short; calibrate again"
            )
        try:
            tensors = load_tensors(data)
            profile = _read(description, tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise LaAciqError(f"profile {str(path)!r} is not consistent: {error}") from error
        if "second_moments" not in description:
            return profile
        file = path / SECOND_MOMENTS_FILE
        try:
            sha256 = _sha256(file)
        except OSError as error:
            raise LaAciqError(f"{str(path)!r} lacks a file of its profile: {error.strerror}: {file}") from error
        if sha256 != description["second_moments"]["sha256"]:
            raise LaAciqError(f"{str(file)!r} was edited or cut short; calibrate again")
        sizes = {name: site.k for name, site in profile.sites.items() if site.kind == "input"}
        return dataclasses.replace(profile, second_moments=SecondMoments.open(file, sizes))


def _stack(moments: Sequence[Moments]) -> Moments:
    return Moments.from_state(
        np.stack([m.state for m in moments]), np.stack([m.histogram for m in moments if m.histogram is not None])
    )


def _merged_centers(profiles: Sequence[Profile], site: str, languages: Sequence[str]) -> NDArray[np.float32]:
    """float32 [entries, K]: each entry's centers weighted by how many inputs they are the mean of."""

    def merged(entry: str) -> NDArray[np.float64] | None:
        places = [(profile, profile.entries.index(entry)) for profile in profiles if entry in profile.entries]
        counts = [float(profile.sites[site].moments.count[index, 0]) for profile, index in places]
        if sum(counts) == 0:
            return None
        centers = np.stack([profile.centers[site][index] for profile, index in places]).astype(np.float64)
        return np.asarray(np.average(centers, axis=0, weights=counts))

    means = {entry: mean for entry in (*languages, SINK) if (mean := merged(entry)) is not None}
    reached = (
        [means[tag] for tag in languages if tag in means] or list(means.values()) or [profiles[0].centers[site][0]]
    )
    pooled = np.stack(reached).mean(axis=0)
    return np.stack([pooled, *(means.get(entry, pooled) for entry in (*languages, SINK))]).astype(np.float32)


def _hash_together(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()


def histogram_window(histogram: NDArray[np.int64]) -> tuple[int, int]:
    """The first bin of int64 [..., 258, 2] that holds anything, and the one after the last."""
    used = np.flatnonzero(histogram[..., 0].reshape(-1, HISTOGRAM_BINS).any(axis=0))
    return (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checksum(description: Mapping[str, Any], data: bytes) -> str:
    canonical_json = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical_json.encode() + hashlib.sha256(data).digest()).hexdigest()


def _read(description: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Profile:
    """The profile of a description and its tensors; ValueError where they do not fit together."""
    entries, sites, layers, metadata = (description[key] for key in ("rows", "sites", "layers", "metadata"))
    expected_ends = isinstance(entries, list) and len(entries) >= 2 and (entries[0], entries[-1]) == (UND, SINK)
    if not expected_ends or len(set(entries)) < len(entries):
        raise ValueError(f"rows = {entries!r}; expected 'und', the languages, and 'sink', each once")
    for tag in entries[1:-1]:
        if canonical(tag) != tag:
            raise ValueError(f"entry {tag!r} is not the canonical BCP-47 tag of a language")
    expected_names = {f"{name}.{part}" for name in sites for part in ("state", "histogram")}
    if metadata.get("center"):
        expected_names |= {f"{name}.center" for name, site in sites.items() if site["kind"] == "input"}
    unexpected = set(tensors) ^ expected_names
    if unexpected:
        raise ValueError(f"tensor {min(unexpected)!r} is missing or belongs to no site")
    unknown = sorted(set(layers.values()) - set(sites))
    if unknown:
        raise ValueError(f"a layer refers to site {unknown[0]!r}, which does not exist")
    stats = {}
    for name, site in sites.items():
        kind, k, group_size, (first, last) = site["kind"], site["k"], site["group_size"], site["bins"]
        if kind not in get_args(Kind) or not 0 < group_size <= k or not 0 <= first <= last <= HISTOGRAM_BINS:
            raise ValueError(
                f"site {name!r} has kind {kind!r}, k {k}, group_size {group_size} and bins {first} to {last}"
            )
        groups = -(-k // group_size)
        state, window = tensors[f"{name}.state"], tensors[f"{name}.histogram"]
        expected: dict[str, tuple[NDArray[Any], tuple[int, ...], str]] = {
            "state": (state, (len(entries), groups, STATE_SIZE), "float64"),
            "histogram": (window, (len(entries), groups, last - first, 2), "int64"),
        }
        for part, (tensor, shape, dtype) in expected.items():
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"tensor '{name}.{part}' is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}"
                )
        histogram = np.zeros((len(entries), groups, HISTOGRAM_BINS, 2), dtype=np.int64)
        histogram[:, :, first:last] = window
        _check_site(name, state, histogram)
        stats[name] = SiteStats(kind, site["layer_kind"], k, group_size, Moments.from_state(state, histogram))
    centers = {name: tensors[f"{name}.center"] for name in sites if f"{name}.center" in tensors}
    for name, center in centers.items():
        if center.shape != (len(entries), stats[name].k) or center.dtype != np.float32 or not np.isfinite(center).all():
            raise ValueError(
                f"tensor '{name}.center' is {center.dtype} {list(center.shape)}; "
                f"expected finite float32 {[len(entries), stats[name].k]}"
            )
    return Profile(tuple(entries), stats, dict(layers), dict(metadata), centers=centers)


def _check_site(name: str, state: NDArray[np.float64], histogram: NDArray[np.int64]) -> None:
    empty = state[..., COUNT] == 0
    extremes = state[..., [MIN, MAX]]
    described = np.isfinite(np.delete(state, [MIN, MAX], axis=-1)).all() and np.isfinite(extremes[~empty]).all()
    if not described or (state[..., [COUNT, M2, M4]] < 0).any() or (state[..., NONFINITE] != 0).any():
        raise ValueError(f"the statistics of site {name!r} are not those of finite data")
    if (histogram < 0).any() or (histogram[..., 0].sum(-1) != state[..., COUNT]).any():
        raise ValueError(f"the histogram of site {name!r} does not add up to its counts")

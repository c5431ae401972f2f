"""What calibration measured, in memory and on disk.

A profile folder holds two files, or three:

    profile.json         what the rows, layers and sites are, the settings they were measured with, and a checksum
    profile.safetensors  per site `<site>.state` float64 [rows, groups, 8] and `<site>.histogram` int64 [rows, groups,
                         bins, 2], the latter cut to the window of bins that hold anything; with centers also
                         `<site>.center` float32 [rows, K] of the inputs of linear layers
    second_moments.safetensors  when they were measured: by site of kind "input" float32 [K (K + 1) / 2], the upper
                         triangle of the sum of x x^T over all tokens, row by row

The checksum covers all files, so an edited or truncated one is refused instead of quietly giving other clips.
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

    kind: "input", "key" or "value".
    layer_kind: last component of the layer's name, for example "down_proj".
    k: elements per token; group_size: elements that share a group (k itself for one group per token; the last group may
        be short).
    moments: per row of the profile and group, shape [rows, groups], with histogram [rows, groups, 258, 2].
    """

    kind: Kind
    layer_kind: str
    k: int
    group_size: int
    moments: Moments

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)

    @property
    def histogram(self) -> NDArray[np.int64]:
        """int64 [rows, groups, 258, 2]."""
        if self.moments.histogram is None:
            raise ValueError("moments: expected statistics with a histogram, got some without")
        return self.moments.histogram

    def tail_sums(self, alpha: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Number and sum of |x| over the elements with |x| > alpha, float64 [rows, groups] each.

        alpha broadcasts against [rows, groups]. Exact where alpha is an edge of the histogram. Inside a bin the
        elements are taken as evenly spread about their own mean, which is off by at most that bin's count and sum. A
        bin without an upper edge (alpha >= 2^16) counts as above alpha.
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

    rows: ("und", the languages as BCP-47 tags, "sink"). "und" pools the languages and says nothing of its own; "sink"
        is the first token of every sequence, in any language, and is in no other row.
    sites: what was measured, by site name. layers: for each linear layer the name of the site of its input (layers that
        read the very same tensor, such as q, k and v projections, share one), and each site "cache.<attention
        layer>.key" and "cache.<attention layer>.value" stands for itself.
    metadata: "fingerprint" and "architecture" of the model, "rotation" {"enabled", "seed"} (of inputs),
        "group_size", "seqlen", "ignore" (layers left out), "tokens" {language: tokens used, from the start of its
        text}, "texts" {language: SHA-256 of those token ids}, "versions".
    second_moments: by site of kind "input" the sum of x x^T over every token of every language, sink included, float32
        [K, K], of inputs as the site's other statistics have them (rotated, less centers); None when they were not
        measured.
    centers: by site of kind "input" the mean input of each row, float32 [rows, K], before any rotation; the site's
        statistics are then those of inputs less the mean of their language, but for the sink's, which are of the inputs
        as they are. The pooled row's center is the mean of the languages'. Empty when inputs were measured as they are.
    """

    rows: tuple[str, ...]
    sites: dict[str, SiteStats]
    layers: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)
    second_moments: SecondMoments | None = None
    centers: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages with a row of their own."""
        return self.rows[1:-1]

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
        """A profile of each language's and the sink's moments [groups] by site; `sites` gives (kind, k, group_size).

        The pooled row is their union. A site that a language has nothing of (an expert it never reaches) gets an empty
        row.
        """
        stats = {}
        for name, (kind, k, group_size) in sites.items():
            empty = Moments.empty((-(-k // group_size),), histogram=True)
            own = [measured.get(name, empty) for measured in languages.values()]
            # `pool` sums in an order that depends on how many there are and on nothing else: a resumed run gives the
            # same bits.
            pooled = _stack(own).pool(0) if own else empty
            moments = _stack([pooled, *own, sink.get(name, empty)])
            stats[name] = SiteStats(kind, name.rpartition(".")[2], k, group_size, moments)
        own_centers = {name: center for name, center in (centers or {}).items() if name in stats}
        return cls((UND, *languages, SINK), stats, dict(layers), dict(metadata), second_moments, own_centers)

    @classmethod
    def merge(cls, *profiles: "Profile") -> "Profile":
        """The profile of all the texts that these profiles of one model are of, taken together.

        For parts measured by several processes: rows of the same language are united, others stand beside each other.
        Histograms and counts are exact; moments do not depend on the order beyond float64 rounding, second moments
        beyond float32 rounding. The center of a row that several profiles have is the mean of theirs, and its
        statistics stay those about each one's own. Raises `LaAciqError` when the profiles differ in model, settings or
        layers, or only some have second moments.
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

        def united(row: str) -> dict[str, Moments]:
            parts = [profile.row(row) for profile in profiles if row in profile.rows]
            return {name: _stack([part[name] for part in parts]).pool(0) for name in first.sites}

        centers = {site: _merged_centers(profiles, site, languages) for site in first.centers}
        tokens: dict[str, int] = {}
        for profile in profiles:
            for tag, count in profile.metadata.get("tokens", {}).items():
                tokens[tag] = tokens.get(tag, 0) + count
        hashes = {
            tag: _hash_together([p.metadata["texts"][tag] for p in profiles if tag in p.metadata.get("texts", {})])
            for tag in languages
        }
        products = [profile.second_moments for profile in profiles if profile.second_moments is not None]
        return cls.from_languages(
            {tag: united(tag) for tag in languages},
            united(SINK),
            {name: (site.kind, site.k, site.group_size) for name, site in first.sites.items()},
            first.layers,
            {**first.metadata, "tokens": {tag: tokens.get(tag, 0) for tag in languages}, "texts": hashes},
            functools.reduce(operator.add, products) if products else None,
            centers,
        )

    def row(self, name: str) -> dict[str, Moments]:
        """Moments [groups] by site of one row: "und", a language of `languages`, or "sink"."""
        if name not in self.rows:
            raise LaAciqError(f"the profile has no row {name!r}; it has {', '.join(self.rows)}")
        index = self.rows.index(name)
        return {site: stats.moments[index] for site, stats in self.sites.items()}

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises `LaAciqError` when this is the fingerprint of another model than the profile's."""
        own = self.metadata.get("fingerprint")
        if fingerprint != own:
            raise LaAciqError(
                "the profile was measured on another model: "
                f"its fingerprint is {str(own)[:12]}, the model's is {fingerprint[:12]}"
            )

    def save(self, folder: str | os.PathLike[str], force: bool = False) -> None:
        """Write the folder, complete or not at all. An existing one is refused unless `force` and it holds a
        profile."""
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
            "rows": list(self.rows),
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
        """Read and check a profile folder. Raises `LaAciqError`, naming the file, for anything that is not as saved."""
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
            found = _sha256(file)
        except OSError as error:
            raise LaAciqError(f"{str(path)!r} lacks a file of its profile: {error.strerror}: {file}") from error
        if found != description["second_moments"]["sha256"]:
            raise LaAciqError(f"{str(file)!r} was edited or cut short; calibrate again")
        sizes = {name: site.k for name, site in profile.sites.items() if site.kind == "input"}
        return dataclasses.replace(profile, second_moments=SecondMoments.open(file, sizes))


def _stack(moments: Sequence[Moments]) -> Moments:
    return Moments.from_state(
        np.stack([m.state for m in moments]), np.stack([m.histogram for m in moments if m.histogram is not None])
    )


def _merged_centers(profiles: Sequence[Profile], site: str, languages: Sequence[str]) -> NDArray[np.float32]:
    """float32 [rows, K]: each row's centers weighted by how many inputs they are the mean of."""

    def merged(row: str) -> NDArray[np.float64] | None:
        places = [(profile, profile.rows.index(row)) for profile in profiles if row in profile.rows]
        counts = [float(profile.sites[site].moments.count[index, 0]) for profile, index in places]
        if sum(counts) == 0:
            return None
        own = np.stack([profile.centers[site][index] for profile, index in places]).astype(np.float64)
        return np.asarray(np.average(own, axis=0, weights=counts))

    means = {row: mean for row in (*languages, SINK) if (mean := merged(row)) is not None}
    reached = (
        [means[tag] for tag in languages if tag in means] or list(means.values()) or [profiles[0].centers[site][0]]
    )
    pooled = np.stack(reached).mean(axis=0)
    return np.stack([pooled, *(means.get(row, pooled) for row in (*languages, SINK))]).astype(np.float32)


def _hash_together(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()


def histogram_window(histogram: NDArray[np.int64]) -> tuple[int, int]:
    """Of int64 [..., 258, 2] the first bin that holds anything, and the one after the last."""
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
    rows, sites, layers, metadata = (description[key] for key in ("rows", "sites", "layers", "metadata"))
    if not isinstance(rows, list) or len(rows) < 2 or (rows[0], rows[-1]) != (UND, SINK) or len(set(rows)) < len(rows):
        raise ValueError(f"rows = {rows!r}; expected 'und', the languages, and 'sink', each once")
    for tag in rows[1:-1]:
        if canonical(tag) != tag:
            raise ValueError(f"row {tag!r} is not a canonical BCP-47 tag")
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
            "state": (state, (len(rows), groups, STATE_SIZE), "float64"),
            "histogram": (window, (len(rows), groups, last - first, 2), "int64"),
        }
        for part, (tensor, shape, dtype) in expected.items():
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"tensor '{name}.{part}' is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}"
                )
        histogram = np.zeros((len(rows), groups, HISTOGRAM_BINS, 2), dtype=np.int64)
        histogram[:, :, first:last] = window
        _check_site(name, state, histogram)
        stats[name] = SiteStats(kind, site["layer_kind"], k, group_size, Moments.from_state(state, histogram))
    centers = {name: tensors[f"{name}.center"] for name in sites if f"{name}.center" in tensors}
    for name, center in centers.items():
        if center.shape != (len(rows), stats[name].k) or center.dtype != np.float32 or not np.isfinite(center).all():
            raise ValueError(
                f"tensor '{name}.center' is {center.dtype} {list(center.shape)}; "
                f"expected finite float32 {[len(rows), stats[name].k]}"
            )
    return Profile(tuple(rows), stats, dict(layers), dict(metadata), centers=centers)


def _check_site(name: str, state: NDArray[np.float64], histogram: NDArray[np.int64]) -> None:
    empty = state[..., COUNT] == 0
    extremes = state[..., [MIN, MAX]]
    described = np.isfinite(np.delete(state, [MIN, MAX], axis=-1)).all() and np.isfinite(extremes[~empty]).all()
    if not described or (state[..., [COUNT, M2, M4]] < 0).any() or (state[..., NONFINITE] != 0).any():
        raise ValueError(f"the statistics of site {name!r} are not those of finite data")
    if (histogram < 0).any() or (histogram[..., 0].sum(-1) != state[..., COUNT]).any():
        raise ValueError(f"the histogram of site {name!r} does not add up to its counts")

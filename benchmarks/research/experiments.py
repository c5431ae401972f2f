"""What other ways of choosing clips would change on the embedded model, each against the way it would replace.

    python -m benchmarks.research.experiments [--only NAME ...] [--again] [--output FILE]

The result file has a row for each way, as `benchmarks.research.evaluation` has, with fewer languages and less text. It
is written after every row, so that an interrupted run continues. Most rows round activations only: weights stay in
bfloat16, and `Simulated` rounds the activations to any number of bits with any clip. The rows of the package's kernels
and those of weights use the package. Measurements are kept in build/experiments.
"""

import copy
import dataclasses
import datetime
import functools
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import la_aciq
from la_aciq import clipping, embedded, ops
from la_aciq.clipping import adapt
from la_aciq.evaluation.loss import segment_sums, token_losses
from la_aciq.models import linear_weight
from la_aciq.nn import QuantConfig, quantize_model
from la_aciq.nn.config import ABSMAX_SHARE
from la_aciq.ops import rotation
from la_aciq.profile import Profile
from la_aciq.profile.second_moments import SecondMoments
from la_aciq.tags import SINK

from .evaluation import CALIBRATION, SEQLEN, Bench, chosen, command_line, comparison, in_words, summary, write

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments-embedded.json"
LANGUAGES = ("en", "de", "ru", "ar", "th", "zh", "sw", "ko")
TOKENS = 2048
# For a language that was left out of calibration: one that a person might take for it.
NEIGHBOR = {"en": "de", "de": "en", "ru": "de", "ar": "ru", "th": "zh", "zh": "ko", "sw": "en", "ko": "zh"}
GROUP = 64
PIECE = 256  # tokens of calibration text that errors are kept apart by
SHARES = 2.0 ** np.linspace(-1, 1, 13)  # clips tried, as shares of the pooled one of least squared error
ERRORS = ("squared", "clipped", "output", "value", "token")

Losses = dict[str, np.ndarray]


@dataclass(frozen=True)
class Entry:
    """How a text's inputs are rounded, by site: clips float32 [groups] of its tokens and of its first token, and the
    center float32 [K], in the rotated basis, of all but the first.

    absmax: the clip is this share of the group's largest magnitude. cap: but no more than this many times `clips`.
    """

    clips: dict[str, Tensor]
    first: dict[str, Tensor]
    centers: dict[str, Tensor]
    bits: int = 4
    absmax: float | None = None
    cap: float | None = None


def rounded(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """The mid-rise codebook's value nearest each x; clip [..., 1] broadcasts against x."""
    step = clip * (2 / (2**bits - 1))
    half = 2 ** (bits - 1)
    return (x / step).floor_().clamp_(-half, half - 1).add_(0.5).mul_(step)


@dataclass
class Watched:
    """Of a window: the sum of the inputs [K] (rotated, not centered), and by group the number of values, of those above
    the clip, and the latter's sum of magnitudes [groups, 3].
    """

    total: Tensor
    tails: Tensor


class Simulated:
    """The model in bfloat16 with its inputs rounded as `entry` says, for one text at a time."""

    def __init__(self, model: nn.Module, sites: dict[str, str], seed: int) -> None:
        self.model = copy.deepcopy(model)
        self.sites = sites
        self.entry: Entry | None = None
        self.watched: dict[str, Watched] | None = None
        self._signs: dict[int, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        self._seed = seed
        for name, site in sites.items():
            layer = self.model.get_submodule(name)
            layer.weight.data = self.rotated(layer.weight.data.float()).to(layer.weight.dtype)
            layer.register_forward_pre_hook(functools.partial(self._round, site))
            layer.register_forward_hook(functools.partial(self._add, site))

    def rotated(self, x: Tensor) -> Tensor:
        k = x.shape[-1]
        if k not in self._signs:
            self._signs[k] = torch.from_numpy(rotation.signs(k, self._seed))
        return ops.rotate(x, self._signs[k])

    def losses(self, windows: dict[str, Any], entries: dict[str, Entry]) -> Losses:
        losses = {}
        for tag, tag_windows in windows.items():
            self.entry = entries[tag]
            losses[tag] = segment_sums(token_losses(self.model, tag_windows, tag), tag_windows)
        return losses

    def _round(self, site: str, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, entry = args[0], self.entry
        if self._last is None or self._last[0] is not x:
            values = self.rotated(x[0].float())
            centered = values.clone()
            centered[1:] -= entry.centers[site]
            groups = centered.view(len(centered), -1, GROUP)
            clip = entry.clips[site].repeat(len(groups), 1)
            clip[0] = entry.first[site]
            if entry.absmax is not None:
                most = entry.absmax * groups.abs().amax(-1)
                if entry.cap is not None:
                    most[1:] = most[1:].minimum(entry.cap * clip[1:])
                clip = most.clamp_(min=1e-30)
            if self.watched is not None:
                self._watch(site, values[1:], groups[1:], clip[1:])
            codebook_values = rounded(groups, clip.unsqueeze(-1), entry.bits).view(x.shape).to(x.dtype)
            self._last = x, codebook_values
        return (self._last[1],)

    def _add(self, site: str, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """The center's share of the output, of all tokens but the first."""
        y[0, 1:] += (layer.weight.float() @ self.entry.centers[site]).to(y.dtype)
        return y

    def _watch(self, site: str, values: Tensor, groups: Tensor, clip: Tensor) -> None:
        size = groups.abs()
        above = size > clip.unsqueeze(-1)
        counts = torch.full((groups.shape[1],), float(len(groups) * GROUP))
        tails = torch.stack([counts, above.sum((0, 2)).float(), (size * above).sum((0, 2))], dim=-1).double()
        self.watched[site] = Watched(values.sum(0), tails)


class Lab:
    """The model and the texts, and what is measured of them on demand."""

    def __init__(self) -> None:
        folder = ROOT / "build" / "experiments"
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.bench = Bench(LANGUAGES, TOKENS, folder)
        self.alone = {tag: self._calibrated(tag) for tag in LANGUAGES}
        first = self.alone[LANGUAGES[0]]
        self.sites = {name: site for name, site in first.layers.items() if first.sites[site].kind == "input"}
        self.seed = int(first.metadata["rotation"]["seed"])
        self.profile = self.merged(LANGUAGES)
        self.followed: dict[tuple[str, bool], tuple[Entry, dict[str, Tensor]]] = {}  # of `follow`

    def _calibrated(self, tag: str) -> Profile:
        """A language's own profile, with its second moments."""
        folder = self.folder / f"profile-{tag}"
        if not folder.exists():
            print(f"calibrating: {tag}", flush=True)
            texts = {tag: self.bench.texts[tag]}
            la_aciq.calibrate(self.bench.model, texts, tokens=CALIBRATION, progress=False).save(folder)
        return Profile.load(folder)

    def merged(self, tags: Iterable[str]) -> Profile:
        """The profile of these languages, without second moments."""
        return Profile.merge(*(dataclasses.replace(self.alone[tag], second_moments=None) for tag in tags))

    @functools.cached_property
    def simulated(self) -> Simulated:
        return Simulated(self.bench.model, self.sites, self.seed)

    def run(self, entries: dict[str, Entry]) -> Losses:
        return self.simulated.losses(self.bench.windows, entries)

    def table(self, profile: Profile, bits: int = 4, **options: Any) -> clipping.ClipTable:
        """Clips for inputs less their own language's center, the pooled entry's too."""
        return clipping.table(dataclasses.replace(profile, centers={}), bits=bits, **options)

    def center(self, profile: Profile, tag: str) -> dict[str, Tensor]:
        """The mean input of an entry by site, rotated."""
        place = profile.entries.index(tag)
        return {site: self.simulated.rotated(torch.from_numpy(c[place])) for site, c in profile.centers.items()}

    def entry(
        self, profile: Profile, clips: clipping.ClipTable, tag: str, center: str | None = None, **how: Any
    ) -> Entry:
        """The clips of an entry of the table, with the centers of the same entry or of another."""
        place, sink = profile.entries.index(tag), profile.entries.index(SINK)
        clips_by_site = {site: torch.from_numpy(clips.clips[site]) for site in profile.centers}
        return Entry(
            {site: table[place] for site, table in clips_by_site.items()},
            {site: table[sink] for site, table in clips_by_site.items()},
            self.center(profile, center or tag),
            **how,
        )

    def entries(self, clips: clipping.ClipTable, **how: Any) -> dict[str, Entry]:
        """Each language with its own entry of a table of all languages, and its own center."""
        return {tag: self.entry(self.profile, clips, tag, **how) for tag in LANGUAGES}

    @functools.cached_property
    def by_language(self) -> dict[str, Entry]:
        """Clips of least squared error by language, centers by language."""
        return self.entries(self.table(self.profile))

    @functools.cached_property
    def pooled(self) -> dict[str, Entry]:
        """The same clips for all languages, centers by language."""
        return self.entries(self.table(self.profile, sharing="pooled"))

    @functools.cached_property
    def errors(self) -> dict[str, np.ndarray]:
        """`measured`, kept in a file."""
        file = self.folder / "errors.npz"
        if not file.exists():
            np.savez(file, **measured(self))
        return dict(np.load(file))

    def chosen(self, error_of: Callable[[dict[str, np.ndarray]], np.ndarray], pieces: int | None = None) -> np.ndarray:
        """The log2 share of the pooled clip with the least of an error, by language and group: float64 [languages,
        groups of all sites].

        error_of: makes errors [..., shares] of `errors`' arrays [languages, pieces, groups, shares], by name. pieces:
        how many of calibration's to take, None for all.
        """
        total = error_of({name: self.errors[name][:, :pieces].sum(1) for name in ERRORS})
        return least(total)

    def with_shares(self, shares: np.ndarray) -> dict[str, Entry]:
        """The pooled clips times 2^shares [languages, groups of all sites]."""
        entries = {}
        for place, tag in enumerate(LANGUAGES):
            entry, start, clips = self.pooled[tag], 0, {}
            for site, clip in entry.clips.items():
                factor = torch.from_numpy(2.0 ** shares[place, start : start + len(clip)]).float()
                clips[site], start = clip * factor, start + len(clip)
            entries[tag] = dataclasses.replace(entry, clips=clips)
        return entries

    def early_centers(self, weight: Callable[[np.ndarray, np.ndarray], float]) -> dict[str, Entry]:
        """Clips by language, with centers of the first PIECE tokens drawn toward the pooled ones.

        weight: the pooled center's share, of the squared sampling error of a language's mean and its squared distance
        to the pooled one.
        """
        entries = {}
        sites = list(self.by_language[LANGUAGES[0]].centers)
        for place, tag in enumerate(LANGUAGES):
            centers = {}
            for site in sites:
                pieces = self.errors[f"mean {site}"]
                pooled = pieces[:, 0].mean(0)
                noise = pieces[place].var(0, ddof=1).sum()
                share = weight(noise, ((pieces[place, 0] - pooled) ** 2).sum())
                centers[site] = torch.from_numpy((1 - share) * pieces[place, 0] + share * pooled).float()
            entries[tag] = dataclasses.replace(self.by_language[tag], centers=centers)
        return entries


def least(errors: np.ndarray) -> np.ndarray:
    """log2 of the share with the least error [..., shares]: the vertex of the parabola through the best and its
    neighbors, in logarithms.
    """
    logs = np.log2(SHARES)
    best = errors.argmin(-1).clip(1, len(SHARES) - 2)
    left, at, right = (np.take_along_axis(errors, (best + d)[..., None], -1)[..., 0] for d in (-1, 0, 1))
    bend = left - 2 * at + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1), 0).clip(-1, 1)
    return logs[best] + shift * (logs[1] - logs[0])


def measured(lab: Lab) -> dict[str, np.ndarray]:
    """What each clip of SHARES costs on the calibration text, by ERRORS: float64 [languages, pieces, groups of all
    sites, shares]. And the mean inputs "mean <site>" [languages, pieces, K], rotated. First tokens are left out.

    With e the error of a token's group: "squared" |e|^2; "clipped" the part of it beyond the clip; "output" e^T G e, G
    the group's block of V^T V over the layers with weight V that read it; and with g the loss's gradient for the
    group's values, "value" sum g_i^2 e_i^2 and "token" (g e)^2: the loss's second-order change with the Fisher
    information in place of the Hessian, of values and of groups.
    """
    model, simulated = lab.bench.model, lab.simulated
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    base = lab.pooled[LANGUAGES[0]].clips
    places, start = {}, 0
    for site, clip in base.items():
        places[site] = slice(start, start + len(clip))
        start += len(clip)
    grams: dict[str, Tensor] = {}
    for name, site in lab.sites.items():
        v = simulated.rotated(linear_weight(model.get_submodule(name)).float())
        v = v.view(len(v), -1, GROUP).transpose(0, 1)
        grams[site] = grams.get(site, 0) + v.transpose(1, 2) @ v
    pieces = CALIBRATION // PIECE
    costs = {name: np.zeros((len(LANGUAGES), pieces, start, len(SHARES))) for name in ERRORS}
    means: dict[str, np.ndarray] = {}

    def read(site: str, language: int, window: int, x: Tensor, gradient: Tensor) -> None:
        values, g = (simulated.rotated(a[0, 1:].float()) for a in (x, gradient))
        mean = means.setdefault(f"mean {site}", np.zeros((len(LANGUAGES), pieces, values.shape[1])))
        centered = values - lab.by_language[LANGUAGES[language]].centers[site]
        for i, (v, c, gradients) in enumerate(zip(*(a.split(PIECE) for a in (values, centered, g)), strict=True)):
            piece = window * (SEQLEN // PIECE) + i
            mean[language, piece] = v.mean(0).numpy()
            c, gradients = (a.reshape(len(a), -1, GROUP) for a in (c, gradients))
            for j, share in enumerate(SHARES):
                clip = (base[site] * float(share)).unsqueeze(-1)
                e = rounded(c, clip, 4) - c
                square = e.square()
                through = torch.bmm(e.transpose(0, 1), grams[site]).transpose(0, 1)
                each = (
                    square,
                    (c.abs() - clip).clamp_(min=0).square_(),
                    through.mul_(e),
                    square * gradients.square(),
                    (e * gradients).sum(-1, keepdim=True).square_(),
                )
                for name, cost in zip(ERRORS, each, strict=True):
                    costs[name][language, piece, places[site], j] = cost.sum((0, 2)).double().numpy()

    for language, tag in enumerate(LANGUAGES):
        print(f"errors: {tag}", flush=True)
        for number, window in enumerate(lab.bench.texts[tag].windows(tag, tokens=CALIBRATION, seqlen=SEQLEN)):
            with watching(model, lab.sites, functools.partial(read, language=language, window=number)):
                ids = torch.from_numpy(window.ids)
                embedded_ids = model.get_input_embeddings()(ids[None]).requires_grad_()
                logits = model(inputs_embeds=embedded_ids, use_cache=False).logits[0]
                nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum").backward()
    return costs | means


@contextmanager
def watching(model: nn.Module, sites: dict[str, str], read: Callable[..., None]) -> Iterator[None]:
    """Inside, `read` is called with each site, its input x and, as `gradient`, the loss's derivative by it."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], site: str) -> None:
        x = args[0]
        x.register_hook(lambda gradient: read(site, x=x.detach(), gradient=gradient))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(functools.partial(hook, site=site))
        for name, site in sites.items()
        if name == site
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Experiment:
    """A row: what it answers, what it is compared with, and how its losses come about."""

    question: str
    make: Callable[[Lab], Losses]
    against: tuple[str, ...] = ()


def sampling_share(noise: np.ndarray, distance: np.ndarray) -> float:
    """The share of the pooled mean with the least expected squared error (James and Stein 1961)."""
    return float(min(noise / distance, 1.0))


def shrunk(lab: Lab, pieces: int | None) -> dict[str, Entry]:
    """Each clip drawn toward the pooled one by its sampling variance's share of its whole variance (in logarithms)."""
    each = np.stack([least(lab.errors["squared"][:, i]) for i in range(CALIBRATION // PIECE)])
    shares = lab.chosen(lambda e: e["squared"], pieces)
    noise = each.var(0, ddof=1).mean(0) / (pieces or len(each))  # by group
    between = np.maximum(shares.var(0, ddof=1) - noise, 0)
    kept = between / np.maximum(between + noise, 1e-30)
    pooled = shares.mean(0)
    print(f"clips by language keep {kept.mean():.2f} of their distance to the pooled ones", flush=True)
    return lab.with_shares(pooled + kept * (shares - pooled))


def left_out(lab: Lab, how: str, absmax: float | None = None, english: bool = False) -> Losses:
    """Each language served by a model that was calibrated on the others, or on English alone.

    how: which entry serves the language. "und": the pooled entry. "neighbor": the entry of the language in NEIGHBOR.
    "clips": the pooled entry with clips that followed the text served before. "centers": the pooled entry with the mean
    inputs of the text served before.
    """
    losses = {}
    for tag in LANGUAGES:
        profile = without(lab, tag, english)
        entry = lab.entry(profile, clipping.table(profile), "und")
        if how == "neighbor":
            entry = lab.entry(profile, lab.table(profile), NEIGHBOR[tag])
        elif how == "clips":
            entry = follow(lab, tag, english)[0]
        elif how == "centers":
            entry = dataclasses.replace(
                lab.entry(profile, lab.table(profile), "und"), centers=follow(lab, tag, english)[1]
            )
        entry = dataclasses.replace(entry, absmax=absmax)
        losses |= lab.simulated.losses({tag: lab.bench.windows[tag]}, {tag: entry})
    return losses


def without(lab: Lab, tag: str, english: bool) -> Profile:
    """The profile of the other languages, or of English alone."""
    return lab.merged(("en",) if english else tuple(other for other in LANGUAGES if other != tag))


def follow(lab: Lab, tag: str, english: bool) -> tuple[Entry, dict[str, Tensor]]:
    """The entry and the mean inputs after serving text of a language under the pooled entry.

    `clipping.adapt` moves the clips of the entry window by window. The text is used neither in calibration nor in
    evaluation.

    The balance of the clips is that of the calibration data about the languages' own centers.
    """
    if (tag, english) in lab.followed:
        return lab.followed[tag, english]
    profile = without(lab, tag, english)
    entry, within = (lab.entry(profile, table, "und") for table in (clipping.table(profile), lab.table(profile)))
    now = {}
    for site, clip in entry.clips.items():
        clips = within.clips[site].double().numpy()[None]
        stats = profile.sites[site]
        clipped, total = (a[:1] for a in stats.tail_sums(np.broadcast_to(clips, stats.moments.shape)))
        sums = np.stack([stats.moments.count[:1], clipped, total], axis=-1)
        wide = clip.double().numpy()[None]
        now[site] = dataclasses.replace(adapt.start(clips, sums), clips=wide, calibrated=wide.copy())
    simulated = lab.simulated
    totals = {site: torch.zeros_like(center) for site, center in entry.centers.items()}
    tokens = 0
    for window in lab.bench.texts[tag].windows(tag, tokens=TOKENS, seqlen=SEQLEN, skip=CALIBRATION + TOKENS):
        simulated.entry, simulated.watched = entry, {}
        token_losses(simulated.model, [window], tag)
        for site, watched in simulated.watched.items():
            now[site] = adapt.update(now[site], watched.tails.numpy()[None])
            totals[site] += watched.total
        tokens += len(window.ids) - 1
        entry = dataclasses.replace(
            entry, clips={site: torch.from_numpy(a.clips[0]).float() for site, a in now.items()}
        )
    simulated.watched = None
    lab.followed[tag, english] = entry, {site: total / tokens for site, total in totals.items()}
    return lab.followed[tag, english]


def capped(lab: Lab, entries: dict[str, Entry], cap: float | None) -> Losses:
    return lab.run({tag: dataclasses.replace(entry, absmax=ABSMAX_SHARE, cap=cap) for tag, entry in entries.items()})


def pooled_centers(lab: Lab, bits: int) -> Losses:
    clips = clipping.table(lab.profile, bits=bits, sharing="pooled")
    return lab.run({tag: lab.entry(lab.profile, clips, tag, center="und", bits=bits) for tag in LANGUAGES})


def package_losses(lab: Lab, config: QuantConfig) -> Losses:
    """The package's own quantized model, with the profile of all languages."""
    return lab.bench.losses(quantize_model(lab.bench.model, lab.profile, config, progress=False))


def weighted(lab: Lab, weights: dict[str, float]) -> nn.Module:
    """Weights rounded with feedback on second moments in which each language has a weight, centers by language."""
    total: dict[str, np.ndarray] = {}
    for tag, weight in weights.items():
        for site, products in (lab.alone[tag].second_moments or {}).items():
            total[site] = total.get(site, 0) + np.float32(weight) * products
    profile = dataclasses.replace(lab.profile, second_moments=SecondMoments.of(total))
    return quantize_model(lab.bench.model, profile, QuantConfig(activations=16), progress=False).eval()


def by_harm(lab: Lab) -> Losses:
    """Languages weigh in proportion to what equal weights cost each on the calibration text, in bits per byte: one step
    of the multiplicative update for the minimax problem.
    """
    text = {tag: text.windows(tag, tokens=CALIBRATION, seqlen=SEQLEN) for tag, text in lab.bench.texts.items()}
    equal = weighted(lab, dict.fromkeys(LANGUAGES, 1.0))
    harm = {}
    for tag, windows in text.items():
        before, after = (np.concatenate(token_losses(m, windows, tag)).sum() for m in (lab.bench.model, equal))
        harm[tag] = max(float(after - before) / sum(window.byte_counts.sum() for window in windows), 0.0)
    mean = float(np.mean(list(harm.values())))
    shares = {tag: value / mean for tag, value in harm.items()}
    print("weights of the languages:", {tag: round(float(share), 2) for tag, share in shares.items()}, flush=True)
    return lab.bench.losses(weighted(lab, shares))


def experiments() -> dict[str, Experiment]:
    """Every row by name, in the order of the table."""
    table: dict[str, Experiment] = {}
    question = ""

    def add(name: str, make: Callable[[Lab], Losses], *against: str) -> None:
        table[name] = Experiment(question, make, against)

    pooled, by_language, absmax = "clips pooled", "clips by language", "absmax per group"
    question = "what is compared below: centers by language"
    add("centers and clips pooled", lambda lab: pooled_centers(lab, 4))
    add(pooled, lambda lab: lab.run(lab.pooled), "centers and clips pooled")
    add(by_language, lambda lab: lab.run(lab.by_language), pooled)
    add(absmax, lambda lab: capped(lab, lab.by_language, None), by_language)
    static = QuantConfig(weights=16, clip="static", center=True)
    add("clips by language, the package's kernels", lambda lab: package_losses(lab, static), by_language)

    question = "clips of least error of the output, or of the loss"
    for name, of in (("output error", "output"), ("Fisher by value", "value"), ("Fisher by token", "token")):
        add(
            f"{name}, by language",
            lambda lab, of=of: lab.run(lab.with_shares(lab.chosen(lambda e: e[of]))),
            by_language,
        )

        def together(lab: Lab, of: str = of) -> Losses:
            shares = lab.chosen(lambda e: e[of].sum(0, keepdims=True))
            return lab.run(lab.with_shares(shares.repeat(len(LANGUAGES), 0)))

        add(f"{name}, pooled", together, pooled)
        table[f"{name}, by language"] = dataclasses.replace(
            table[f"{name}, by language"], against=(by_language, f"{name}, pooled")
        )

    question = "a penalty on what is clipped, or a discount"
    for times, extra in (("half", -0.5), ("twice", 1), ("five times", 4)):
        add(
            f"clipped part counted {times}",
            lambda lab, extra=extra: lab.run(
                lab.with_shares(lab.chosen(lambda e: e["squared"] + extra * e["clipped"]))
            ),
            by_language,
        )

    question = "shrinkage toward the pooled clip and center, by sample size"
    add("clips shrunk", lambda lab: lab.run(shrunk(lab, None)), by_language)
    early = f"clips of {PIECE} tokens"
    add(early, lambda lab: lab.run(lab.with_shares(lab.chosen(lambda e: e["squared"], 1))), by_language, pooled)
    add(f"{early}, shrunk", lambda lab: lab.run(shrunk(lab, 1)), early)
    centers = f"centers of {PIECE} tokens"
    add(centers, lambda lab: lab.run(lab.early_centers(lambda noise, distance: 0.0)), by_language)
    add(f"{centers}, shrunk", lambda lab: lab.run(lab.early_centers(sampling_share)), centers)

    question = "minimax over the languages"
    add(
        "clips pooled, minimax",
        lambda lab: lab.run(lab.entries(lab.table(lab.profile, sharing="pooled", language_objective="minimax"))),
        pooled,
    )
    equal = "W4A16, languages weigh the same"
    add(equal, lambda lab: lab.bench.losses(weighted(lab, dict.fromkeys(LANGUAGES, 1.0))))
    add("W4A16, languages weigh as they lose", by_harm, equal)

    for english, short, heading in (
        (False, "left out", "each language left out of calibration"),
        (True, "English only", "calibrated on English alone"),
    ):
        question = heading
        und = f"{short}, as und"
        add(und, lambda lab, e=english: left_out(lab, "und", english=e), by_language)
        if not english:
            add(f"{short}, a neighbour's row", lambda lab: left_out(lab, "neighbor"), und)
        add(f"{short}, clips adapted", lambda lab, e=english: left_out(lab, "clips", english=e), und)
        add(f"{short}, centers followed", lambda lab, e=english: left_out(lab, "centers", english=e), und, by_language)
        und = f"{short}, absmax, as und"
        add(und, lambda lab, e=english: left_out(lab, "und", ABSMAX_SHARE, english=e), absmax)
        add(
            f"{short}, absmax, centers followed",
            lambda lab, e=english: left_out(lab, "centers", ABSMAX_SHARE, english=e),
            und,
            absmax,
        )

    question = "INT3"
    add("INT3, centers and clips pooled", lambda lab: pooled_centers(lab, 3))
    add(
        "INT3, clips pooled",
        lambda lab: lab.run(lab.entries(lab.table(lab.profile, bits=3, sharing="pooled"), bits=3)),
        "INT3, centers and clips pooled",
    )
    add(
        "INT3, clips by language",
        lambda lab: lab.run(lab.entries(lab.table(lab.profile, bits=3), bits=3)),
        "INT3, clips pooled",
    )

    question = "absmax per group, capped by the static clip"
    add("absmax, at most 1.25 x the language's clip", lambda lab: capped(lab, lab.by_language, 1.25), absmax)
    add("absmax, at most 1.25 x the pooled clip", lambda lab: capped(lab, lab.pooled, 1.25), absmax)
    return table


def results(bench: Bench, rows: dict[str, dict[str, Any]], table: dict[str, Experiment]) -> dict[str, Any]:
    """The file's contents: rows and paired differences, in the table's order."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "la_aciq": la_aciq.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "settings": {
            "model": embedded.MODEL_NAME,
            "languages": list(LANGUAGES),
            "tokens": TOKENS,
            "calibration_tokens": CALIBRATION,
            "seqlen": SEQLEN,
            "group_size": GROUP,
        },
        "configurations": [rows[name] for name in table if name in rows],
        "comparisons": [
            {"question": one.question} | comparison(bench, rows, name, other)
            for name, one in table.items()
            for other in one.against
            if name in rows and other in rows
        ],
    }


def main() -> None:
    arguments = command_line("experiments", __doc__, RESULTS).parse_args()
    table = experiments()
    rows: dict[str, dict[str, Any]] = {}
    if arguments.output.exists():
        before = json.loads(arguments.output.read_text())["configurations"]
        rows = {row["name"]: row for row in before if row["name"] in table}
    lab = Lab()
    for name in chosen(table, arguments.only):
        if name in rows and not arguments.again:
            continue
        start = time.monotonic()
        rows[name] = {"name": name, "question": table[name].question} | summary(lab.bench, table[name].make(lab))
        content = results(lab.bench, rows, table)
        write(arguments.output, content)
        print(f"{name:45} {rows[name]['mean']:+.4f} gap {rows[name]['gap']:.3f}  {time.monotonic() - start:.0f} s")
        for pair in content["comparisons"]:
            if name in (pair["name"], pair["baseline"]):
                print(f"    {in_words(pair)}", flush=True)


if __name__ == "__main__":
    main()

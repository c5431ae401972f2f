"""From the losses of segments to the report: estimates with their intervals, and paired comparisons."""

import datetime
import itertools
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..nn import QuantConfig
from .held_out import HeldOut
from .loss import (
    CONFIDENCE,
    RESAMPLES,
    SEGMENT,
    TAIL_NATS,
    Estimate,
    Float64,
    gap_difference,
    gap_interval,
    tail_rate,
)
from .report import Comparison, Configuration, Difference, LanguageResult, Report

_BITS = 1 / np.log(2)  # per nat

# By language, the nats of each segment, float64 [segments].
SegmentLosses = Mapping[str, Float64]


@dataclass(frozen=True)
class Description:
    """What a report says of a model beside its losses; the fields are those of `Configuration`."""

    config: dict[str, Any]
    bits: float | None
    skipped: dict[str, str] = field(default_factory=dict)


def report_from_losses(
    held_out: HeldOut,
    reference: SegmentLosses,
    results: Mapping[str, tuple[SegmentLosses, Description]],
    *,
    model: dict[str, Any],
    seed: int,
    settings: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Report:
    """The report of models whose losses on the same segments are known.

    Args:
        held_out: what was read.
        reference: the losses of the reference.
        results: by name of the configuration, its losses and description.
        model: describes the reference, as `Report.model`.
        seed: of the bootstrap.
        settings: more entries for `Report.settings`.
        summary: fields of the report that describe a profile, as `summarize` gives them.

    Returns:
        The report, with the configurations in this order.
    """
    differences = {
        name: {tag: losses[tag] - reference[tag] for tag in held_out.sizes} for name, (losses, _) in results.items()
    }
    changes = {
        name: {tag: _estimate(held_out, tag, difference, seed) for tag, difference in by_language.items()}
        for name, by_language in differences.items()
    }
    return Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={
            "la_aciq": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        settings={
            "seqlen": held_out.seqlen,
            "tokens": held_out.tokens,
            "segment": SEGMENT,
            "tail_nats": TAIL_NATS,
            "resamples": RESAMPLES,
            "confidence": CONFIDENCE,
            "seed": seed,
            **(settings or {}),
        },
        model=model,
        texts={tag: {"skipped": held_out.skipped[tag], "tokens": held_out.tokens} for tag in held_out.sizes},
        unit=held_out.unit,
        configurations=[
            _configuration(name, description, held_out, reference, differences[name], changes[name])
            for name, (_, description) in results.items()
        ],
        comparisons=_comparisons(held_out, results, differences, changes, seed),
        **(summary or {}),
    )


def _configuration(
    name: str,
    description: Description,
    held_out: HeldOut,
    reference: Mapping[str, Float64],
    differences: Mapping[str, Float64],
    estimates: Mapping[str, Estimate],
) -> Configuration:
    by_language = {}
    for tag, difference in differences.items():
        tokens, units = held_out.sizes[tag]
        before = reference[tag].sum() / units.sum() * _BITS
        change = estimates[tag]
        low, high = change.interval()
        by_language[tag] = LanguageResult(
            reference_bpb=float(before),
            bpb=float(before + change.value),
            change=change.value,
            low=low,
            high=high,
            se=change.se,
            nats=float(difference.sum() / tokens.sum()),
            tail_rate=tail_rate(difference, tokens),
            tokens=int(tokens.sum()),
            segments=len(tokens),
        )
    results = list(by_language.values())
    worst = max(estimates, key=lambda tag: estimates[tag].value)
    mean = Estimate.mean(list(estimates.values()))
    mean_low, mean_high = mean.interval()
    gap, gap_low, gap_high = gap_interval(list(estimates.values()))
    return Configuration(
        name=name,
        config=description.config,
        bits=description.bits,
        mean=mean.value,
        mean_low=mean_low,
        mean_high=mean_high,
        mean_se=mean.se,
        worst=estimates[worst].value,
        worst_language=worst,
        gap=gap,
        gap_low=gap_low,
        gap_high=gap_high,
        tail_rate=float(np.mean([r.tail_rate for r in results])),
        nats=float(np.mean([r.nats for r in results])),
        by_language=by_language,
        skipped=description.skipped,
    )


def _estimate(held_out: HeldOut, tag: str, difference: Float64, seed: int) -> Estimate:
    """A loss difference in bits per unit. Each language draws segments of its own, the same ones for everything."""
    place = list(held_out.sizes).index(tag)
    return Estimate.ratio(difference * _BITS, held_out.sizes[tag][1], seed=[seed, place])


def _comparisons(
    held_out: HeldOut,
    results: Mapping[str, tuple[SegmentLosses, Description]],
    differences: Mapping[str, Mapping[str, Float64]],
    changes: Mapping[str, Mapping[str, Estimate]],
    seed: int,
) -> list[Comparison]:
    """Every pair of configurations that differ in nothing but whose clips and means a language uses."""
    comparisons = []
    for separate, pooled in itertools.permutations(results, 2):
        a, b = results[separate][1].config, results[pooled][1].config
        if "weights" not in a or not QuantConfig.from_dict(a).by_language or b != a | {"sharing": "pooled"}:
            continue
        paired = {
            tag: _estimate(held_out, tag, differences[separate][tag] - differences[pooled][tag], seed)
            for tag in held_out.sizes
        }
        comparisons.append(
            Comparison(
                name=separate,
                baseline=pooled,
                mean=_difference(Estimate.mean(list(paired.values()))),
                gap=_difference(gap_difference(list(changes[separate].values()), list(changes[pooled].values()))),
                by_language={tag: _difference(estimate, len(paired)) for tag, estimate in paired.items()},
                segments=sum(len(differences[separate][tag]) for tag in paired),
            )
        )
    return comparisons


def _difference(estimate: Estimate, comparisons: int = 1) -> Difference:
    return Difference(estimate.value, *estimate.interval(comparisons))

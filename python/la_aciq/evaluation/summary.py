"""What a profile says about the languages before anything is quantized: the part of a report that needs no model."""

import math
from typing import Any

import numpy as np

from .. import clipping, disparity
from ..nn import QuantConfig
from ..profile import Profile, SiteStats
from .report import Curve, Layers

# Clips of the curves as multiples of the rms. INT4's optima lie between 2.5 (Gaussian) and about 6.
_RATIOS = np.geomspace(1.0, 10.0, 57)


def summarize(profile: Profile, config: QuantConfig) -> dict[str, Any]:
    """What a profile says of the languages before anything is quantized.

    Args:
        profile: the profile.
        config: its bits, codebook and objective are those of the clips.

    Returns:
        The fields regret, clips, kurtosis and curves of a `Report`.
    """
    bits = config.activations if config.activations < 16 else 4
    settings: dict[str, Any] = {"bits": bits, "codebook": config.codebook, "objective": config.objective}
    inputs = {name: site for name, site in profile.sites.items() if site.kind == "input"}
    regret = disparity.regret(profile, **settings).as_dict()
    return {
        "regret": {
            kind: {tag: _number(value) for tag, value in by_language.items()} for kind, by_language in regret.items()
        },
        "clips": _clips(profile, inputs, settings),
        "kurtosis": _kurtosis(profile, inputs),
        "curves": [_curve(profile, name, settings) for name in _representative(profile)],
    }


def _clips(profile: Profile, inputs: dict[str, SiteStats], settings: dict[str, Any]) -> Layers:
    layer = clipping.table(profile, granularity="layer", **settings).clip_factors
    model = clipping.table(profile, granularity="model", **settings).clip_factors
    first = next(iter(inputs))
    return Layers(
        sites=list(inputs),
        by_language={
            tag: [_number(layer[name][entry, 0]) if _reached(site, entry) else None for name, site in inputs.items()]
            for entry, tag in enumerate(profile.languages, 1)
        },
        model={tag: _number(model[first][entry, 0]) for entry, tag in enumerate(profile.languages, 1)},
    )


def _kurtosis(profile: Profile, inputs: dict[str, SiteStats]) -> Layers:
    pooled = {name: site.moments.pool(1).kurtosis for name, site in inputs.items()}
    return Layers(
        sites=list(inputs),
        by_language={
            tag: [_number(pooled[name][entry]) for name in inputs] for entry, tag in enumerate(profile.languages, 1)
        },
        model={tag: _number(law.kurtosis) for tag, law in disparity.effective(profile).items()},
    )


def _representative(profile: Profile) -> list[str]:
    """Of each kind of layer the site in the middle of the model."""
    by_kind: dict[str, list[str]] = {}
    for name, site in profile.sites.items():
        by_kind.setdefault(f"{site.kind} {site.layer_kind}", []).append(name)
    middle = {kind: names[len(names) // 2] for kind, names in by_kind.items()}
    # Inputs of layers first, then the cache.
    return [middle[kind] for kind in sorted(middle, key=lambda kind: not kind.startswith("input"))]


def _curve(profile: Profile, name: str, settings: dict[str, Any]) -> Curve:
    site = profile.sites[name]
    mse, optimum = {}, {}
    for entry, tag in enumerate(profile.languages, 1):
        if not _reached(site, entry):
            continue
        power = site.moments.rms[entry] ** 2
        used = power > 0
        clips = _RATIOS[:, None] * np.sqrt(power[used])
        histogram = site.histogram[entry][used]  # [groups, 258, 2]
        error = np.stack([clipping.histogram_mse(histogram, clip, **settings) for clip in clips]) / power[used]
        curve = error.mean(axis=1)
        best = int(curve.argmin())
        mse[tag] = [float(value) for value in curve]
        optimum[tag] = [float(_RATIOS[best]), float(curve[best])]
    return Curve(site=name, ratio=[float(ratio) for ratio in _RATIOS], mse=mse, optimum=optimum)


def _reached(site: SiteStats, entry: int) -> bool:
    return bool(np.any(site.moments.count[entry] > 0))


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(float(value)) else None

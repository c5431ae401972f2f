"""What a quantized model loses in each language, against the model it was made from."""

import copy
import datetime
import itertools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..calibration import Window, tokenize
from ..calibration.texts import check_ids
from ..errors import LaAciqError
from ..models import fingerprint
from ..nn import QuantConfig, Quantization, bits_per_weight, quantize_model
from ..nn.quantize import Plan, check_unquantized
from ..profile import Profile
from .loss import (
    CONFIDENCE,
    RESAMPLES,
    SEGMENT,
    TAIL_NATS,
    Estimate,
    Float64,
    gap_difference,
    gap_interval,
    segment_starts,
    segment_sums,
    tail_rate,
    token_losses,
)
from .report import Comparison, Configuration, Difference, LanguageResult, Report
from .summary import summarize

_BITS = 1 / np.log(2)  # per nat


def evaluate(
    model: nn.Module,
    reference_model: nn.Module,
    *,
    texts: Mapping[str, Any],
    tokenizer: Any = None,
    seqlen: int = 512,
    tokens: int = 1024,
    skip: int | Mapping[str, int] | None = None,
    name: str = "quantized",
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Measure the change of a model's loss against a reference model's, language by language.

    Texts and token ids are checked before a model runs.

    Args:
        model: the model, quantized or not.
        reference_model: the model that it is compared with.
        texts: by BCP-47 tag a str, a list of str, or token ids (then bits per token are reported, and the tokenizer may
            be None).
        tokenizer: the models' tokenizer.
        seqlen: tokens per window.
        tokens: tokens read per language.
        skip: tokens left out at the start of each text; without it, those that the model's clips were chosen on.
        name: of the configuration in the report.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        The report, with one configuration.

    Raises:
        LaAciqError: a text is too short (the message says by how much), names no language, or has tokens that the model
            does not know; or a loss is not finite.
        TypeError: a text is of another type.
    """
    quantization = getattr(model, "la_aciq", None)
    if skip is None:
        skip = quantization.calibration_tokens if isinstance(quantization, Quantization) else 0
    data = _Texts.prepare(reference_model, texts, tokenizer, seqlen, tokens, skip)
    with tqdm(total=2 * data.windows, desc="Evaluating", unit="window", disable=not progress) as bar:
        reference = data.losses(reference_model, bar)
        losses = data.losses(model, bar)
    return _report(data, reference, {name: (losses, _describe(model))}, reference_model, seed)


def evaluate_configurations(
    model: nn.Module,
    profile: Profile | Sequence[Profile],
    configurations: Mapping[str, QuantConfig | torch.dtype],
    *,
    texts: Mapping[str, Any],
    tokenizer: Any = None,
    seqlen: int = 512,
    tokens: int = 1024,
    skip: int | Mapping[str, int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Measure several configurations of one model; the reference is the model as it is, evaluated once.

    At most two quantized copies are in memory, with their equal weights once. Texts, token ids, profiles and
    configurations are checked before the model runs.

    Args:
        model: the unquantized model.
        profile: one, or several (with and without rotation, for example). Each configuration takes the first that was
            measured with its centers, rotation and group size.
        configurations: by name a `QuantConfig`, or a torch.dtype for the unquantized model in that dtype.
        texts: as for `evaluate`.
        tokenizer: as for `evaluate`.
        seqlen: as for `evaluate`.
        tokens: as for `evaluate`.
        skip: as for `evaluate`; without it, the most tokens of the language that a profile was measured on.
        seed: as for `evaluate`.
        progress: as for `evaluate`.

    Returns:
        The report, with the configurations in this order.

    Raises:
        LaAciqError: as for `evaluate`; also, the model is quantized already, a profile is of another model, or a
            configuration does not fit its profile.
        TypeError: as for `evaluate`.
    """
    profiles = [profile] if isinstance(profile, Profile) else list(profile)
    if not profiles or not configurations:
        raise LaAciqError("evaluate_configurations needs at least one profile and one configuration")
    chosen = {
        name: _profile_for(config, profiles)
        for name, config in configurations.items()
        if isinstance(config, QuantConfig)
    }
    if skip is None:
        calibrated = [measured.metadata["tokens"] for measured in profiles]
        skip = {tag: max(tokens_.get(tag, 0) for tokens_ in calibrated) for tag in set().union(*calibrated)}
    check_unquantized(model)
    model_fingerprint = fingerprint(model)
    for measured in chosen.values():
        measured.check_fingerprint(model_fingerprint)
    data = _Texts.prepare(model, texts, tokenizer, seqlen, tokens, skip)
    for name, config in configurations.items():
        if isinstance(config, QuantConfig):
            try:
                Plan(model, chosen[name], config)
            except LaAciqError as error:
                raise LaAciqError(f"configuration {name!r}: {error}") from error
    results: dict[str, tuple[_Losses, _Description]] = {}
    previous: nn.Module | None = None  # the last quantized copy: the next one shares the weights that are the same
    with tqdm(
        total=(1 + len(configurations)) * data.windows, desc="Evaluating", unit="window", disable=not progress
    ) as bar:
        bar.set_postfix_str("reference")
        reference = data.losses(model, bar)
        for name, config in configurations.items():
            bar.set_postfix_str(name)
            if isinstance(config, QuantConfig):
                candidate = previous = quantize_model(model, chosen[name], config, like=previous, progress=progress)
            else:
                candidate = _cast(model, config)
            results[name] = data.losses(candidate, bar), _describe(candidate)
    first = next((c for c in configurations.values() if isinstance(c, QuantConfig)), QuantConfig())
    return _report(data, reference, results, model, seed, _profile_for(first, profiles), first)


def check_texts(
    model: nn.Module, texts: Mapping[str, Any], *, seqlen: int, tokens: int, skip: int | Mapping[str, int]
) -> None:
    """Check what `evaluate` would refuse of its texts, without running the model.

    Args:
        model: the model to be evaluated.
        texts: by BCP-47 tag, token ids or `TokenizedText`.
        seqlen: tokens per window.
        tokens: tokens per language.
        skip: tokens per language that are left out first.

    Raises:
        LaAciqError: a text is too short, or has tokens that the model does not know.
    """
    _Texts.prepare(model, texts, None, seqlen, tokens, skip)


# Per language, one array of nats per token for each window.
_Losses = dict[str, list[NDArray[np.float32]]]


@dataclass(frozen=True)
class _Description:
    config: dict[str, Any]
    bits: float
    skipped: dict[str, str]


@dataclass(frozen=True)
class _Texts:
    """The windows to evaluate on, by language."""

    by_language: dict[str, list[Window]]
    skipped: dict[str, int]
    seqlen: int
    tokens: int

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        texts: Mapping[str, Any],
        tokenizer: Any,
        seqlen: int,
        tokens: int,
        skip: int | Mapping[str, int],
    ) -> "_Texts":
        tokenized = tokenize(texts, tokenizer)
        check_ids(model, tokenized, seqlen)
        skipped = {tag: skip if isinstance(skip, int) else int(skip.get(tag, 0)) for tag in tokenized}
        windows = {
            tag: text.windows(tag, tokens=tokens, seqlen=seqlen, skip=skipped[tag]) for tag, text in tokenized.items()
        }
        # A window without a segment predicts nothing: one token, or a few that are all of one character.
        data = cls(
            {tag: [window for window in cut if len(segment_starts(window))] for tag, cut in windows.items()},
            skipped,
            seqlen,
            tokens,
        )
        for tag in data.by_language:
            segments = len(data.sizes(tag)[0])
            if segments < 2:
                raise LaAciqError(
                    f"tokens = {tokens}: an interval needs at least two segments of up to {SEGMENT} predicted tokens "
                    f"in each language, and the text for {tag!r} has {segments} in which the tokens add text; "
                    "give more tokens, or a longer seqlen"
                )
        return data

    @property
    def windows(self) -> int:
        return sum(map(len, self.by_language.values()))

    @property
    def unit(self) -> str:
        known = all(w.byte_counts is not None for windows in self.by_language.values() for w in windows)
        return "byte" if known else "token"

    def losses(self, model: nn.Module, bar: Any) -> _Losses:
        was_training = model.training
        model.eval()
        try:
            return {tag: token_losses(model, windows, tag, bar.update) for tag, windows in self.by_language.items()}
        finally:
            model.train(was_training)

    def sums(self, losses: _Losses) -> dict[str, Float64]:
        """Nats of each segment by language, float64 [segments]."""
        return {tag: segment_sums(losses[tag], windows) for tag, windows in self.by_language.items()}

    def sizes(self, tag: str) -> tuple[Float64, Float64]:
        """Predicted tokens and units (bytes or tokens) of each segment, float64 [segments] each."""
        windows = self.by_language[tag]
        tokens = segment_sums([np.ones(len(window.ids) - 1) for window in windows], windows)
        if self.unit == "token":
            return tokens, tokens
        return tokens, segment_sums([w.byte_counts for w in windows if w.byte_counts is not None], windows)


def _profile_for(config: QuantConfig, profiles: Sequence[Profile]) -> Profile:
    def differs(profile: Profile) -> tuple[bool, bool]:
        metadata = profile.metadata
        measured = bool(metadata["rotation"]["enabled"]), metadata["group_size"]
        centered = bool(profile.centers)
        return config.center not in (None, centered), measured != (config.rotate, config.group_size)

    return min(profiles, key=differs)  # the first that fits best; quantize_model says whether it will do


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with its parameters in dtype; buffers stay, as transformers keeps its rotary tables in float32."""
    candidate = copy.deepcopy(model)
    for parameter in candidate.parameters():
        parameter.data = parameter.data.to(dtype)
    return candidate


def _describe(model: nn.Module) -> _Description:
    quantization = getattr(model, "la_aciq", None)
    if isinstance(quantization, Quantization):
        return _Description(quantization.config.to_dict(), bits_per_weight(model), dict(quantization.skipped))
    dtype = next(model.parameters()).dtype
    return _Description({"dtype": str(dtype).removeprefix("torch.")}, 8.0 * dtype.itemsize, {})


def _report(
    data: _Texts,
    reference: _Losses,
    results: Mapping[str, tuple[_Losses, _Description]],
    model: nn.Module,
    seed: int,
    profile: Profile | None = None,
    config: QuantConfig | None = None,
) -> Report:
    before = data.sums(reference)
    differences = {
        name: {tag: after - before[tag] for tag, after in data.sums(losses).items()}
        for name, (losses, _) in results.items()
    }
    changes = {
        name: {tag: _estimate(data, tag, difference, seed) for tag, difference in by_language.items()}
        for name, by_language in differences.items()
    }
    configurations = [
        _configuration(name, description, data, before, differences[name], changes[name])
        for name, (_, description) in results.items()
    ]
    summary = {} if profile is None or config is None else summarize(profile, config)
    settings = {
        "seqlen": data.seqlen,
        "tokens": data.tokens,
        "segment": SEGMENT,
        "tail_nats": TAIL_NATS,
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "seed": seed,
    }
    return Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={
            "la_aciq": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        settings=settings,
        model={
            "name": str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__),
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": _describe(model).config["dtype"],
            "fingerprint": fingerprint(model),
        },
        texts={tag: {"skipped": data.skipped[tag], "tokens": data.tokens} for tag in data.by_language},
        unit=data.unit,
        configurations=configurations,
        comparisons=_comparisons(data, results, differences, changes, seed),
        **summary,
    )


def _configuration(
    name: str,
    description: _Description,
    data: _Texts,
    reference: Mapping[str, Float64],
    differences: Mapping[str, Float64],
    estimates: Mapping[str, Estimate],
) -> Configuration:
    by_language = {}
    for tag, difference in differences.items():
        tokens, units = data.sizes(tag)
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


def _estimate(data: _Texts, tag: str, difference: Float64, seed: int) -> Estimate:
    """A loss difference in bits per unit. Each language draws segments of its own, the same ones for everything."""
    place = list(data.by_language).index(tag)
    return Estimate.ratio(difference * _BITS, data.sizes(tag)[1], seed=[seed, place])


def _comparisons(
    data: _Texts,
    results: Mapping[str, tuple[_Losses, _Description]],
    differences: Mapping[str, Mapping[str, Float64]],
    changes: Mapping[str, Mapping[str, Estimate]],
    seed: int,
) -> list[Comparison]:
    """Every pair of configurations that differ in nothing but whose clips and means a language uses."""
    comparisons = []
    for separate, pooled in itertools.permutations(results, 2):
        a, b = results[separate][1].config, results[pooled][1].config
        if "dtype" in a or not QuantConfig.from_dict(a).by_language or b != a | {"sharing": "pooled"}:
            continue
        paired = {
            tag: _estimate(data, tag, differences[separate][tag] - differences[pooled][tag], seed)
            for tag in data.by_language
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

"""What a quantized model loses in each language, against the model it was made from."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..calibration import tokenize
from ..calibration.texts import check_ids
from ..errors import LaAciqError
from ..models import fingerprint
from ..nn import QuantConfig, Quantization, bits_per_weight, quantize_model
from ..nn.quantize import Plan, check_unquantized
from ..profile import Profile
from .from_losses import Description, SegmentLosses, report_from_losses
from .held_out import HeldOutWindows
from .loss import Float64, segment_sums, token_losses
from .report import Report
from .summary import summarize


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
    held_out = _prepare(reference_model, texts, tokenizer, seqlen, tokens, skip)
    with tqdm(total=2 * held_out.num_windows, desc="Evaluating", unit="window", disable=not progress) as bar:
        reference = _losses(reference_model, held_out, bar)
        losses = _losses(model, held_out, bar)
    return report_from_losses(
        held_out,
        reference,
        {name: (losses, describe(model))},
        model=describe_reference(reference_model),
        seed=seed,
    )


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
    held_out = _prepare(model, texts, tokenizer, seqlen, tokens, skip)
    for name, config in configurations.items():
        if isinstance(config, QuantConfig):
            try:
                Plan(model, chosen[name], config)
            except LaAciqError as error:
                raise LaAciqError(f"configuration {name!r}: {error}") from error
    results: dict[str, tuple[SegmentLosses, Description]] = {}
    previous: nn.Module | None = None  # the last quantized copy: the next one shares the weights that are the same
    with tqdm(
        total=(1 + len(configurations)) * held_out.num_windows, desc="Evaluating", unit="window", disable=not progress
    ) as bar:
        bar.set_postfix_str("reference")
        reference = _losses(model, held_out, bar)
        for name, config in configurations.items():
            bar.set_postfix_str(name)
            if isinstance(config, QuantConfig):
                candidate = previous = quantize_model(model, chosen[name], config, like=previous, progress=progress)
            else:
                candidate = _cast(model, config)
            results[name] = _losses(candidate, held_out, bar), describe(candidate)
    first = next((c for c in configurations.values() if isinstance(c, QuantConfig)), QuantConfig())
    return report_from_losses(
        held_out,
        reference,
        results,
        model=describe_reference(model),
        seed=seed,
        summary=summarize(_profile_for(first, profiles), first),
    )


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
    _prepare(model, texts, None, seqlen, tokens, skip)


def _prepare(
    model: nn.Module,
    texts: Mapping[str, Any],
    tokenizer: Any,
    seqlen: int,
    tokens: int,
    skip: int | Mapping[str, int],
) -> HeldOutWindows:
    """Tokenize and cut texts, and check that the model can read them."""
    tokenized = tokenize(texts, tokenizer)
    check_ids(model, tokenized, seqlen)
    return HeldOutWindows.cut(tokenized, seqlen, tokens, skip)


def _losses(model: nn.Module, held_out: HeldOutWindows, bar: Any) -> dict[str, Float64]:
    """Nats of each segment by language, float64 [segments]."""
    was_training = model.training
    model.eval()
    try:
        return {
            tag: segment_sums(token_losses(model, windows, tag, bar.update), windows)
            for tag, windows in held_out.windows.items()
        }
    finally:
        model.train(was_training)


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


def describe(model: nn.Module) -> Description:
    """What a report says of a model: its quantization, or its dtype."""
    quantization = getattr(model, "la_aciq", None)
    if isinstance(quantization, Quantization):
        return Description(quantization.config.to_dict(), bits_per_weight(model), dict(quantization.skipped))
    dtype = next(model.parameters()).dtype
    return Description({"dtype": str(dtype).removeprefix("torch.")}, 8.0 * dtype.itemsize)


def describe_reference(model: nn.Module) -> dict[str, Any]:
    """What a report says of the model that others are compared with."""
    return {
        "name": str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": describe(model).config["dtype"],
        "fingerprint": fingerprint(model),
    }

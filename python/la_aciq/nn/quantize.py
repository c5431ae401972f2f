"""Swapping a model's linear layers for quantized ones."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .. import clipping, ops
from .._deprecated import warn_renamed
from ..errors import LaAciqError
from ..models import EXPERT_WEIGHTS, fingerprint, is_experts, is_quantized, linear_weight, output_head
from ..models.architecture import check_constant_weights
from ..ops import rotation
from ..profile import Profile
from ..tags import UND, canonical
from .alignment import align
from .config import ABSMAX_SHARE, QuantConfig
from .experts import LanguageAwareExperts
from .forward_pass import LanguageState
from .generate import add_language_to_generate
from .joined import JoinedLayers
from .kv import KeyValueClips, site
from .linear import LanguageAwareLinear, check_finite
from .padding import keep_zero_rows
from .refusals import adapters, refuse_methods
from .weights import Rounding

# Called with every model that is quantized or loaded: integrations prepare it for what they do with models.
AFTER_QUANTIZING: list[Callable[[nn.Module, "Quantization"], None]] = []


@dataclass(frozen=True)
class Quantization:
    """How a model was quantized; its attribute `la_aciq`.

    Attributes:
        config: the configuration, with what it left open decided.
        state: the language ids of the model's passes.
        layers: names of the modules that are now `LanguageAwareLinear` or, a mixture's experts, `LanguageAwareExperts`.
        cache: by the number of an attention layer (a string, for JSON) the clips per entry of its INT4 cache's table;
            empty without tables.
        joined: those of `layers` with INT4 weights that read the very same tensor, by groups, which are computed in one
            call.
        skipped: every other layer with a weight matrix, and why it was left alone.
        fingerprint: of the unquantized model.
        calibration_tokens: per language, how many of its tokens the clips were chosen on.
        layouts: by layer how the rows of its input belong to tokens (nn/layout.py), where calibration found out.
    """

    config: QuantConfig
    state: LanguageState
    layers: tuple[str, ...]
    cache: dict[str, int]
    joined: tuple[tuple[str, ...], ...]
    skipped: dict[str, str]
    fingerprint: str
    calibration_tokens: dict[str, int]
    layouts: dict[str, str] = field(default_factory=dict)

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        """The old name of `joined`."""
        warn_renamed("Quantization.shared", "Quantization.joined")
        return self.joined


def quantize_model(
    model: nn.Module,
    profile: Profile,
    config: QuantConfig,
    *,
    inplace: bool = False,
    like: nn.Module | None = None,
    progress: bool = True,
) -> nn.Module:
    """The model with its linear layers quantized as `config` says, with the clips of the profile's statistics.

    Layers left alone because they are of an unsupported kind or not in the profile are named in one warning. Tied
    layers and adapters of PEFT are left alone without a warning. A model on the meta device becomes a quantized one
    there, without values: its shapes and sizes.

    Args:
        model: a model in any floating-point dtype, on one device or several.
        profile: of this very model.
        config: how to quantize it.
        inplace: change the model itself, layer by layer, so that at most one layer is in memory twice; otherwise the
            model is left as it was, and the copy shares nothing with it.
        like: this model as it was quantized before; INT4 weights that would come out the same are shared with it, so
            that trying many clips costs the weights once.
        progress: show a progress bar on standard error: layers, and the time that is left.

    Returns:
        The quantized model. Its `la_aciq` is a `Quantization`; `skipped` there says what was left alone and why.

    Raises:
        LaAciqError: the profile was made from another model, its group size or rotation is not the configuration's, the
            model is quantized already or distributed over processes, or a weight is not finite. All of this is checked
            before the first layer is changed.
    """
    check_unquantized(model)
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent and len(absent) == len(list(model.parameters())):
        quantization = Plan(model, profile, config).quantization
        empty = model if inplace else copy.deepcopy(model)
        install(empty, quantization)
        adopt(empty, quantization)
        return empty
    if absent:
        raise LaAciqError(
            f"parameter {absent[0]!r} is on the meta device and others are not; expected all or none there"
        )
    profile.check_fingerprint(fingerprint(model))
    if like is not None and _quantization(like).fingerprint != profile.metadata["fingerprint"]:
        raise LaAciqError("like: it was quantized from another model; expected one quantized from this model")
    plan = Plan(model, profile, config)
    for name in plan.layers:
        for parameter in model.get_submodule(name).parameters():
            check_finite(parameter, name)  # all of them before the first is changed
    if inplace:
        plan.check_second_moments(model)
    # A module that is replaced is never copied: the copy finds its replacement in place of it.
    replaced: dict[int, Any] = {}
    # Beneath another progress bar it leaves no line behind.
    for name in tqdm(plan.names, desc="Quantizing", unit="layer", leave=None, disable=not progress):
        original: Any = model.get_submodule(name)
        if inplace:
            model.set_submodule(name, plan.quantized(name, original, like))
        else:
            replaced[id(original)] = plan.quantized(name, original, like)
    result: nn.Module = model if inplace else copy.deepcopy(model, replaced)
    plan.finish(result)
    return result


class Plan:
    """Which layers of a model become what, with which clips: all that is decided before a weight is looked at.

    The model may be on the meta device.

    Attributes: names: the modules to replace, in the model's order. quantization: what the model says of itself
    afterwards.
    """

    def __init__(self, model: nn.Module, profile: Profile, config: QuantConfig) -> None:
        if config.center is None:
            config = replace(config, center=bool(profile.centers))
        check_constant_weights(model)
        _check_settings(profile, config)
        config = _with_language_weights(profile, config)
        config = _with_rounding(profile, config)
        self._profile = profile
        selected, skipped = _select(model, profile, config)
        self.layers = self.names = selected if config.quantizes_linear else ()
        inputs = [one for name in self.layers for one in inputs_of(name, model.get_submodule(name))]
        self._clips = _clips(profile, config, inputs)
        generates: Any = getattr(model, "can_generate", None)
        if config.kv < 16 and not (generates is not None and generates()):
            raise LaAciqError(f"kv = {config.kv}, but {type(model).__name__} does not generate; expected kv = 16")
        self._cache_clips = _cache_clips(profile, config)
        self._rounding: tuple[str, Rounding] | None = None  # of the last site: layers that share an input come together
        self._seed = int(profile.metadata["rotation"]["seed"])
        layouts = profile.metadata.get("layouts", {})
        self.quantization = Quantization(
            config=config,
            state=LanguageState(_entries(profile, config), config.by_language),
            layers=self.layers,
            joined=_joined(profile, config, self.layers),
            cache={str(layer): clips.shape[1] for layer, clips in self._cache_clips.items()},
            skipped=skipped,
            fingerprint=profile.metadata["fingerprint"],
            calibration_tokens={tag: int(count) for tag, count in profile.metadata["tokens"].items()},
            layouts={name: layouts[name] for name in self.layers if layouts.get(name)},
        )

    def quantized(self, name: str, original: Any, like: nn.Module | None = None) -> nn.Module:
        """What takes the place of a layer."""
        config, state = self.quantization.config, self.quantization.state
        if is_experts(original):
            before = None if like is None else like.get_submodule(name)
            experts: nn.Module = LanguageAwareExperts.from_experts(
                original,
                config,
                state,
                {part: self._clips.get(f"{name}.{part}") for part in EXPERT_WEIGHTS},
                centers={part: self._center(f"{name}.{part}") for part in EXPERT_WEIGHTS},
                seed=self._seed,
                name=name,
                second_moments={part: self._second_moments(f"{name}.{part}") for part in EXPERT_WEIGHTS},
                like=before if isinstance(before, LanguageAwareExperts) else None,
            )
            return experts
        return LanguageAwareLinear.from_linear(
            original,
            config,
            state,
            self._clips.get(name),
            center=self._center(name),
            seed=self._seed,
            name=name,
            second_moments=self._second_moments(name),
            like=_quantized_layer(like, name),
        )

    def check_second_moments(self, model: nn.Module) -> None:
        """Raises `LaAciqError` when weights cannot be rounded by some layer's: before the first layer is changed."""
        device = next(model.parameters()).device
        for name in self.names:
            for one in inputs_of(name, model.get_submodule(name)):
                rounding = self._second_moments(one)
                if rounding is not None:
                    try:
                        rounding.check(device)
                    except ValueError as error:
                        raise LaAciqError(f"layer {one!r}: {error}") from error

    def _second_moments(self, name: str) -> Rounding | None:
        """Those of a layer's input, where its weights are to be rounded by them."""
        config, second_moments = self.quantization.config, self._profile.second_moments
        if config.weights == 16 or config.rounding == "nearest" or second_moments is None:
            return None
        site = self._profile.layers[name]
        if self._rounding is not None and self._rounding[0] == site:
            return self._rounding[1]
        products = torch.from_numpy(second_moments[site])
        if self._profile.centers and not config.center:
            # They were measured less the mean of each language.
            entries = [self._profile.entries.index(tag) for tag in self._profile.languages]
            means = torch.from_numpy(self._profile.centers[site][entries])
            if config.rotate:
                signs = torch.from_numpy(rotation.signs(means.shape[1], self._seed))
                means = ops.rotate(means, signs, rotation.block_size(means.shape[1]))
            stats = self._profile.sites[site]
            tokens = torch.from_numpy(stats.moments.count[entries, 0] / stats.group_size).float()
            products = products + (means * tokens[:, None]).T @ means
        self._rounding = site, Rounding(products)
        return self._rounding[1]

    def _center(self, name: str) -> torch.Tensor | None:
        """The mean inputs of a layer, float32 [entries, K]."""
        config = self.quantization.config
        if not config.center:
            return None
        center = self._profile.centers[self._profile.layers[name]]
        return torch.from_numpy(center[_places(self._profile, config)])

    def finish(self, model: nn.Module) -> None:
        """Make the model one that knows it is quantized, when all of `names` are replaced."""
        if self._cache_clips:
            add_cache_tables(model, self.quantization).fill(self._cache_clips)
        adopt(model, self.quantization)


def adopt(model: nn.Module, quantization: Quantization) -> None:
    """Give a model whose layers are quantized its `la_aciq`, the layout of weights that is the fastest where they are,
    the hooks that set the language, and what integrations need (`AFTER_QUANTIZING`).
    """
    quantized: Any = model
    quantized.la_aciq = quantization
    for name, layout in quantization.layouts.items():
        layer: Any = model.get_submodule(name)
        layer.layout = layout
    align(model)
    for module in model.modules():
        if isinstance(module, LanguageAwareLinear):
            module.repack()  # one by one: no more than one layer's weights are there twice
    for names in quantization.joined:
        layers = [model.get_submodule(name) for name in names]
        if len({layer.bias is None or layer.bias.ndim for layer in layers}) == 1:
            JoinedLayers(layers)
    keep_zero_rows(model)
    if quantization.config.kv < 16:
        from .cache import CacheMaker

        quantization.state.attach(model, CacheMaker(model))
    else:
        quantization.state.attach(model)
    add_language_to_generate(model)
    refuse_methods(model)
    for prepare in AFTER_QUANTIZING:
        prepare(model, quantization)


def add_cache_tables(
    model: nn.Module, quantization: Quantization, device: torch.device | str | None = None
) -> KeyValueClips:
    """Give the model an empty table for its INT4 cache, by default on the device of its parameters."""
    counts = {int(layer): count for layer, count in quantization.cache.items()}
    tables = KeyValueClips(counts, quantization.config, quantization.state)
    model.add_module(KeyValueClips.NAME, tables.to(device or next(model.parameters()).device))
    return tables


def install(model: nn.Module, quantization: Quantization) -> None:
    """Put empty quantized layers, on the meta device, where a model of the same architecture has them.

    Raises:
        LaAciqError: the model has no linear layer or experts of one of the names.
    """
    for name in quantization.layers:
        _replace(model, name, quantization)
    if quantization.cache:
        add_cache_tables(model, quantization, "meta")


def _replace(model: nn.Module, name: str, quantization: Quantization) -> None:
    try:
        original = model.get_submodule(name)
    except AttributeError:
        original = None
    weight = None if original is None else linear_weight(original)
    experts = original is not None and is_experts(original)
    if original is None or (weight is None and not experts):
        raise LaAciqError(
            f"quantization_config names the layer {name!r}, and the model has no linear layer of that name"
        )
    config, state = quantization.config, quantization.state
    empty: Any
    if weight is None:
        empty = LanguageAwareExperts.empty(original, config, state)
    else:
        n, k = weight.shape
        bias = original._parameters.get("bias") is not None
        empty = LanguageAwareLinear(k, n, bias, config, state, dtype=weight.dtype, device="meta")
    model.set_submodule(name, empty)


def check_unquantized(model: nn.Module) -> None:
    """Check that a model can be quantized.

    Raises:
        LaAciqError: it is quantized already, by LA-ACIQ or by a quantizer of transformers, or its parameters are parts
            of tensors that are distributed over processes.
    """
    if hasattr(model, "la_aciq") or is_quantized(getattr(model, "config", None)):
        raise LaAciqError("the model is quantized already; expected the model as it was trained")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor, of tensor parallelism or FSDP
            raise LaAciqError(
                f"parameter {name!r} is distributed over processes; expected a model that is whole on every process, "
                "loaded without tensor parallelism and before it is sharded"
            )


def bits_per_weight(model: nn.Module) -> float:
    """Stored bits per weight of a model's quantized layers.

    Codes, the weights' clips and the tables of centers and of their biases are counted.

    Args:
        model: A quantized model, or one that is not.

    Returns:
        The bits per weight; those of the parameters' dtype where no layer is quantized.
    """
    bits = weights = 0
    for module in model.modules():
        if isinstance(module, LanguageAwareLinear):
            weights += module.in_features * module.out_features
            stored = [module.portable_weight, module.weight_clip, module.center]
            stored += [module.bias] if module.config.center else []
            bits += sum(8 * tensor.element_size() * tensor.numel() for tensor in stored if tensor is not None)
    return bits / weights if weights else 8.0 * next(model.parameters()).itemsize


def _quantization(model: nn.Module) -> Quantization:
    quantization = getattr(model, "la_aciq", None)
    if not isinstance(quantization, Quantization):
        raise LaAciqError("like: it is not quantized; expected a model that quantize_model returned")
    return quantization


def _quantized_layer(model: nn.Module | None, name: str) -> LanguageAwareLinear | None:
    """The quantized layer of that name, if the model has one."""
    module = None if model is None else model.get_submodule(name)
    return module if isinstance(module, LanguageAwareLinear) else None


def _check_settings(profile: Profile, config: QuantConfig) -> None:
    centered = bool(profile.centers)
    if config.center and not centered and config.quantizes_linear:
        raise LaAciqError(
            "center = True, but the profile has no mean inputs; expected one that calibrate(center=True) made, or "
            "center = False"
        )
    if config.clip == "absmax" or config.activations == 16:
        return
    rotated = bool(profile.metadata["rotation"]["enabled"])
    if rotated != config.rotate:
        raise LaAciqError(
            f"rotate = {config.rotate}, but the profile was made with rotate = {rotated}; expected the same of both"
        )
    if config.group_size != profile.metadata["group_size"]:
        raise LaAciqError(
            f"group_size = {config.group_size}, but the profile was made with group_size = "
            f"{profile.metadata['group_size']}; expected the same of both"
        )
    if centered != config.center:
        raise LaAciqError(
            f"center = {config.center}, but the profile was made with center = {centered}; expected the same of both"
        )


def inputs_of(name: str, module: nn.Module) -> tuple[str, ...]:
    """The names of a layer's quantized inputs in the profile and the tables; none for a kind that is not supported."""
    if linear_weight(module) is not None:
        return (name,)
    return tuple(f"{name}.{part}" for part in EXPERT_WEIGHTS) if is_experts(module) else ()


def _with_language_weights(profile: Profile, config: QuantConfig) -> QuantConfig:
    """The configuration with the languages' weights by the profile's tags."""
    if config.language_weights is None:
        return config
    weights: dict[str, float] = {}
    for tag, weight in config.language_weights.items():
        language = canonical(tag)
        if language not in profile.languages:
            raise LaAciqError(
                f"language_weights: expected languages of the profile, {', '.join(profile.languages)}, got {tag!r}"
            )
        if language in weights:
            raise LaAciqError(f"language_weights: expected each language once, got {language!r} twice")
        weights[language] = weight
    return replace(config, language_weights=weights)


def _with_rounding(profile: Profile, config: QuantConfig) -> QuantConfig:
    """The configuration with the rounding of weights that the profile allows."""
    rotated = bool(profile.metadata["rotation"]["enabled"])
    usable = profile.second_moments is not None and rotated == config.rotate
    if config.rounding == "auto":
        return replace(config, rounding="feedback" if usable else "nearest")
    if config.rounding == "feedback" and config.weights < 16 and not usable:
        held = f"those of inputs with rotate = {rotated}" if profile.second_moments is not None else "none"
        raise LaAciqError(
            f"rounding = 'feedback' needs a profile with second moments of inputs with rotate = {config.rotate}, "
            f"this one has {held}; calibrate again, or use rounding = 'nearest'"
        )
    return config


def _select(model: nn.Module, profile: Profile, config: QuantConfig) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of the layers to quantize, and why every other layer with a weight matrix is left alone."""
    uses = Counter(
        id(weight) for module in model.modules() for weight in module._parameters.values() if weight is not None
    )
    # While transformers loads a model, its tied weights are still apart and only declared.
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*declared, *declared.values()}
    head = output_head(model)
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    layouts = profile.metadata.get("layouts", {})
    added = adapters(model)
    layers: list[str] = []
    skipped: dict[str, str] = {}
    unexpected: list[str] = []
    for name, module in model.named_modules():
        weights = [weight for weight in module._parameters.values() if weight is not None and weight.ndim >= 2]
        if not weights or isinstance(module, nn.Embedding):
            continue
        if config.ignores(name, head):
            skipped[name] = "ignored by the configuration"
        elif name in added:
            skipped[name] = "an adapter of PEFT"
        elif any(part in name.split(".") for part in kept):
            skipped[name] = "its architecture keeps it in float32"
        elif not inputs_of(name, module):
            skipped[name] = f"unsupported kind of layer {type(module).__name__}"
            unexpected.append(name)
        elif layouts.get(name, "") is None:
            skipped[name] = "the rows of its input are no tokens, or of several kinds"
            unexpected.append(name)
        elif f"{name}.weight" in tied or any(uses[id(weight)] > 1 for weight in weights):
            skipped[name] = "its weight is tied to another layer's"
        elif any(one not in profile.layers for one in inputs_of(name, module)):
            skipped[name] = "not in the profile"
            unexpected.append(name)
        else:
            layers.append(name)
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise LaAciqError(f"no layer to quantize: expected a linear layer that the profile knows ({reasons})")
    if unexpected:
        named = "; ".join(f"{name} ({skipped[name]})" for name in unexpected)
        warnings.warn(f"{len(unexpected)} layers are left as they are: {named}", stacklevel=3)
    return tuple(layers), skipped


def _joined(profile: Profile, config: QuantConfig, layers: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The layers with INT4 weights that read the very same tensor, by groups."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        if config.weights == 4 and name in profile.layers:
            groups.setdefault(profile.layers[name], []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _cache_clips(profile: Profile, config: QuantConfig) -> dict[int, torch.Tensor]:
    """Clips (static) or factors (rms) of the INT4 cache by attention layer, float32 [entries, heads of keys and
    values]; none for "absmax".
    """
    if config.kv == 16 or config.kv_clip == "absmax":
        return {}
    layers = [int(name.split(".")[1]) for name, stats in profile.sites.items() if stats.kind == "key"]
    if not layers:
        raise LaAciqError(
            f"kv_clip = {config.kv_clip!r}, but the profile has no keys and values; expected kv_clip = 'absmax', or a "
            "profile of a model whose attention uses a cache"
        )
    table = _table(profile, config, 4, "group" if config.granularity == "token" else config.granularity)
    clips, entries = table.clips if config.kv_clip == "static" else table.clip_factors, _places(profile, config)
    return {
        layer: torch.from_numpy(
            np.concatenate([clips[site(layer, kind)][entries] for kind in ("key", "value")], axis=1)
        )
        for layer in layers
    }


def _entries(profile: Profile, config: QuantConfig) -> tuple[str, ...]:
    """The entries of the tables: the pooled one, the languages' where each has one, and the sink's."""
    languages = profile.languages if config.sharing == "language" else ()
    return (UND, *languages, *(profile.entries[-1:] if config.sink else ()))


def _places(profile: Profile, config: QuantConfig) -> list[int]:
    """Where the profile has the entries of the tables."""
    return [profile.entries.index(entry) for entry in _entries(profile, config)]


def _clips(profile: Profile, config: QuantConfig, layers: Sequence[str]) -> dict[str, torch.Tensor]:
    """Clips (static) or factors (dynamic), float32 [entries, groups], of the layers' inputs."""
    if config.activations == 16:
        return {}
    entries = _places(profile, config)
    if config.clip == "absmax":
        share = ABSMAX_SHARE if config.activations == 4 else 1.0
        groups = {name: config.groups(profile.sites[profile.layers[name]].k) for name in layers}
        # Not torch's defaults: while transformers loads a model they are the meta device and the model's dtype.
        kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        return {name: torch.full((len(entries), count), share, **kind) for name, count in groups.items()}
    # One clip per token takes the layer's factor; layer and model tables repeat one clip for all groups.
    granularity = "layer" if config.granularity == "token" else config.granularity
    table = _table(profile, config, config.activations, granularity)
    clips = table.clips if config.clip == "static" else table.clip_factors
    columns = None if config.activation_group_size else 1
    return {name: torch.from_numpy(clips[name][entries, :columns]) for name in layers}


def _table(profile: Profile, config: QuantConfig, bits: int, granularity: str) -> clipping.ClipTable:
    return clipping.table(
        profile,
        bits=bits,
        codebook=config.codebook,
        objective=config.objective,
        granularity=granularity,
        sharing=config.sharing,
        language_objective=config.language_objective,
        language_weights=config.language_weights,
        penalty=config.language_penalty,
    )

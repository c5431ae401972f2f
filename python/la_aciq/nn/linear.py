"""The quantized linear layer: INT4 weights, and an activation clip looked up by the language of each token."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from .. import ops, rotation
from ..errors import LaAciqError
from ..models import linear_weight
from ..ops import Codebook
from .config import QuantConfig
from .context import LanguageState

# The clips tried for a group of weights, as shares of its largest magnitude: first coarsely, then around the best of
# those. Over groups of 64 or more Gaussian weights the squared error is within 0.2 % of that of the best of 1001 clips,
# over groups of 16 within 1 %.
_COARSE = [0.4 + 0.05 * i for i in range(17)]
_FINE = [0.01 * i for i in range(-4, 5) if i]
# Weights worked on at once: the three float32 copies of them stay in a core's own cache.
_CHUNK = 1 << 17


def weight_clips(weight: torch.Tensor, group_size: int, codebook: Codebook = "midrise") -> torch.Tensor:
    """The INT4 clip of each group of weights with the least squared error, searched over 25 clips.

    weight: [N, K] of any float dtype, finite. group_size 0 means one group per row. Returns float32 [N, groups] on the
    weight's device; a group of zeros gets the clip 0, which dequantizes to exactly 0.
    """
    n, k = weight.shape
    group = group_size or k
    groups = -(-k // group)
    clips = torch.empty((n, groups), dtype=torch.float32, device=weight.device)
    rows_at_once = max(_CHUNK // max(k, 1), 1)
    for start in range(0, n, rows_at_once):
        # A short last group is filled with zeros; `padding` takes their error (a quarter of a step squared in mid-rise)
        # off again.
        rows = nn.functional.pad(weight[start : start + rows_at_once].float(), (0, groups * group - k))
        padding = torch.zeros(groups, dtype=torch.float32, device=weight.device)
        padding[-1] = 0.25 * (groups * group - k) if codebook == "midrise" else 0.0
        clips[start : start + rows_at_once] = _best_clips(rows.view(-1, groups, group), codebook, padding)
    return clips


def _best_clips(rows: torch.Tensor, codebook: Codebook, padding: torch.Tensor) -> torch.Tensor:
    """Clips [rows, groups] of weights [rows, groups, group]; padding [groups] is no weight's share of the error."""
    largest = rows.abs().amax(dim=-1)
    steps_in_largest = 7.5 / largest.clamp(min=torch.finfo(torch.float32).tiny)
    scaled, level = torch.empty_like(rows), torch.empty_like(rows)
    best = torch.full_like(largest, torch.inf)
    found = torch.ones_like(largest)

    def attempt(share: torch.Tensor | float) -> None:
        nonlocal best, found
        torch.mul(rows, (steps_in_largest / share).unsqueeze(-1), out=scaled)
        if codebook == "midrise":
            scaled.sub_(0.5)  # floor(x) + 1/2 is as far from x as round(x - 1/2) from x - 1/2
        torch.round(scaled, out=level).clamp_(-8, 7).sub_(scaled)
        error = (torch.linalg.vector_norm(level, dim=-1).square() - padding) * share**2
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, share, found)

    for share in _COARSE:
        attempt(share)
    centre = found
    for offset in _FINE:
        attempt(centre + offset)
    return found * largest


def quantize_weight(
    weight: torch.Tensor, group_size: int, codebook: Codebook = "midrise"
) -> tuple[torch.Tensor, torch.Tensor]:
    """INT4 codes uint8 [N, ceil(K / 2)] and clips float32 [N, groups] of a weight [N, K], each group with its own
    clip.
    """
    clips = weight_clips(weight, group_size, codebook)
    row = torch.arange(weight.shape[0], dtype=torch.int32, device=weight.device)
    # Each row of the weight is a "language" with its own row of the table of clips.
    codes: torch.Tensor = ops.quantize(weight.float(), clips, row, group_size=group_size, codebook=codebook)
    return codes, clips


class LanguageAwareModule(nn.Module):
    """What quantized modules share: the configuration, the model's `LanguageState`, and clips that stay float32."""

    def __init__(self, config: QuantConfig, state: LanguageState) -> None:
        super().__init__()
        self.config = config
        self.state = state

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        exact = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and name.endswith(("weight_scale", "clip"))
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:  # model.to(bfloat16) would have rounded the clips
                setattr(self, name, before.to(after.device))
        return self


class LanguageAwareLinear(LanguageAwareModule):
    """A linear layer with INT4 weights whose input is quantized with the clip of each token's language.

    y = dequantize(quantize(x)) W^T + bias, both factors rotated when `config.rotate`. With `config.weights == 16` the
    weight stays in its dtype (rotated) and only the input is quantized; this isolates what the activations' clips
    cost.

    Buffers: `weight` uint8 [N, ceil(K / 2)] or the float [N, K]; `weight_scale` float32 [N, groups], the clips of the
    weight; `bias` [N] or None; `clip` float32 [rows, groups], the clip (static) or the factor (dynamic) by row of the
    language table, None with 16-bit activations; `signs` int8 [K] of the rotation, or None. The clips keep float32
    whatever `to(dtype)` does to the model.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    clip: torch.Tensor | None
    signs: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: QuantConfig,
        state: LanguageState,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty layer for a checkpoint to fill; `from_linear` makes one of a trained layer."""
        super().__init__(config, state)
        if config.weights == 16 and config.activations == 16:
            raise LaAciqError(
                "weights = 16 and activations = 16: a linear layer has nothing to quantize; expected 4 for one of them"
            )
        self.in_features, self.out_features = in_features, out_features
        self.block_size = rotation.block_size(in_features) if config.rotate else 0
        weight_groups = -(-in_features // config.group_size) if config.group_size else 1
        packed = config.weights == 4

        def empty(*shape: int, dtype: torch.dtype | None) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        weight = (
            empty(out_features, -(-in_features // 2), dtype=torch.uint8)
            if packed
            else empty(out_features, in_features, dtype=dtype)
        )
        self.register_buffer("weight", weight)
        self.register_buffer(
            "weight_scale", empty(out_features, weight_groups, dtype=torch.float32) if packed else None
        )
        self.register_buffer("bias", empty(out_features, dtype=dtype) if bias else None)
        quantized_input = config.activations < 16
        clip = empty(len(state.rows), config.groups(in_features), dtype=torch.float32) if quantized_input else None
        self.register_buffer("clip", clip)
        self.register_buffer("signs", empty(in_features, dtype=torch.int8) if config.rotate else None)

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        config: QuantConfig,
        state: LanguageState,
        clip: torch.Tensor | None,
        *,
        seed: int = 0,
        name: str = "linear",
        like: "LanguageAwareLinear | None" = None,
    ) -> "LanguageAwareLinear":
        """Quantize a trained layer (see `models.linear_weight`), which is left as it is.

        clip: float32 [rows, groups] as `config` asks for, every entry finite and positive; None with 16-bit
        activations.
        seed: of the rotation's signs, the profile's. name: for messages. like: this layer as it was quantized before;
        its weights are shared instead of made again where they would come out the same. Raises `LaAciqError` when the
        weight has NaN or Inf, or when the clip table does not fit.
        """
        weight = check_weight(linear, name)
        n, k = weight.shape
        layer = cls(k, n, linear.bias is not None, config, state, dtype=weight.dtype, device=weight.device)
        if layer.signs is not None:
            layer.signs.copy_(torch.from_numpy(rotation.signs(k, seed)))
        if like is not None and layer._same_weights(like):
            layer.weight, layer.weight_scale = like.weight, like.weight_scale
        else:
            layer._set_weights(weight)
        if layer.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        if layer.clip is not None:
            layer.clip.copy_(check_clips(clip, tuple(layer.clip.shape), name))
        return layer

    def _set_weights(self, weight: torch.Tensor) -> None:
        """Fill the weight buffers from the trained weight [N, K], rotated first where the layer has signs."""
        if self.signs is not None:
            weight = ops.rotate(weight.float(), self.signs, self.block_size)
        if self.weight_scale is None:
            self.weight.copy_(weight)
            return
        codes, clips = quantize_weight(weight, self.config.group_size, self.config.codebook)
        self.weight.copy_(codes)
        self.weight_scale.copy_(clips)

    def _same_weights(self, other: "LanguageAwareLinear") -> bool:
        """Whether the two layers, made from one trained layer, have the same weight buffers."""
        settings = [(c.weights, c.group_size, c.codebook) for c in (self.config, other.config)]
        if settings[0] != settings[1] or (self.signs is None) != (other.signs is None):
            return False
        return self.signs is None or other.signs is None or torch.equal(self.signs, other.signs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        config = self.config
        language = self.state.ids_for(x) if self.clip is not None else None
        if self.weight_scale is None:
            rounded = round_trip(
                x, self.clip, language, config, config.activation_group_size, self.signs, self.block_size
            )
            return nn.functional.linear(rounded, self.weight, self.bias)
        return ops.linear(
            x,
            self.weight,
            self.weight_scale,
            self.bias,
            group_size=config.group_size,
            weight_codebook=config.codebook,
            signs=self.signs,
            block_size=self.block_size,
            activation_bits=config.activations,
            activation_clip=config.clip,
            clip=self.clip,
            language=language,
            activation_group_size=config.activation_group_size,
            activation_codebook=config.codebook,
        )

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weights={config.weights}, activations={config.activations}, clip={config.clip!r}, rotate={config.rotate}"
        )


def round_trip(
    x: torch.Tensor,
    clip: torch.Tensor | None,
    language: torch.Tensor | None,
    config: QuantConfig,
    group_size: int,
    signs: torch.Tensor | None = None,
    block_size: int = 0,
) -> torch.Tensor:
    """x after INT4 with the configuration's clip: quantized and dequantized (in the rotated basis when signs are
    given).
    """
    if clip is None:
        raise ValueError("clip: expected the table of clips, got None")
    size, codebook = group_size, config.codebook
    if config.clip == "static":
        codes = ops.quantize(x, clip, language, group_size=size, codebook=codebook, signs=signs, block_size=block_size)
        return ops.dequantize(codes, clip, language, k=x.shape[-1], group_size=size, codebook=codebook, dtype=x.dtype)
    codes, scales = ops.quantize_dynamic(
        x,
        clip,
        language,
        group_size=size,
        statistic=config.clip,
        codebook=codebook,
        signs=signs,
        block_size=block_size,
    )
    return ops.dequantize(codes, scales=scales, k=x.shape[-1], group_size=size, codebook=codebook, dtype=x.dtype)


def check_weight(linear: nn.Module, name: str) -> torch.Tensor:
    """The layer's weight [N, K], when all of it is finite; otherwise a `LaAciqError` that names the layer."""
    weight = linear_weight(linear)
    if weight is None:
        raise LaAciqError(f"layer {name!r} is a {type(linear).__name__}; expected a torch.nn.Linear or GPT-2's Conv1D")
    check_finite(weight, name)
    return weight.detach()


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Raises `LaAciqError` when a layer's weight has NaN or infinite values."""
    bad = int((~torch.isfinite(weight.detach())).sum())
    if bad:
        raise LaAciqError(f"layer {name!r}: {bad} of its {weight.numel()} weights are NaN or infinite; expected none")


def check_clips(clip: torch.Tensor | None, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """The table itself, when it has this shape and every entry is finite and positive; otherwise a `LaAciqError`."""
    if clip is None or tuple(clip.shape) != shape:
        found = "none" if clip is None else f"one of shape {list(clip.shape)}"
        raise LaAciqError(f"layer {name!r}: expected a clip table of shape [rows, groups] = {list(shape)}, got {found}")
    if not bool((torch.isfinite(clip) & (clip > 0)).all()):
        raise LaAciqError(f"layer {name!r}: its clip table has an entry that is not finite and positive")
    return clip

"""The quantized linear layer: INT4 weights, and an activation clip looked up by the language of each token."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from .. import ops
from ..errors import LaAciqError
from ..models import linear_weight
from ..ops import rotation
from ..ops.backends import WHY_NO_CORE
from ..tags import SINK
from .config import QuantConfig
from .forward_pass import LanguageState
from .shared import SharedInput
from .weights import Rounding, quantize_weight


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

    With `config.center` the mean input mu of the token's row of the language table is known: the input is quantized
    less mu, and the row's bias makes up for it. With V the quantized weight, y = V quantize(x - mu) + (W mu + bias);
    with 16-bit inputs, and those of the sink, y = V x + ((W - V) mu + bias), which takes the mean error of the weights'
    rounding off (bias correction, Nagel et al. 2019, here by language).

    Buffers: `weight` uint8 [N, ceil(K / 2)] or the float [N, K], and once the layer is `repack`ed int32
    [N / 16, K / 8, 16]; `weight_scale` float32 [N, groups], the clips of the
    weight; `bias` [N] or None, with centers [rows, N]; `center` [rows, K] or None; `clip` float32 [rows, groups], the
    clip (static) or the factor (dynamic) by row of the language table, None with 16-bit activations; `signs` int8 [K]
    of the rotation, or None. The clips keep float32 whatever `to(dtype)` does to the model.

    A state dict, and so a checkpoint, has the portable weight (`portable_weight`) whatever the layer holds, and loading
    one takes that. What was loaded or moved to the CPU is repacked there, what leaves the CPU is restored first.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    center: torch.Tensor | None
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
        self.rounded_by: str | None = None  # SHA-256 of the second moments, where `from_linear` was given some
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
        rows = (len(state.entries),) if config.center else ()
        self.register_buffer("bias", empty(*rows, out_features, dtype=dtype) if bias or config.center else None)
        centered = config.center and config.activations < 16
        self.register_buffer("center", empty(*rows, in_features, dtype=dtype) if centered else None)
        quantized_input = config.activations < 16
        clip = empty(len(state.entries), config.groups(in_features), dtype=torch.float32) if quantized_input else None
        self.register_buffer("clip", clip)
        self.register_buffer("signs", empty(in_features, dtype=torch.int8) if config.rotate else None)
        self.shared: SharedInput | None = None
        self.place = 0
        self._views: dict[str, tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        settings: dict[str, Any] = {
            "group_size": config.group_size,
            "weight_codebook": config.codebook,
            "block_size": self.block_size,
        }
        if quantized_input:
            settings |= {
                "activation_bits": config.activations,
                "activation_clip": config.clip,
                "activation_group_size": config.activation_group_size,
                "activation_codebook": config.codebook,
            }
        self._options = ops.linear_options(**settings)

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        config: QuantConfig,
        state: LanguageState,
        clip: torch.Tensor | None,
        *,
        center: torch.Tensor | None = None,
        seed: int = 0,
        name: str = "linear",
        second_moments: torch.Tensor | Rounding | None = None,
        like: "LanguageAwareLinear | None" = None,
    ) -> "LanguageAwareLinear":
        """Quantize a trained layer (see `models.linear_weight`), which is left as it is.

        Its weight is portable; `repack` it for the CPU.

        clip: float32 [rows, groups] as `config` asks for, every entry finite and positive; None with 16-bit
        activations.
        center: float32 [rows, K], the mean input of each row, with `config.center`; otherwise not used.
        seed: of the rotation's signs, the profile's. name: for messages. second_moments: [K, K], the sum of x x^T over
        the layer's inputs, rotated as the layer rotates them, or the `Rounding` made of them; needed where
        `config.rounding` is "feedback" and weights have 4 bits, used with "auto", which rounds to nearest without them,
        and not with "nearest". like: this layer as it was quantized before; its weights are shared instead of made
        again where they would come out the same. Raises `LaAciqError` when the weight has NaN or Inf, or when the
        clips, the centers or the second moments do not fit.
        """
        weight = check_weight(linear, name)
        n, k = weight.shape
        layer = cls(k, n, linear.bias is not None, config, state, dtype=weight.dtype, device=weight.device)
        if layer.signs is not None:
            layer.signs.copy_(torch.from_numpy(rotation.signs(k, seed)))
        rounding = layer._rounding(second_moments, name)
        layer.rounded_by = None if rounding is None else rounding.digest
        if like is not None and layer._same_weights(like):
            layer.weight, layer.weight_scale = like.weight, like.weight_scale
        else:
            try:
                layer._set_weights(weight, rounding)
            except ValueError as error:
                raise LaAciqError(f"layer {name!r}: {error}") from error
        if layer.bias is not None:
            layer.bias.zero_()
        if layer.bias is not None and linear.bias is not None:
            layer.bias.add_(linear.bias.detach())
        if config.center:
            layer._set_center(check_center(center, (len(state.entries), k), name).to(weight.device), weight)
        if layer.clip is not None:
            layer.clip.copy_(check_clips(clip, tuple(layer.clip.shape), name))
        return layer

    def _rounding(self, given: torch.Tensor | Rounding | None, name: str) -> Rounding | None:
        """What the weights are to be rounded by; None for rounding to nearest."""
        if self.config.rounding == "nearest" or self.weight_scale is None:
            return None
        if given is None:
            if self.config.rounding == "auto":
                return None
            raise LaAciqError(f"layer {name!r}: rounding = 'feedback' needs second moments of its input, got none")
        try:
            return given if isinstance(given, Rounding) else Rounding(given)
        except ValueError as error:
            raise LaAciqError(f"layer {name!r}: {error}") from error

    def _set_weights(self, weight: torch.Tensor, rounding: Rounding | None) -> None:
        """Fill the weight buffers from the trained weight [N, K], rotated first where the layer has signs."""
        if self.signs is not None:
            weight = ops.rotate(weight.float(), self.signs, self.block_size)
        if self.weight_scale is None:
            self.weight.copy_(weight)
            return
        codes, clips = quantize_weight(weight, self.config.group_size, self.config.codebook, rounding)
        self.weight.copy_(codes)
        self.weight_scale.copy_(clips)

    def _set_center(self, mean: torch.Tensor, weight: torch.Tensor) -> None:
        """Fill `center` and add to the rows of `bias` what makes up for it: mean inputs [rows, K], weight [N, K]."""
        if self.bias is None:
            raise RuntimeError("a layer with centers has a bias")
        weight = weight.float()
        if self.signs is not None:
            weight = ops.rotate(weight, self.signs, self.block_size)
        if self.weight_scale is None:
            rounded = self.weight.float()
        else:
            row = torch.arange(len(weight), dtype=torch.int32, device=weight.device)
            size, codebook = self.config.group_size, self.config.codebook
            rounded = ops.dequantize(
                self.portable_weight, self.weight_scale, row, k=self.in_features, group_size=size, codebook=codebook
            )
        center = torch.zeros_like(mean)
        if self.center is not None:
            self.center.copy_(mean)
            if SINK in self.state.entries:
                self.center[self.state.entries.index(SINK)] = 0
            center = self.center.float()
        if self.signs is not None:
            mean, center = (ops.rotate(x, self.signs, self.block_size) for x in (mean, center))
        self.bias.add_(mean @ (weight - rounded).T + center @ rounded.T)

    def _same_weights(self, other: "LanguageAwareLinear") -> bool:
        """Whether the two layers, made from one trained layer, have the same weight buffers."""
        settings = [(x.config.weights, x.config.group_size, x.config.codebook, x.rounded_by) for x in (self, other)]
        if settings[0] != settings[1] or (self.signs is None) != (other.signs is None):
            return False
        return self.signs is None or other.signs is None or torch.equal(self.signs, other.signs)

    @property
    def portable_weight(self) -> torch.Tensor:
        """uint8 [N, ceil(K / 2)], the even index in the low nibble, or the float [N, K]: the buffer itself, or where
        that is repacked a copy.
        """
        weight = self.weight
        return ops.restore_weight(weight, self.out_features, self.in_features) if _repacked(weight) else weight

    def repack(self) -> None:
        """Hold INT4 weights in the layout that the CPU kernel reads fastest (`la_aciq.repack_weight`), instead of the
        portable one, where they can be and take no more memory.

        That is on the CPU, with N a multiple of 16 and K and the groups multiples of 8. Modules that accelerate moves
        between devices are left alone, and so is everything without the compiled kernels.
        """
        weight = self._buffers["weight"]
        if (
            weight is None
            or weight.dtype != torch.uint8
            or weight.device.type != "cpu"
            or self.out_features % 16
            or self.in_features % 8
            or self.config.group_size % 8
            or hasattr(self, "_hf_hook")
            or WHY_NO_CORE is not None
        ):
            return
        self._buffers["weight"] = ops.repack_weight(weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        if _repacked(self.weight) and fn(self.weight.new_empty(1)).device.type != "cpu":
            self.weight = self.portable_weight
        super()._apply(fn, recurse)
        self.repack()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if _repacked(self.weight):
            destination[f"{prefix}weight"] = self.portable_weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *settings: Any
    ) -> None:
        held = self.weight
        self.weight = self.portable_weight
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *settings)
        if _repacked(held) and not local_metadata.get("assign_to_params_buffers", False):
            # Into the memory that was there, as PyTorch does: it may be joined with that of other layers.
            with torch.no_grad():
                self.weight = held.copy_(ops.repack_weight(self.weight))
        else:
            self.repack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        if self.shared is not None and not torch.compiler.is_compiling():
            return self.shared.output(self.place, x)
        # Not by attribute: nn.Module looks for those in three dictionaries, a microsecond each.
        buffers: dict[str, Any] = self._buffers
        return self.multiply(x, buffers["weight"], buffers["weight_scale"], buffers["bias"])

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """What `forward` does, with these weights: the layer's own, or joined ones of layers that share its input."""
        clip, center = self._buffers["clip"], self._buffers["center"]
        table = bias if bias is not None and bias.ndim == 2 else None
        row = None if torch.compiler.is_compiling() else self.state.common_entry
        language = None
        if row is None and (clip is not None or table is not None):
            language = self.state.ids_for(x)
        if row is not None and clip is not None:
            clip = self._row("clip", clip, row)
        if center is not None:
            own = row_of_each(center, language, x) if row is None else self._row("center", center, row)
            x = x - (own if own.dtype == x.dtype else own.to(x.dtype))
        y = self._product(x, weight, weight_scale, clip, None if table is not None else bias, language)
        if table is not None:
            # Here with one language as with several, or a row's rounding would depend on its neighbours' languages.
            own = row_of_each(table, language, y) if row is None else self._row("bias", table, row)
            y.add_(own if own.dtype == y.dtype else own.to(y.dtype))
        return y

    def _row(self, name: str, table: torch.Tensor, row: int) -> torch.Tensor:
        """A row of a table, for "clip" a table of that row, as a view that is made once."""
        known = self._views.get(name)
        if known is None or known[0] is not table:
            known = self._views[name] = table, torch.split(table, 1) if name == "clip" else table.unbind()
        return known[1][row]

    def _product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor | None,
        clip: torch.Tensor | None,
        bias: torch.Tensor | None,
        language: torch.Tensor | None,
    ) -> torch.Tensor:
        config = self.config
        signs = self._buffers["signs"]
        if weight_scale is None:
            rounded = round_trip(x, clip, language, config, config.activation_group_size, signs, self.block_size)
            return nn.functional.linear(rounded, weight, bias)
        if clip is None:
            language = None
        return ops.linear_unchecked(x, weight, weight_scale, bias, signs, clip, language, self._options)

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weights={config.weights}, activations={config.activations}, clip={config.clip!r}, rotate={config.rotate}"
        )


def _repacked(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.int32


def row_of_each(table: torch.Tensor, language: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The rows of a table [rows, n] that belong to the tokens of x [..., K]: [..., n], broadcastable to x's leading
    dimensions. language: int32 ids that match those from the left; None is the pooled row.
    """
    if language is None:
        return table[0]
    found = nn.functional.embedding(language, table)
    return found.view(*language.shape, *[1] * (x.ndim - 1 - language.ndim), table.shape[1])


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
    codes, row_clips = ops.quantize_dynamic(
        x,
        clip,
        language,
        group_size=size,
        statistic=config.clip,
        codebook=codebook,
        signs=signs,
        block_size=block_size,
    )
    return ops.dequantize(codes, row_clips=row_clips, k=x.shape[-1], group_size=size, codebook=codebook, dtype=x.dtype)


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


def check_center(center: torch.Tensor | None, shape: tuple[int, int], name: str) -> torch.Tensor:
    """The mean inputs themselves, when they have this shape and are finite; otherwise a `LaAciqError`."""
    if center is None or tuple(center.shape) != shape:
        found = "none" if center is None else f"some of shape {list(center.shape)}"
        raise LaAciqError(f"layer {name!r}: expected mean inputs of shape [rows, K] = {list(shape)}, got {found}")
    if not bool(torch.isfinite(center).all()):
        raise LaAciqError(f"layer {name!r}: its mean inputs are not all finite")
    return center

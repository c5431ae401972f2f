"""The quantized linear layer: INT4 weights, and an activation clip looked up by the language of each token."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from .. import ops
from .._deprecated import warn_renamed
from ..errors import LaAciqError
from ..models import linear_weight
from ..ops import rotation
from ..ops.backends import WHY_NO_CORE
from ..tags import SINK
from .config import QuantConfig
from .dequantized import DequantizedWeight
from .forward_pass import LanguageState
from .joined import JoinedLayers
from .weights import Rounding, quantize_weight

# Names that the tensors of a layer with INT4 weights had in 0.1, in its state dicts and in folders of schema 2.
RENAMED_BUFFERS = {"weight": "weight_codes", "weight_scale": "weight_clip", "clip": "clips"}


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
            if buffer is not None and name.endswith(("clip", "clips"))
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

    With `config.center` the mean input mu of the token's entry is known: the input is quantized less mu, and the
    entry's bias makes up for it. With V the quantized weight, y = V quantize(x - mu) + (W mu + bias); with 16-bit
    inputs, and those of the sink, y = V x + ((W - V) mu + bias), which takes the mean error of the weights' rounding
    off (bias correction, Nagel et al. 2019, here by language).

    Buffers: `weight_codes` uint8 [N, ceil(K / 2)], and `weight_clip` float32 [N, groups], the clips of the weight; with
    16-bit weights `weight` [N, K] instead of both; `bias` [N] or None, with centers [entries, N]; `center` [entries, K]
    or None; `clips` float32 [entries, groups], the clip (static) or the factor (dynamic) by entry, None with 16-bit
    activations; `signs` int8 [K] of the rotation, or None. The clips keep float32 whatever `to(dtype)` does to the
    model.

    In memory the codes are `repack`ed on a CPU, int32 [N / 16, K / 8, 16], and may lie beside those of layers that read
    the same tensor. The attribute `weight_codes`, a state dict, and so a checkpoint, have the portable codes in a
    storage of their own, and loading takes those. What was loaded or moved to the CPU is repacked there, what leaves
    the CPU is restored first.

    Attributes: in_features, out_features: K and N. block_size: of the rotation, 0 without. compute_dtype: dtype of the
    layer's weight before it was quantized, which follows `to(dtype)`. rounded_by: SHA-256 of the second moments that
    the weights were rounded by, or None.
    """

    weight_clip: torch.Tensor | None
    bias: torch.Tensor | None
    center: torch.Tensor | None
    clips: torch.Tensor | None
    signs: torch.Tensor | None
    layout: str | None = None  # how the rows of the input belong to tokens (nn/layout.py); None: by its shape

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
        """Make an empty layer for a checkpoint to fill; `from_linear` makes one of a trained layer.

        Args:
            in_features: K.
            out_features: N.
            bias: whether the layer has a bias of its own; with centers it has one in any case.
            config: how the layer is quantized.
            state: the model's language ids.
            dtype: of biases, centers and 16-bit weights; None for PyTorch's default.
            device: of all buffers; None for PyTorch's default.

        Raises:
            LaAciqError: weights and activations both have 16 bits.
        """
        super().__init__(config, state)
        self.rounded_by: str | None = None
        if config.weights == 16 and config.activations == 16:
            raise LaAciqError(
                "weights = 16 and activations = 16: a linear layer has nothing to quantize; expected 4 for one of them"
            )
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = dtype or torch.get_default_dtype()
        self.trained_bias = bias  # with centers there is a bias in any case
        self.block_size = rotation.block_size(in_features) if config.rotate else 0
        weight_groups = -(-in_features // config.group_size) if config.group_size else 1

        def empty(*shape: int, dtype: torch.dtype | None) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        codes = clip = None
        if config.weights == 4:
            codes = empty(out_features, -(-in_features // 2), dtype=torch.uint8)
            clip = empty(out_features, weight_groups, dtype=torch.float32)
        else:
            self._buffers["weight"] = empty(out_features, in_features, dtype=dtype)
        self._buffers["weight_codes"] = codes  # not registered: the class has properties of these two names
        self.register_buffer("weight_clip", clip)
        entries = (len(state.entries),) if config.center else ()
        self.register_buffer("bias", empty(*entries, out_features, dtype=dtype) if bias or config.center else None)
        quantized_input = config.activations < 16
        centered = config.center and quantized_input
        self.register_buffer("center", empty(*entries, in_features, dtype=dtype) if centered else None)
        clips = empty(len(state.entries), config.groups(in_features), dtype=torch.float32) if quantized_input else None
        self.register_buffer("clips", clips)
        self.register_buffer("signs", empty(in_features, dtype=torch.int8) if config.rotate else None)
        self.joined_layers: JoinedLayers | None = None
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
        clips: torch.Tensor | None,
        *,
        center: torch.Tensor | None = None,
        seed: int = 0,
        name: str = "linear",
        second_moments: torch.Tensor | Rounding | None = None,
        like: "LanguageAwareLinear | None" = None,
    ) -> "LanguageAwareLinear":
        """Quantize a trained layer, which is left as it is. The codes are portable; `repack` them for the CPU.

        Args:
            linear: a linear layer (see `models.linear_weight`) with a weight [N, K] of any float dtype.
            config: how the layer is quantized.
            state: the model's language ids.
            clips: float32 [entries, groups] as `config` asks for, each finite and positive; None with 16-bit
                activations.
            center: float32 [entries, K], the mean input of each entry, with `config.center`; otherwise not used.
            seed: of the rotation's signs, the profile's.
            name: of the layer, for messages.
            second_moments: [K, K], the sum of x x^T over the layer's inputs, rotated as the layer rotates them, or the
                `Rounding` made of them; needed where `config.rounding` is "feedback" and weights have 4 bits, used with
                "auto", which rounds to nearest without them, and not used with "nearest".
            like: this layer as it was quantized before; its weights are shared instead of made again where they would
                come out the same.

        Returns:
            The quantized layer, on the device of the trained one.

        Raises:
            LaAciqError: the weight has NaN or Inf, or the clips, the centers or the second moments do not fit.
        """
        weight = check_weight(linear, name)
        n, k = weight.shape
        layer = cls(k, n, linear.bias is not None, config, state, dtype=weight.dtype, device=weight.device)
        if layer.signs is not None:
            layer.signs.copy_(torch.from_numpy(rotation.signs(k, seed)))
        rounding = layer._rounding(second_moments, name)
        layer.rounded_by = None if rounding is None else rounding.digest
        if like is not None and layer._same_weights(like):
            for buffer in ("weight", "weight_codes", "weight_clip"):
                if layer._buffers.get(buffer) is not None:
                    layer._buffers[buffer] = like._buffers[buffer]
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
        if layer.clips is not None:
            layer.clips.copy_(check_clips(clips, tuple(layer.clips.shape), name))
        return layer

    def _rounding(self, second_moments: torch.Tensor | Rounding | None, name: str) -> Rounding | None:
        """What the weights are to be rounded by; None for rounding to nearest."""
        if self.config.rounding == "nearest" or self.weight_clip is None:
            return None
        if second_moments is None:
            if self.config.rounding == "auto":
                return None
            raise LaAciqError(f"layer {name!r}: rounding = 'feedback' needs second moments of its input, got none")
        try:
            return second_moments if isinstance(second_moments, Rounding) else Rounding(second_moments)
        except ValueError as error:
            raise LaAciqError(f"layer {name!r}: {error}") from error

    def _set_weights(self, weight: torch.Tensor, rounding: Rounding | None) -> None:
        """Fill the weight buffers from the trained weight [N, K], rotated first where the layer has signs."""
        if self.signs is not None:
            weight = ops.rotate(weight.float(), self.signs, self.block_size)
        buffers: dict[str, Any] = self._buffers
        if self.weight_clip is None:
            buffers["weight"].copy_(weight)
            return
        codes, clips = quantize_weight(weight, self.config.group_size, self.config.codebook, rounding)
        buffers["weight_codes"].copy_(codes)
        self.weight_clip.copy_(clips)

    def _set_center(self, mean: torch.Tensor, weight: torch.Tensor) -> None:
        """Fill `center` and add to `bias` what makes up for it: mean inputs [entries, K], trained weight [N, K]."""
        if self.bias is None:
            raise RuntimeError("a layer with centers has a bias")
        weight = weight.float()
        if self.signs is not None:
            weight = ops.rotate(weight, self.signs, self.block_size)
        rounded = self._rotated_weight()
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

    # --- The weight in its several forms ------------------------------------------------------------------------------

    @property
    def weight(self) -> torch.Tensor:
        """The weight [N, K] that the layer stands for, of `compute_dtype`, for code that asks it for dtype, device or
        shape. With 4-bit weights its values are dequantized by each operation that reads them and cannot be written;
        with 16 bits it is the buffer, in the rotated basis.
        """
        buffers: dict[str, Any] = self._buffers
        if "weight" in buffers:
            stored: torch.Tensor = buffers["weight"]
            return stored
        device, shape = buffers["weight_codes"].device, (self.out_features, self.in_features)
        if torch.compiler.is_compiling():  # which asks for no more than its dtype, device and shape; a product is NaN
            return torch.full((), torch.nan, dtype=self.compute_dtype, device=device).expand(shape)
        return DequantizedWeight(self._original_weight, shape, self.compute_dtype, device)

    @property
    def weight_codes(self) -> torch.Tensor | None:
        """The portable codes, uint8 [N, ceil(K / 2)], the even index in the low nibble; None with 16-bit weights.

        It is the buffer itself, or where that is repacked a copy.
        """
        codes = self._buffers["weight_codes"]
        if codes is None or not _repacked(codes):
            return codes
        return ops.restore_weight(codes, self.out_features, self.in_features)

    @property
    def portable_weight(self) -> torch.Tensor:
        """What a state dict has of the weight: uint8 [N, ceil(K / 2)] codes, or the float [N, K]."""
        codes = self.weight_codes
        return self.weight if codes is None else codes

    def _rotated_weight(self) -> torch.Tensor:
        """The weight float32 [N, K] that inputs are multiplied with, rotated where they are."""
        codes = self.weight_codes
        if codes is None or self.weight_clip is None:
            return self.weight.float()
        row = torch.arange(self.out_features, dtype=torch.int32, device=codes.device)
        size, codebook = self.config.group_size, self.config.codebook
        return ops.dequantize(codes, self.weight_clip, row, k=self.in_features, group_size=size, codebook=codebook)

    def _original_weight(self) -> torch.Tensor:
        """The same in the basis of the layer's input."""
        weight = self._rotated_weight()
        if self.signs is None:
            return weight
        # The Hadamard transform is its own inverse, and `rotate` takes the signs first.
        return ops.rotate(weight, torch.ones_like(self.signs), self.block_size) * self.signs

    def repack(self) -> None:
        """Hold INT4 codes in the layout that the CPU kernel reads fastest (`la_aciq.repack_weight`), instead of the
        portable one, where they can be and take no more memory.

        That is on the CPU, with N a multiple of 16 and K and the groups multiples of 8. Layers that accelerate moves
        between devices are left alone, and so is everything without the compiled kernels.
        """
        codes = self._buffers["weight_codes"]
        if (
            codes is None
            or codes.dtype != torch.uint8
            or codes.device.type != "cpu"
            or self.out_features % 16
            or self.in_features % 8
            or self.config.group_size % 8
            or "_old_forward" in self.__dict__
            or WHY_NO_CORE is not None
        ):
            return
        self._buffers["weight_codes"] = ops.repack_weight(codes)

    # --- What moves, copies, saves and loads a layer ------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_old_forward":
            # accelerate is about to hook the layer and move, tensor by tensor, what its state dict names.
            if self.joined_layers is not None:
                self.joined_layers.part()
            self._buffers["weight_codes"] = self.weight_codes
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        device = next(buffer.device for buffer in self._buffers.values() if buffer is not None)
        probe = fn(torch.empty(1, dtype=self.compute_dtype, device=device))
        if probe.device.type != "cpu":
            self._buffers["weight_codes"] = self.weight_codes
        super()._apply(fn, recurse)
        self.compute_dtype = probe.dtype
        self.repack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickles: tensors whose storage has nothing of other layers."""
        buffers = {
            name: None if buffer is None else _with_own_storage(buffer) for name, buffer in self._buffers.items()
        }
        return self.__dict__ | {"_buffers": buffers, "_views": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A layer copied without its model takes no other layer's weights along."""
        if self.joined_layers is not None and self.state.copied_with(memo):
            state = self.__dict__ | {"_views": {}}
        else:
            state = self.__getstate__()
        copied: Self = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return copied

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                portable = self.portable_weight if name == "weight_codes" else buffer.detach()
                destination[f"{prefix}{name}"] = _with_own_storage(portable)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *settings: Any
    ) -> None:
        held = self._buffers["weight_codes"]
        rename_buffers(state_dict, prefix, packed=held is not None)
        codes = state_dict.get(f"{prefix}weight_codes")
        if held is not None and codes is not None and codes.dtype != torch.uint8:
            # PyTorch would cast other numbers to codes.
            dtype = str(codes.dtype).removeprefix("torch.")
            settings[-1].append(f"{prefix}weight_codes: expected uint8 codes, got {dtype}")
            return
        self._buffers["weight_codes"] = self.weight_codes
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *settings)
        loaded = self._buffers["weight_codes"]
        if held is None or loaded is None:
            return
        if _repacked(held) and not local_metadata.get("assign_to_params_buffers", False):
            # Into the memory that was there, as PyTorch does: it may be joined with that of other layers.
            with torch.no_grad():
                self._buffers["weight_codes"] = held.copy_(ops.repack_weight(loaded))
        else:
            self.repack()

    # --- The forward pass ---------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs [..., N] of inputs x [..., K], float32, bfloat16 or float16, in x's dtype.

        Outside of a forward pass of the model every token has the pooled entry. No gradient reaches x: a backward pass
        through the layer warns.
        """
        if self.joined_layers is not None and not torch.compiler.is_compiling():
            return self.joined_layers.output(self.place, x)
        # Not by attribute: nn.Module looks for those in three dictionaries, a microsecond each.
        buffers: dict[str, Any] = self._buffers
        codes = buffers["weight_codes"]
        return self.multiply(x, buffers["weight"] if codes is None else codes, buffers["weight_clip"], buffers["bias"])

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, weight_clip: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """What `forward` does, with these weights: the layer's own, or joined ones of layers that share its input.

        Args:
            x: The input [..., K], float32, bfloat16 or float16.
            weight: Codes, uint8 [N, ceil(K / 2)] or repacked int32 [N / 16, K / 8, 16]; with 16-bit weights [N, K] of
                the layer's dtype.
            weight_clip: float32 [N, groups]; None with 16-bit weights.
            bias: [N], with centers [entries, N], of the layer's dtype; or None.

        Returns:
            The output [..., N], in x's dtype.

        Raises:
            RuntimeError: It is not known which token a row of x belongs to (`LanguageState.ids_for`).
            LaAciqError: x does not have the layer's layout.
        """
        clips, center = self._buffers["clips"], self._buffers["center"]
        table = bias if bias is not None and bias.ndim == 2 else None
        entry = None if torch.compiler.is_compiling() or self.layout == "none" else self.state.common_entry
        language_ids = None
        if entry is None and (clips is not None or table is not None):
            language_ids = self.state.ids_for(x, self.layout)
        if entry is not None and clips is not None:
            clips = self._entry("clips", clips, entry)
        source = None
        if x.requires_grad and torch.is_grad_enabled():
            source, x = x, x.detach()
        if center is not None:
            mean = entries_of(center, language_ids, x) if entry is None else self._entry("center", center, entry)
            x = x - (mean if mean.dtype == x.dtype else mean.to(x.dtype))
        y = self._product(x, weight, weight_clip, clips, None if table is not None else bias, language_ids)
        if table is not None:
            # Here with one language as with several, or a row's rounding would depend on its neighbours' languages.
            biases = entries_of(table, language_ids, y) if entry is None else self._entry("bias", table, entry)
            y.add_(biases if biases.dtype == y.dtype else biases.to(y.dtype))
        if source is not None:
            # A piece of a compiled graph may return a view, which autograd lets nobody mark as written.
            y = _WithoutGradient.apply(y.clone() if y._is_view() else y, source)  # type: ignore[no-untyped-call]
        return y

    def _entry(self, name: str, table: torch.Tensor, entry: int) -> torch.Tensor:
        """An entry of a table, for "clips" a table of that entry, as a view that is made once."""
        known = self._views.get(name)
        if known is None or known[0] is not table:
            known = self._views[name] = table, torch.split(table, 1) if name == "clips" else table.unbind()
        return known[1][entry]

    def _product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_clip: torch.Tensor | None,
        clips: torch.Tensor | None,
        bias: torch.Tensor | None,
        language_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        config = self.config
        signs = self._buffers["signs"]
        if weight_clip is None:
            rounded = round_trip(x, clips, language_ids, config, config.activation_group_size, signs, self.block_size)
            return nn.functional.linear(rounded, weight, bias)
        if clips is None:
            language_ids = None
        return ops.linear_unchecked(x, weight, weight_clip, bias, signs, clips, language_ids, self._options)

    @property
    def weight_scale(self) -> torch.Tensor | None:
        """The old name of `weight_clip`."""
        warn_renamed("LanguageAwareLinear.weight_scale", "LanguageAwareLinear.weight_clip")
        return self.weight_clip

    @property
    def clip(self) -> torch.Tensor | None:
        """The old name of `clips`."""
        warn_renamed("LanguageAwareLinear.clip", "LanguageAwareLinear.clips")
        return self.clips

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weights={config.weights}, activations={config.activations}, clip={config.clip!r}, rotate={config.rotate}"
        )


def rename_buffers(state_dict: dict[str, Any], prefix: str, packed: bool) -> None:
    """Give tensors of a layer in a state dict their present names where they have those of 0.1, in place.

    packed: whether the layer has INT4 weights; `weight` keeps its name where they have 16 bits. An empty `weight`,
    which a folder has so that the unquantized model refuses it, is taken out.
    """
    weight = state_dict.get(f"{prefix}weight")
    if packed and weight is not None and weight.numel() == 0:
        del state_dict[f"{prefix}weight"]
    for old, new in RENAMED_BUFFERS.items():
        if (packed or old == "clip") and f"{prefix}{old}" in state_dict and f"{prefix}{new}" not in state_dict:
            state_dict[f"{prefix}{new}"] = state_dict.pop(f"{prefix}{old}")


def _repacked(codes: torch.Tensor) -> bool:
    return codes.dtype == torch.int32


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its storage has more than the tensor's elements."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def entries_of(table: torch.Tensor, language_ids: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The entries of a table [entries, n] that belong to the tokens of x [..., K]: [..., n], broadcastable to x's
    leading dimensions. language_ids: int32 that match those from the left; None is the pooled entry.
    """
    if language_ids is None:
        return table[0]
    entries = nn.functional.embedding(language_ids, table)
    return entries.view(*language_ids.shape, *[1] * (x.ndim - 1 - language_ids.ndim), table.shape[1])


class _WithoutGradient(torch.autograd.Function):
    """y, computed of x without a gradient; as for PyTorch's operations without one, the backward pass warns."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(y)  # the tensor itself and no view of it, which could not be written in place
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        warnings.warn(
            "autograd: quantized activations have no gradient, and none reaches what a quantized layer reads; expected "
            "the unquantized model for training",
            stacklevel=2,
        )
        return None, None


def round_trip(
    x: torch.Tensor,
    clips: torch.Tensor | None,
    language_ids: torch.Tensor | None,
    config: QuantConfig,
    group_size: int,
    signs: torch.Tensor | None = None,
    block_size: int = 0,
) -> torch.Tensor:
    """x [..., K] after INT4 with the configuration's clips: quantized and dequantized, in x's dtype, in the rotated
    basis when signs are given.
    """
    if clips is None:
        raise ValueError("clips: expected the table of clips, got None")
    k, size, codebook = x.shape[-1], group_size, config.codebook
    if config.clip == "static":
        codes = ops.quantize(
            x, clips, language_ids, group_size=size, codebook=codebook, signs=signs, block_size=block_size
        )
        return ops.dequantize(codes, clips, language_ids, k=k, group_size=size, codebook=codebook, dtype=x.dtype)
    codes, row_clips = ops.quantize_dynamic(
        x,
        clips,
        language_ids,
        group_size=size,
        statistic=config.clip,
        codebook=codebook,
        signs=signs,
        block_size=block_size,
    )
    return ops.dequantize(codes, row_clips=row_clips, k=k, group_size=size, codebook=codebook, dtype=x.dtype)


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


def check_clips(clips: torch.Tensor | None, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """The table itself, when it has this shape and every clip is finite and positive; otherwise a `LaAciqError`."""
    if clips is None or tuple(clips.shape) != shape:
        other = "none" if clips is None else f"one of shape {list(clips.shape)}"
        raise LaAciqError(
            f"layer {name!r}: expected a clip table of shape [entries, groups] = {list(shape)}, got {other}"
        )
    if not bool((torch.isfinite(clips) & (clips > 0)).all()):
        raise LaAciqError(f"layer {name!r}: its clip table has an entry that is not finite and positive")
    return clips


def check_center(center: torch.Tensor | None, shape: tuple[int, int], name: str) -> torch.Tensor:
    """The mean inputs themselves, when they have this shape and are finite; otherwise a `LaAciqError`."""
    if center is None or tuple(center.shape) != shape:
        other = "none" if center is None else f"some of shape {list(center.shape)}"
        raise LaAciqError(f"layer {name!r}: expected mean inputs of shape [entries, K] = {list(shape)}, got {other}")
    if not bool(torch.isfinite(center).all()):
        raise LaAciqError(f"layer {name!r}: its mean inputs are not all finite")
    return center

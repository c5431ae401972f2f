"""The floating-point weight that a quantized layer stands for, for code around the layer that reads `layer.weight`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class DequantizedWeight(Tensor):
    """A read-only weight [N, K] whose values are made anew by each operation that reads them.

    Code around a linear layer asks its weight for dtype, device and shape, most often to cast activations to
    `layer.weight.dtype`. Those cost nothing here. The values are those of the INT4 codes, in the basis of the layer's
    input, whether it is rotated inside the layer or not.
    """

    _values: Callable[[], Tensor]
    _is_hf_initialized = True  # transformers would initialize it

    @staticmethod
    def __new__(
        cls, values: Callable[[], Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> "DequantizedWeight":
        """The weight of this shape, dtype and device; `values` makes it, in any floating-point dtype."""
        make: Any = Tensor._make_wrapper_subclass
        weight: DequantizedWeight = make(cls, shape, dtype=dtype, device=device, requires_grad=False)
        weight._values = values
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DequantizedWeight(shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._dequantize()

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = self._dequantize().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
        return reduced

    def _dequantize(self) -> Tensor:
        return self._values().to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            written = [
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            written += [(kwargs or {}).get("out")]
            if any(isinstance(value, cls) for value in written):
                raise RuntimeError(
                    f"weight: expected an operation that only reads the weight of a quantized layer, got {func}; its "
                    "INT4 codes are in weight_codes"
                )
        dequantized: dict[int, Tensor] = {}

        def plain(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            if id(value) not in dequantized:
                dequantized[id(value)] = value._dequantize()
            return dequantized[id(value)]

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

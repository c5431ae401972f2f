"""The INT4 operations on tensors (`functional`), streaming moments (`streaming`) and the rotation's parameters.

Names are imported at first use: `streaming` and `rotation` need NumPy alone. The first use of an operation, or of
`register`, attaches the kernels to `torch.ops.la_aciq.*`.
"""

from typing import TYPE_CHECKING

from .. import _lazy

if TYPE_CHECKING:
    from . import backends, functional, reference, rotation, streaming
    from .backends import use_backend, why_unavailable
    from .functional import (
        dequantize,
        linear,
        linear_options,
        linear_unchecked,
        moments,
        moments_state,
        quantize,
        quantize_dynamic,
        repack_weight,
        restore_weight,
        rotate,
    )
    from .streaming import Moments

__all__ = [
    "Moments",
    "backends",
    "dequantize",
    "functional",
    "linear",
    "linear_options",
    "linear_unchecked",
    "moments",
    "moments_state",
    "quantize",
    "quantize_dynamic",
    "reference",
    "repack_weight",
    "restore_weight",
    "rotate",
    "rotation",
    "streaming",
    "use_backend",
    "why_unavailable",
]

__getattr__ = _lazy(
    __name__,
    {
        "backends": ("use_backend", "why_unavailable"),
        "functional": (
            "dequantize",
            "linear",
            "linear_options",
            "linear_unchecked",
            "moments",
            "moments_state",
            "quantize",
            "quantize_dynamic",
            "repack_weight",
            "restore_weight",
            "rotate",
        ),
        "reference": (),
        "rotation": (),
        "streaming": ("Moments",),
    },
)

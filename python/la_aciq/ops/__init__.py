"""The INT4 operations on tensors (`functional`), streaming moments (`streaming`) and the rotation's parameters.

Names are imported at first use: `streaming` and `rotation` need NumPy alone. `register()`, and the first use of any
operation, makes `torch.ops.la_aciq.*` exist.
"""

from typing import TYPE_CHECKING

from .. import _lazy

if TYPE_CHECKING:
    from . import backends, functional, reference, rotation, streaming
    from .backends import register, use_backend, why_unavailable
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
        round_weights,
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
    "register",
    "repack_weight",
    "restore_weight",
    "rotate",
    "rotation",
    "round_weights",
    "streaming",
    "use_backend",
    "why_unavailable",
]

__getattr__ = _lazy(
    __name__,
    {
        "backends": ("register", "use_backend", "why_unavailable"),
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
            "round_weights",
        ),
        "reference": (),
        "rotation": (),
        "streaming": ("Moments",),
    },
)

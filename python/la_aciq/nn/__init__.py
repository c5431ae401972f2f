"""Quantized layers, the language of a request, and `quantize_model`. Names are imported at first use."""

from typing import TYPE_CHECKING

from .. import _lazy

if TYPE_CHECKING:
    from .cache import LanguageAwareCache
    from .config import QuantConfig
    from .experts import LanguageAwareExperts
    from .forward_pass import LanguageState
    from .linear import LanguageAwareLinear
    from .quantize import Quantization, bits_per_weight, quantize_model
    from .request import language, languages

__all__ = [
    "LanguageAwareCache",
    "LanguageAwareExperts",
    "LanguageAwareLinear",
    "LanguageState",
    "QuantConfig",
    "Quantization",
    "bits_per_weight",
    "language",
    "languages",
    "quantize_model",
]

__getattr__ = _lazy(
    __name__,
    {
        "cache": ("LanguageAwareCache",),
        "config": ("QuantConfig",),
        "experts": ("LanguageAwareExperts",),
        "forward_pass": ("LanguageState",),
        "linear": ("LanguageAwareLinear",),
        "quantize": ("Quantization", "bits_per_weight", "quantize_model"),
        "request": ("language", "languages"),
    },
)

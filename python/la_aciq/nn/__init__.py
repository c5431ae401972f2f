"""Quantized layers, the language of a request, and `quantize_model`. Names are imported at first use."""

from typing import TYPE_CHECKING

from .. import _lazy

if TYPE_CHECKING:
    from .cache import LanguageAwareCache
    from .config import QuantConfig
    from .context import LanguageState, language, languages
    from .experts import LanguageAwareExperts
    from .linear import LanguageAwareLinear
    from .quantize import Quantization, bits_per_weight, quantize_model

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
        "context": ("LanguageState", "language", "languages"),
        "experts": ("LanguageAwareExperts",),
        "linear": ("LanguageAwareLinear",),
        "quantize": ("Quantization", "bits_per_weight", "quantize_model"),
    },
)

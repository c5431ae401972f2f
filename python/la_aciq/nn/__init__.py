"""Quantized layers, the language of a request, and quantized models on disk."""

from typing import TYPE_CHECKING, Any

from .checkpoint import load_quantized, save_quantized
from .config import QuantConfig
from .context import LanguageState, language, languages
from .experts import LanguageAwareExperts
from .linear import LanguageAwareLinear
from .quantize import Quantization, bits_per_weight, quantize_model

if TYPE_CHECKING:
    from .cache import LanguageAwareCache

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
    "load_quantized",
    "quantize_model",
    "save_quantized",
]


def __getattr__(name: str) -> Any:
    """`LanguageAwareCache` at its first use: it builds on transformers, which the rest does without."""
    if name == "LanguageAwareCache":
        from .cache import LanguageAwareCache

        return LanguageAwareCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Quantized layers, the language of a request, and quantized models on disk."""

from .checkpoint import load_quantized, save_quantized
from .config import QuantConfig
from .context import LanguageState, language, languages
from .experts import LanguageAwareExperts
from .kv import RoundedProjection
from .linear import LanguageAwareLinear
from .quantize import Quantization, bits_per_weight, quantize_model

__all__ = [
    "LanguageAwareExperts",
    "LanguageAwareLinear",
    "LanguageState",
    "QuantConfig",
    "Quantization",
    "RoundedProjection",
    "bits_per_weight",
    "language",
    "languages",
    "load_quantized",
    "quantize_model",
    "save_quantized",
]

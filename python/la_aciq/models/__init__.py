"""Models of Hugging Face transformers: what they are (`architecture`) and loading them (`loading`)."""

from typing import TYPE_CHECKING

from .. import _lazy

if TYPE_CHECKING:
    from .architecture import (
        EXPERT_WEIGHTS,
        fingerprint,
        fingerprint_of,
        is_experts,
        is_quantized,
        linear_weight,
        output_head,
        sample,
    )
    from .loading import load_config, load_model, load_tokenizer, usable_device

__all__ = [
    "EXPERT_WEIGHTS",
    "fingerprint",
    "fingerprint_of",
    "is_experts",
    "is_quantized",
    "linear_weight",
    "load_config",
    "load_model",
    "load_tokenizer",
    "output_head",
    "sample",
    "usable_device",
]

__getattr__ = _lazy(
    __name__,
    {
        "architecture": (
            "EXPERT_WEIGHTS",
            "fingerprint",
            "fingerprint_of",
            "is_experts",
            "is_quantized",
            "linear_weight",
            "output_head",
            "sample",
        ),
        "loading": ("load_config", "load_model", "load_tokenizer", "usable_device"),
    },
)

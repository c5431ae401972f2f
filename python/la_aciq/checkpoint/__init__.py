"""Quantized models on disk: safetensors and JSON, validated when they are read, and a model card."""

from .folder import load_quantized, save_quantized

__all__ = ["load_quantized", "save_quantized"]

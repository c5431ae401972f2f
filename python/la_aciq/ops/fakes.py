"""The shapes and dtypes of the operators' results, for torch.compile and torch.export.

`register` attaches them to `torch.ops.la_aciq.*`, whose schemas are in csrc/ops.cpp, with what runs on CUDA tensors in
PyTorch.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference, rounding
from .streaming import HISTOGRAM_BINS, STATE_SIZE


def moments(
    x: Tensor, language_ids: Tensor | None = None, num_entries: int = 1, histogram: bool = False
) -> tuple[Tensor, Tensor]:
    bins = HISTOGRAM_BINS if histogram else 0
    return (
        x.new_empty((num_entries, STATE_SIZE), dtype=torch.float64),
        x.new_empty((num_entries, bins, 2), dtype=torch.int64),
    )


def quantize(
    x: Tensor,
    clips: Tensor,
    language_ids: Tensor | None = None,
    group_size: int = 0,
    codebook: str = "midrise",
    signs: Tensor | None = None,
    block_size: int = 0,
    tail_sums: bool = False,
) -> tuple[Tensor, Tensor]:
    codes = x.new_empty((*x.shape[:-1], (x.shape[-1] + 1) // 2), dtype=torch.uint8)
    num_entries = clips.shape[0] if tail_sums else 0
    return codes, x.new_empty((num_entries, clips.shape[1], 4), dtype=torch.float64)


def quantize_dynamic(
    x: Tensor,
    clip_factor: Tensor,
    language_ids: Tensor | None = None,
    group_size: int = 0,
    statistic: str = "rms",
    codebook: str = "midrise",
    signs: Tensor | None = None,
    block_size: int = 0,
) -> tuple[Tensor, Tensor]:
    codes = x.new_empty((*x.shape[:-1], (x.shape[-1] + 1) // 2), dtype=torch.uint8)
    return codes, x.new_empty((*x.shape[:-1], clip_factor.shape[1]), dtype=torch.float32)


def dequantize(
    codes: Tensor,
    clips: Tensor,
    language_ids: Tensor | None = None,
    *,
    k: int,
    group_size: int = 0,
    codebook: str = "midrise",
    per_row: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], k), dtype=dtype)


def rotate(x: Tensor, signs: Tensor, block_size: int = 0) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def linear(x: Tensor, weight: Tensor, weight_clip: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_clip.shape[0]))


def round_weights(
    weight: Tensor, second_moments: Tensor, factor: Tensor, group_size: int = 0, codebook: str = "midrise"
) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    groups = reference.group_count(k, group_size)
    return (
        weight.new_empty((n, (k + 1) // 2), dtype=torch.uint8),
        weight.new_empty((n, groups), dtype=torch.float32),
    )


def _round_weights_on_cuda(
    weight: Tensor, second_moments: Tensor, factor: Tensor, group_size: int = 0, codebook: str = "midrise"
) -> tuple[Tensor, Tensor]:
    codes, clips = rounding.round_weights(weight, second_moments, factor, group_size, codebook, torch.float32)
    return reference.pack(codes), clips


def register() -> None:
    """Attach the functions of this module to the operators; the compiled core has declared them."""
    for function in (moments, quantize, quantize_dynamic, dequantize, rotate, linear, round_weights):
        torch.library.register_fake(f"la_aciq::{function.__name__}", function)
    torch.library.impl("la_aciq::round_weights", "CUDA", _round_weights_on_cuda)

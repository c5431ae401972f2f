"""Padding that a model zeroes stays zero behind a quantized layer."""

import torch
from torch import nn

from .linear import LanguageAwareLinear


def keep_zero_rows(model: nn.Module) -> None:
    """Make the quantized layers beside a convolution over tokens map zero rows to zero rows, as they did before.

    State-space and linear attention layers zero the rows of padding, and a convolution behind a projection without a
    bias carries the projection's output from one token to the next ones. A quantized projection has the rounding error
    of its center there instead of zero, so that padding on the left would change the tokens behind it.
    """
    for parent in model.modules():
        children = list(parent.children())
        if not any(isinstance(child, nn.Conv1d) for child in children):
            continue
        for child in children:
            if isinstance(child, LanguageAwareLinear) and not child.trained_bias:
                child.register_forward_hook(_zero_rows)


def _zero_rows(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    x = args[0]
    if x.ndim < 3 or x.shape[-2] == 1:  # a decoded token is no padding
        return output
    return output.masked_fill((x == 0).all(dim=-1, keepdim=True), 0)

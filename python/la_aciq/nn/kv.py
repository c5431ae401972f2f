"""What the INT4 key and value cache and its calibration share: how keys are centered, and the tables of clips.

Without transformers, which the cache itself (nn/cache.py) builds on.
"""

from collections.abc import Mapping
from math import gcd

import torch
from torch import Tensor

from .config import QuantConfig
from .forward_pass import LanguageState
from .linear import LanguageAwareModule, check_clips

SINKS = 4  # first tokens of a sequence that stay in 16 bits
WINDOW = 32  # latest tokens that do, at least; at most WINDOW + BLOCK - 1
BLOCK = 64  # tokens quantized at once, which share a mean key


def site(layer: int, kind: str) -> str:
    """The name of a profile's site: the "key" or the "value" of an attention layer, counted as transformers does."""
    return f"cache.{layer}.{kind}"


def center(x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [blocks * BLOCK, ..., channels] less the mean of each block of tokens, in x's dtype, and the means, bfloat16
    [blocks, ..., channels]. Fewer tokens than BLOCK are one block.

    counted: bool [blocks * BLOCK, ..., 1], the tokens that a mean is of; None for all. A block without any has mean 0.
    """
    size = min(BLOCK, len(x))
    blocks = x.view(-1, size, *x.shape[1:])
    if counted is None:
        means = blocks.mean(dim=1)
    else:
        weight = counted.view(-1, size, *counted.shape[1:]).to(x.dtype)
        means = (blocks * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    means = means.to(torch.bfloat16)
    return (blocks - means.unsqueeze(1).to(x.dtype)).view_as(x), means


class KeyValueClips(LanguageAwareModule):
    """The tables of a model's INT4 cache, a submodule of the model so that they are saved with it and move with it.

    groups: per attention layer the clips per token of its keys and its values. The float32 buffer `<layer>_clip`
    [entries, groups] holds the clips (kv_clip "static") or factors ("rms") of the keys' heads and then of the values'.
    """

    NAME = "la_aciq_cache"

    def __init__(self, groups: Mapping[int, int], config: QuantConfig, state: LanguageState) -> None:
        super().__init__(config, state)
        self.groups = dict(groups)
        for layer, count in self.groups.items():
            self.register_buffer(f"{layer}_clip", torch.empty((len(state.entries), count), dtype=torch.float32))

    def fill(self, clips: Mapping[int, Tensor]) -> None:
        """Copy the tables by layer, float32 [entries, groups]. Raises `LaAciqError` for entries that are not finite and
        positive, and for a table of another shape.
        """
        for layer, table in clips.items():
            buffer = self.get_buffer(f"{layer}_clip")
            buffer.copy_(check_clips(table, tuple(buffer.shape), f"{self.NAME}.{layer}"))

    def table(self, layer: int, heads: int, key_dim: int, value_dim: int) -> Tensor:
        """float32 [entries, groups] for groups of gcd(key_dim, value_dim) channels, as the cache stores them."""
        size = gcd(key_dim, value_dim)
        clips = self.get_buffer(f"{layer}_clip")
        keys, values = clips[:, :heads], clips[:, heads:]
        return torch.cat(
            [keys.repeat_interleave(key_dim // size, dim=1), values.repeat_interleave(value_dim // size, dim=1)], dim=1
        )

"""An INT4 key and value cache, as far as its accuracy goes.

The outputs of the key and value projections are quantized to INT4 and dequantized at once, head by head, before the
rotary embedding: attention then computes with the values an INT4 cache would give back. The cache itself stays 16-bit:
this measures what an INT4 cache costs each language, and saves no memory.
"""

import torch
from torch import nn

from ..errors import LaAciqError
from .config import QuantConfig
from .context import LanguageState
from .linear import LanguageAwareLinear, LanguageAwareModule, check_clips, round_trip


class RoundedProjection(LanguageAwareModule):
    """A key or value projection whose output has been through INT4.

    `linear` is the projection, quantized or not; its output [..., heads * head_dim] has one clip (static) or one factor
    (dynamic: one scale per token and head) per head and row of the language table, in the float32 buffer `clip`
    [rows, heads].
    """

    clip: torch.Tensor

    def __init__(
        self,
        linear: nn.Linear | LanguageAwareLinear,
        heads: int,
        head_dim: int,
        config: QuantConfig,
        state: LanguageState,
    ) -> None:
        super().__init__(config, state)
        self.linear = linear
        self.heads, self.head_dim = heads, head_dim
        device = next(iter([*linear.parameters(), *linear.buffers()])).device
        self.register_buffer("clip", torch.empty((len(state.rows), heads), dtype=torch.float32, device=device))

    @classmethod
    def from_projection(
        cls,
        linear: nn.Linear | LanguageAwareLinear,
        head_dim: int,
        config: QuantConfig,
        state: LanguageState,
        clip: torch.Tensor,
        *,
        name: str = "projection",
    ) -> "RoundedProjection":
        """Wrap a projection; clip is float32 [rows, heads]. Raises `LaAciqError` when the shapes do not fit."""
        width = linear.out_features
        if head_dim < 2 or head_dim % 2 or width % head_dim:
            raise LaAciqError(
                f"layer {name!r}: its {width} outputs are not a whole number of heads of an even size {head_dim}"
            )
        layer = cls(linear, width // head_dim, head_dim, config, state)
        layer.clip.copy_(check_clips(clip, tuple(layer.clip.shape), name + " output"))
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., heads * head_dim] in x's dtype, every value one of the 16 of its head's codebook."""
        y = self.linear(x)
        return round_trip(y, self.clip, self.state.ids_for(x), self.config, self.head_dim)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, clip={self.config.clip!r}"

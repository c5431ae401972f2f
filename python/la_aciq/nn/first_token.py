"""Which token of a forward pass is its sequence's first one, and so reads the entry of the attention sink."""

from typing import Any

import torch


def first_tokens(tokens: int, device: torch.device, mask: Any, cache: Any) -> torch.Tensor:
    """True, [batch or 1, tokens], at each sequence's first token: after left padding, not in a continuation."""
    # An int, or for a static cache a tensor, which is not read back.
    past = cache.get_seq_length() if cache is not None else 0
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        first = (mask != 0).to(torch.uint8).argmax(dim=1, keepdim=True)
    else:
        first = torch.zeros((1, 1), dtype=torch.int64, device=device)
    return torch.arange(tokens, device=device) + past == first

"""Attention of a quantized Hugging Face model: transformers' "sdpa", but for one query in 16 bits on a CPU.

There `scaled_dot_product_attention` converts and packs keys and values for tiles of queries, of which a decoded token
has one. Two matrix products in float32 take a fraction of that time with the conversion of keys and values counted, and
are no less exact (docs/speed.md).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "la_aciq"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [batch, heads, queries, d], key [batch, key heads, length, d] and value
    [batch, key heads, length, d'] to [batch, queries, heads, d'].

    attention_mask: bool, True for what is seen, or a float to add; broadcastable to [batch, heads, queries, length].
    """
    if (
        torch.compiler.is_compiling()
        or query.shape[2] != 1
        or query.dtype not in (torch.bfloat16, torch.float16)
        or query.device.type != "cpu"
        or dropout
        or query.requires_grad
        or any(settings.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    ):
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
        return out
    (batch, heads, _, width), (_, shared, length, _) = query.shape, key.shape
    # A key's head serves heads / shared of the query's, side by side.
    queries = query.reshape(batch * shared, heads // shared, width).float()
    keys = key.reshape(batch * shared, length, width).float()
    values = value.reshape(batch * shared, length, value.shape[3]).float()
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.bmm(queries.mul_(scale), keys.transpose(1, 2)).view(batch, heads, 1, length)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores.masked_fill_(~attention_mask, torch.finfo(torch.float32).min)
        else:
            scores += attention_mask
    weights = torch.softmax(scores, dim=-1).view(batch * shared, heads // shared, length)
    return torch.bmm(weights, values).to(query.dtype).view(batch, 1, heads, value.shape[3]), None


def use_attention(model: nn.Module) -> None:
    """Has a model's attention go through `attention` where it goes through transformers' "sdpa"."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if all(part._can_set_attn_implementation() for part in parts):
        for part in parts:
            if part.config._attn_implementation == "sdpa":
                part.config._attn_implementation_internal = NAME


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""A two-layer Llama with random weights and random texts: real transformers code, milliseconds a pass."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61

# Grouped-query attention, odd inner width (so rotation blocks are short), weights large enough to matter.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 54,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_llama(seed=0, tie=True, dtype=torch.float32, **changes):
    """A model of these sizes, or with changes to them."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES | {"tie_word_embeddings": tie} | changes)
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def random_texts(tags=("en", "sw", "th"), tokens=2048, seed=0):
    """Token ids by tag; each language keeps to its own part of the vocabulary, so that their statistics differ."""
    random = np.random.default_rng(seed)
    return {
        tag: random.integers(1 + 15 * place, 25 + 15 * place, tokens) % VOCABULARY for place, tag in enumerate(tags)
    }

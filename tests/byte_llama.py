"""A random Llama over the bytes of UTF-8, its tokenizer, and texts: whole commands run on them in seconds."""

import itertools
from typing import Any

from tiny_llama import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = {
    "en": "The committee met on Tuesday, and nobody could say why the river had risen. ",
    "sw": "Kamati ilikutana siku ya Jumanne, na hakuna aliyejua kwa nini mto ulikuwa umejaa. ",
    "th": "คณะกรรมการประชุมกันเมื่อวันอังคาร และไม่มีใครบอกได้ว่าทำไมแม่น้ำจึงสูงขึ้น ",
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random two-layer Llama over bytes. 40 and 100 are not multiples of the groups the tests use."""
    usual = {"vocab_size": 256, "hidden_size": 40, "intermediate_size": 100, "head_dim": 10, "pad_token_id": None}
    return tiny_llama(seed, tie=False, max_position_embeddings=512, **usual | changes)


def sentences(tag: str, characters: int = 4000) -> str:
    """Text in a language: one sentence with a running number, so that no two windows are the same."""
    pieces = itertools.accumulate(f"{i}. {SENTENCES[tag]}" for i in range(characters // len(SENTENCES[tag]) + 1))
    return next(text for text in pieces if len(text) >= characters)

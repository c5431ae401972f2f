"""Attention of one query on the CPU against softmax attention written out in float64."""

import copy

import pytest
import torch
from tiny_llama import random_texts, tiny_llama
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import la_aciq
from la_aciq.nn import QuantConfig, attention, quantize_model


def expected(query, key, value, mask, scale):
    repeats = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(x.double().repeat_interleave(repeats, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "shared", "wide"), [(6, 2, 8), (3, 3, 8), (4, 1, 5)])
@pytest.mark.parametrize("masked", ["not", "bool", "bool by head", "float"])
def test_one_query(dtype, heads, shared, wide, masked, monkeypatch):
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    torch.manual_seed(heads)
    query, key = 3 * torch.randn(2, heads, 1, 8), torch.randn(2, shared, 11, 8)
    value = torch.randn(2, 11, shared, wide).transpose(1, 2)  # not contiguous
    query, key, value = (x.to(dtype) for x in (query, key, value))
    mask = torch.rand(2, heads if masked == "bool by head" else 1, 1, 11) < 0.5
    mask[..., 3] = True
    if masked == "float":
        mask = torch.randn(2, 1, 1, 11).to(dtype)
    attention_mask = None if masked == "not" else mask
    before = query.clone()
    out, weights = attention.attention(None, query, key, value, attention_mask, scaling=0.3)
    assert weights is None
    assert out.dtype == dtype
    assert torch.equal(query, before)
    exact = expected(query, key, value, attention_mask, 0.3)
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(("dtype", "queries"), [(torch.bfloat16, 5), (torch.float32, 1)])
def test_the_rest_is_left_to_transformers(dtype, queries):
    module = tiny_llama().model.layers[0].self_attn
    torch.manual_seed(0)
    query = torch.randn(2, 4, queries, 8, dtype=dtype)
    key, value = (torch.randn(2, 2, 5, 8, dtype=dtype) for _ in range(2))
    for mask in (None, torch.rand(2, 1, queries, 5) < 0.8):
        out = attention.attention(module, query, key, value, mask, scaling=0.3)[0]
        assert torch.equal(out, sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)[0])


def quantized(model, **changes):
    profile = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)
    return quantize_model(model, profile, QuantConfig(group_size=16, **changes), progress=False)


@torch.no_grad()
def test_a_quantized_model_decodes_through_it(monkeypatch):
    model = tiny_llama()
    out = quantized(model, activations=16).to(torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    plain = copy.deepcopy(out)
    plain.set_attn_implementation("sdpa")
    lengths = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *of: lengths.append(of[1].shape[2]) or bmm(*of))
    ids = torch.tensor([[0, 0, 5, 9, 12, 33], [1, 2, 3, 4, 5, 6]])
    tokens = {
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    with la_aciq.languages(["sw", "en"]):
        ours = out.generate(ids, output_logits=True, **tokens)
        assert lengths[::2] == [7, 7, 8, 8, 9, 9]  # two layers, each token but the prompt's
        assert ours.sequences.shape == (2, 10)
        theirs = plain.generate(ids, output_logits=True, **tokens)
    assert len(lengths) == 12
    torch.testing.assert_close(ours.logits[1], theirs.logits[1], rtol=0, atol=0.1)


def test_another_choice_of_attention_is_kept():
    model = tiny_llama()
    model.set_attn_implementation("eager")
    assert quantized(model).config._attn_implementation == "eager"

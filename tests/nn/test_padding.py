"""Padding that a model zeroes stays zero behind quantized layers, so that it does not reach the tokens behind it."""

import numpy as np
import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

import la_aciq
from la_aciq.checkpoint import load_quantized
from la_aciq.nn import QuantConfig


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Lfm2ForCausalLM(config).eval()
    random = np.random.default_rng(0)
    texts = {tag: random.integers(5 + 20 * place, 25 + 20 * place, 64) for place, tag in enumerate(("en", "sw"))}
    profile = la_aciq.calibrate(model, texts, seqlen=32, tokens=64, group_size=16, progress=False)
    config = QuantConfig(group_size=16, clip="static")
    return la_aciq.quantize_model(model, profile, config, progress=False)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_row_behind_padding_has_the_logits_of_itself_alone(quantized, loaded, tmp_path):
    model = quantized
    if loaded:
        model.save_pretrained(tmp_path)
        model = load_quantized(tmp_path)
    ids = torch.arange(5, 29).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids = ids * mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), la_aciq.language("sw"):
        together = model(ids, attention_mask=mask, position_ids=positions).logits[1, 5:]
        alone = model(ids[1:, 5:]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_other_rows_keep_their_outputs(quantized):
    projection = quantized.model.layers[0].conv.in_proj
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    whole = projection(x)
    x[0, :2] = 0
    y = projection(x)
    assert not y[0, :2].any()
    assert torch.equal(y[0, 2:], whole[0, 2:])
    assert torch.equal(y[1], whole[1])

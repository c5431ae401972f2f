"""Layers that read the very same tensor are computed in one call, and give what they give alone."""

import copy

import pytest
import torch
from tiny_llama import random_texts, tiny_llama

import la_aciq
from la_aciq.nn import LanguageAwareLinear, QuantConfig, load_quantized, quantize_model, save_quantized

IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(scope="module")
def setting():
    model = tiny_llama()
    texts = random_texts()
    return model, la_aciq.calibrate(model, texts, seqlen=64, tokens=128, group_size=16, progress=False)


def quantized(setting, **changes):
    return quantize_model(*setting, QuantConfig(**({"group_size": 16} | changes)), progress=False)


def apart(model):
    """A copy whose layers are computed one by one."""
    out = copy.deepcopy(model)
    for module in out.modules():
        if isinstance(module, LanguageAwareLinear):
            module.shared = None
    return out


def logits(model, tags=("sw", "en"), ids=IDS):
    with torch.no_grad(), la_aciq.languages(tags):
        return model(ids, use_cache=False).logits


def attention(model):
    own = model.model.layers[0].self_attn
    return own.q_proj, own.k_proj, own.v_proj


@pytest.mark.parametrize("activations", [4, 8, 16])
@pytest.mark.parametrize("tokens", [1, 12])
def test_the_same_outputs(setting, activations, tokens):
    out = quantized(setting, activations=activations)
    assert len(out.la_aciq.shared) == 4
    for tags in (("sw", "en"), ("th", "sw")):
        torch.testing.assert_close(logits(out, tags, IDS[:, :tokens]), logits(apart(out), tags, IDS[:, :tokens]))


def test_one_call_for_all_and_nothing_kept(setting, monkeypatch):
    out = quantized(setting)
    calls = []
    multiply = LanguageAwareLinear.multiply
    monkeypatch.setattr(
        LanguageAwareLinear,
        "multiply",
        lambda self, x, *parts: calls.append(len(parts[0])) or multiply(self, x, *parts),
    )
    logits(out)
    # q, k and v; o; gate and up; down: of each of the two layers.
    assert calls == [32 + 16 + 16, 32, 2 * 54, 32] * 2
    assert all(layer.shared._pending is None for layer in attention(out))
    # The joined weights are the layers' own memory, not a second copy.
    weights = [layer.weight for layer in attention(out)]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert weights[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in weights)


def test_another_tensor_or_a_changed_one_is_computed_anew(setting):
    out = quantized(setting, clip="absmax")
    q, k, v = attention(out)
    plain = attention(apart(out))
    x, y = torch.randn(2, 3, 32)
    with torch.no_grad():
        for layer, alone, given in (
            (q, plain[0], x),
            (k, plain[1], y),
            (v, plain[2], x),
            (q, plain[0], x),
            (q, plain[0], x),
        ):
            torch.testing.assert_close(layer(given), alone(given))
        q(x)
        x.mul_(3)
        torch.testing.assert_close(k(x), plain[1](x))
        with torch.inference_mode():
            torch.testing.assert_close(v(x.clone()), plain[2](x))


def test_another_language_is_computed_anew(setting):
    out = quantized(setting)
    q, k, _ = attention(out)
    x = torch.randn(2, 12, 32)

    def within_a_pass(layer, tag):
        """What a layer gives for x in the middle of a pass of the model."""
        found = []
        handle = out.model.embed_tokens.register_forward_hook(lambda *_: found.append(layer(x)))
        logits(out, (tag, tag))
        handle.remove()
        return found[0]

    within_a_pass(q, "sw")
    pending = k.shared._pending
    later = within_a_pass(k, "en")
    k.shared._pending = pending
    again = within_a_pass(k, "en")
    k.shared = None
    alone = within_a_pass(k, "en")
    torch.testing.assert_close(later, alone)
    torch.testing.assert_close(again, alone)
    assert not torch.equal(alone, within_a_pass(k, "sw"))


def test_layers_part_when_one_gets_a_clip_of_its_own(setting):
    out = quantized(setting)
    before = logits(out)
    up = out.model.layers[1].mlp.up_proj
    up.clip.mul_(0.1)
    after = logits(out)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, logits(apart(out)))
    assert up.shared is None


def test_moved_copied_saved_and_shared_with_another_model(setting, tmp_path):
    out = quantized(setting, activations=8)
    expected = logits(out)
    assert torch.equal(logits(copy.deepcopy(out)), expected)
    save_quantized(out, tmp_path / "saved")
    loaded = load_quantized(tmp_path / "saved")
    assert loaded.la_aciq.shared == out.la_aciq.shared
    assert torch.equal(logits(loaded), expected)
    other = quantize_model(*setting, QuantConfig(group_size=16), like=out, progress=False)
    logits(other)
    for one, same in zip(attention(out), attention(other), strict=True):
        assert one.weight.data_ptr() == same.weight.data_ptr()
    # Weights that are replaced are the ones that count.
    for layer, fresh in zip(attention(out), attention(apart(out)), strict=True):
        layer.weight = 255 - fresh.weight
    torch.testing.assert_close(logits(out), logits(apart(out)))
    assert not torch.equal(logits(out), expected)
    assert logits(out.to(torch.bfloat16)).dtype == torch.bfloat16

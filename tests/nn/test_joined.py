"""Layers that read the very same tensor are computed in one call, and give what they give alone."""

import copy

import pytest
import torch
from tiny_llama import random_texts, tiny_llama

import la_aciq
from la_aciq.checkpoint import load_quantized, save_quantized
from la_aciq.nn import LanguageAwareLinear, QuantConfig, quantize_model

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
            module.joined_layers = None
    return out


def logits(model, tags=("sw", "en"), ids=IDS):
    with torch.no_grad(), la_aciq.languages(tags):
        return model(ids, use_cache=False).logits


def attention(model):
    own = model.model.layers[0].self_attn
    return own.q_proj, own.k_proj, own.v_proj


def sizes_of_calls(monkeypatch):
    """The list that the number of outputs of each product is added to from now on."""
    calls = []
    multiply = LanguageAwareLinear.multiply
    monkeypatch.setattr(
        LanguageAwareLinear,
        "multiply",
        lambda self, x, *parts: calls.append(len(parts[1])) or multiply(self, x, *parts),
    )
    return calls


@pytest.mark.parametrize("activations", [4, 8, 16])
@pytest.mark.parametrize("tokens", [1, 12])
def test_the_same_outputs(setting, activations, tokens):
    out = quantized(setting, activations=activations)
    assert len(out.la_aciq.joined) == 4
    for tags in (("sw", "en"), ("th", "sw")):
        torch.testing.assert_close(logits(out, tags, IDS[:, :tokens]), logits(apart(out), tags, IDS[:, :tokens]))


def test_one_call_for_all_and_nothing_kept(setting, monkeypatch):
    out = quantized(setting)
    calls = sizes_of_calls(monkeypatch)
    logits(out)
    # q, k and v; o; gate and up; down: of each of the two layers.
    assert calls == [32 + 16 + 16, 32, 2 * 54, 32] * 2
    assert all(layer.joined_layers._pending is None for layer in attention(out))
    # The joined weights are the layers' own memory, not a second copy.
    weights = [layer._buffers["weight_codes"] for layer in attention(out)]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert weights[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in weights)


def within_a_pass(model, do, tag="sw"):
    """What `do` returns in the middle of a pass of the model."""
    found = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: found.append(do()))
    try:
        with la_aciq.language(tag):
            model(IDS, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def without_a_pass(model, do):
    return do()


@pytest.fixture(params=[within_a_pass, without_a_pass])
def place(request):
    return request.param


@pytest.fixture(params=[torch.no_grad, torch.inference_mode])
def mode(request):
    with request.param():
        yield


def test_another_tensor_is_computed_anew(setting, place, mode):
    out = quantized(setting)
    alone = apart(out)
    x, y = torch.randn(2, 2, 12, 32)

    def outputs(layers):
        return [layers[i](given) for i, given in ((0, x), (1, y), (2, x), (0, x), (0, x), (1, x.clone()))]

    found, expected = (place(model, lambda m=model: outputs(attention(m))) for model in (out, alone))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


CHANGES = {
    "input": lambda layer, x: x.mul_(3),
    "weight_codes": lambda layer, x: layer._buffers["weight_codes"].bitwise_xor_(255),
    "weight_clip": lambda layer, x: layer.weight_clip.mul_(2),
    "bias": lambda layer, x: layer.bias.add_(1),
    "center": lambda layer, x: layer.center.add_(1),
    "clips": lambda layer, x: layer.clips.mul_(0.1),
    "signs": lambda layer, x: layer.signs.neg_(),
    "replaced": lambda layer, x: setattr(layer, "weight_codes", 255 - layer._buffers["weight_codes"]),
    "loaded": lambda layer, x: layer.load_state_dict(
        layer.state_dict() | {"weight_codes": 255 - layer.portable_weight}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changed_since_the_first_call_is_computed_anew(setting, place, mode, change):
    out = quantized(setting)
    alone = apart(out)
    given = torch.randn(2, 12, 32)

    def outputs(model):
        q, k, _ = attention(model)
        x = given.clone()
        before = q(x)
        stale = k(x)
        q(x)
        change(k, x)
        return before, stale, k(x)

    # Twice: what is joined may be older than the change, or made after it.
    for _ in range(2):
        found, expected = (place(model, lambda m=model: outputs(m)) for model in (out, alone))
        assert not torch.allclose(expected[2], expected[1])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_another_language_is_computed_anew(setting):
    out = quantized(setting)
    q, k, _ = attention(out)
    x = torch.randn(2, 12, 32)
    with torch.no_grad():
        within_a_pass(out, lambda: q(x), "sw")
        later = within_a_pass(out, lambda: k(x), "en")
        k.joined_layers = None
        alone = within_a_pass(out, lambda: k(x), "en")
        other = within_a_pass(out, lambda: k(x), "sw")
    torch.testing.assert_close(later, alone)
    assert not torch.equal(alone, other)


def test_layers_that_always_get_tensors_of_their_own_part(setting, monkeypatch):
    out = quantized(setting)
    calls = sizes_of_calls(monkeypatch)
    for layer in attention(out):
        layer.register_forward_pre_hook(lambda _, args: (args[0] + 0,))
    expected = logits(apart(out))
    for _ in range(4):
        calls.clear()
        torch.testing.assert_close(logits(out), expected)
    assert calls[:3] == [32, 16, 16]
    # Passes that are broken off now and then do not part the others.
    gate, up = out.model.layers[0].mlp.gate_proj, out.model.layers[0].mlp.up_proj
    for _ in range(20):
        with torch.no_grad():
            within_a_pass(out, lambda: gate(torch.zeros(2, 12, 32)))
    assert gate.joined_layers is up.joined_layers is not None


def test_hooks_run_once_where_layers_part(setting):
    out = quantized(setting)
    calls = []
    gate, up = out.model.layers[1].mlp.gate_proj, out.model.layers[1].mlp.up_proj
    for layer in (gate, up):
        layer.register_forward_hook(lambda *_: calls.append(1))
    up.clips.mul_(0.1)
    logits(out)
    assert len(calls) == 2


def test_layers_part_when_one_gets_a_clip_of_its_own(setting):
    out = quantized(setting)
    before = logits(out)
    up = out.model.layers[1].mlp.up_proj
    up.clips.mul_(0.1)
    after = logits(out)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, logits(apart(out)))
    assert up.joined_layers is None


def test_moved_copied_saved_and_shared_with_another_model(setting, tmp_path):
    out = quantized(setting, activations=8)
    expected = logits(out)
    assert torch.equal(logits(copy.deepcopy(out)), expected)
    save_quantized(out, tmp_path / "saved")
    loaded = load_quantized(tmp_path / "saved")
    assert loaded.la_aciq.joined == out.la_aciq.joined
    assert torch.equal(logits(loaded), expected)
    other = quantize_model(*setting, QuantConfig(group_size=16), like=out, progress=False)
    logits(other)
    for one, same in zip(attention(out), attention(other), strict=True):
        assert one._buffers["weight_codes"].data_ptr() == same._buffers["weight_codes"].data_ptr()
    # Weights that are replaced are the ones that count.
    for layer, fresh in zip(attention(out), attention(apart(out)), strict=True):
        layer._buffers["weight_codes"] = 255 - fresh._buffers["weight_codes"]
    torch.testing.assert_close(logits(out), logits(apart(out)))
    assert not torch.equal(logits(out), expected)
    assert logits(out.to(torch.bfloat16)).dtype == torch.bfloat16

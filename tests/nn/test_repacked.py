"""On the CPU layers hold their INT4 weights as the kernel reads them fastest; what is saved or moved is portable."""

import copy
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import load_file
from tiny_llama import random_texts, tiny_llama
from torch import nn

import la_aciq
from la_aciq.checkpoint import load_quantized, save_quantized
from la_aciq.checkpoint.folder import old_names
from la_aciq.nn import LanguageAwareLinear, QuantConfig, quantize_model
from la_aciq.nn.forward_pass import LanguageState

IDS = torch.arange(1, 25).view(2, 12)
# Written by the version before weights were repacked.
BEFORE = Path(__file__).parent / "quantized_llama"
BEFORE_LOGITS = [
    [0.0, 2.6879, 0.8352, -0.298, 0.7332, 0.6975],
    [0.0, 1.7467, -3.2055, -0.2611, 3.688, 0.8949],
]


@pytest.fixture(scope="module")
def setting():
    model = tiny_llama(intermediate_size=48)
    return model, la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)


@pytest.fixture
def quantized(setting):
    return quantize_model(*setting, QuantConfig(activations=8, group_size=16), progress=False)


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LanguageAwareLinear)}


def portable(model):
    """A copy with portable weights."""
    out = copy.deepcopy(model)
    for layer in layers_of(out).values():
        layer._buffers["weight_codes"] = layer.portable_weight
    return out


def logits(model):
    with torch.no_grad(), la_aciq.languages(["sw", "en"]):
        return model(IDS, use_cache=False).logits


def is_repacked(layer):
    n, k = layer.out_features, layer.in_features
    codes = layer._buffers["weight_codes"]
    return codes.dtype == torch.int32 and codes.shape == (n // 16, k // 8, 16)


def made(n, k, group_size, seed=0, activations=16):
    """A layer alone, not repacked."""
    linear = nn.Linear(k, n, bias=False)
    nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(seed))
    config = QuantConfig(activations=activations, group_size=group_size)
    clips = None if activations == 16 else torch.full((2, config.groups(k)), 0.9)
    return LanguageAwareLinear.from_linear(linear, config, LanguageState(("und", "sw")), clips)


@pytest.mark.parametrize(
    ("n", "k", "group_size", "expected"),
    [
        (16, 8, 0, True),
        (48, 72, 64, True),
        (32, 40, 8, True),
        (8, 64, 16, False),  # outputs to be padded
        (32, 36, 0, False),  # inputs to be padded
        (32, 40, 20, False),  # groups that end within a word
    ],
)
def test_what_is_repacked_takes_no_more_memory_and_gives_the_same(n, k, group_size, expected):
    layer = made(n, k, group_size)
    before, codes, nbytes = layer.state_dict(), layer._buffers["weight_codes"], layer._buffers["weight_codes"].nbytes
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(1))
    layer.repack()
    layer.repack()
    assert is_repacked(layer) is expected
    assert layer._buffers["weight_codes"].nbytes == nbytes
    assert (layer._buffers["weight_codes"] is codes) is not expected
    assert torch.equal(layer.portable_weight, before["weight_codes"])
    # Code j of eight at bits 4 j of the word of its output, as documented.
    if expected:
        row, column = 7, k - 3
        word = int(layer._buffers["weight_codes"][row // 16, column // 8, row % 16])
        byte = int(before["weight_codes"][row, column // 2])
        assert (word >> 4 * (column % 8)) & 15 == (byte >> 4 * (column % 2)) & 15
    turned = la_aciq.rotate(x, layer.signs)
    exact = nn.functional.linear(turned.double(), values(before["weight_codes"], before["weight_clip"], k, group_size))
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    with la_aciq.use_backend("reference"):
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)


def values(packed, scale, k, group_size):
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :k].double()
    return (codes - 7.5) * scale.double().repeat_interleave(group_size or k, dim=1)[:, :k] / 7.5


def test_a_quantized_model_is_repacked_and_no_larger(setting, quantized):
    assert all(is_repacked(layer) for layer in layers_of(quantized).values())
    other = portable(quantized)
    sizes = [sum(buffer.nbytes for buffer in model.buffers()) for model in (quantized, other)]
    assert sizes[0] == sizes[1]
    torch.testing.assert_close(logits(quantized), logits(other), rtol=1e-4, atol=1e-4)
    with la_aciq.use_backend("reference"):
        torch.testing.assert_close(logits(quantized), logits(other), rtol=1e-5, atol=1e-5)
    # Joined with the layers of the same input, still in one place.
    attention = quantized.model.layers[0].self_attn
    parts = [
        attention.q_proj._buffers["weight_codes"],
        attention.k_proj._buffers["weight_codes"],
        attention.v_proj._buffers["weight_codes"],
    ]
    assert all(part.dtype == torch.int32 for part in parts)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert parts[0].untyped_storage().nbytes() == sum(part.nbytes for part in parts)
    assert attention.q_proj.joined_layers is not None


def test_layers_of_one_input_that_cannot_all_be_repacked_part(setting):
    model = tiny_llama(head_dim=12, num_attention_heads=4, num_key_value_heads=2)  # 48, 24 and 24 outputs
    profile = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)
    out = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    own = out.model.layers[0].self_attn
    assert [is_repacked(layer) for layer in (own.q_proj, own.k_proj, own.v_proj)] == [True, False, False]
    torch.testing.assert_close(logits(out), logits(portable(out)), rtol=1e-4, atol=1e-4)
    assert own.q_proj.joined_layers is None


def test_state_dicts_are_portable(quantized):
    expected = portable(quantized).state_dict()
    found = quantized.state_dict()
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    layer = quantized.model.layers[0].mlp.down_proj
    assert found["model.layers.0.mlp.down_proj.weight_codes"].shape == (layer.out_features, layer.in_features // 2)
    assert is_repacked(layer)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("repacked", [False, True])
def test_a_state_dict_loads_whatever_the_layer_holds(assign, repacked):
    layer, given = made(32, 48, 16), made(32, 48, 16, seed=1)
    if repacked:
        layer.repack()
    before = layer._buffers["weight_codes"]
    layer.load_state_dict(given.state_dict(), assign=assign)
    assert is_repacked(layer)
    assert torch.equal(layer.portable_weight, given._buffers["weight_codes"])
    assert (layer._buffers["weight_codes"] is before) is (repacked and not assign)


def test_a_state_dict_that_does_not_fit_is_refused():
    layer = made(32, 48, 16)
    layer.repack()
    before = layer.portable_weight
    for wrong, message in (
        (torch.zeros(32, 20, dtype=torch.uint8), "size mismatch for weight_codes"),
        (layer._buffers["weight_codes"], "weight_codes: expected uint8 codes, got int32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(layer.state_dict() | {"weight_codes": wrong})
    missing = layer.state_dict()
    del missing["weight_codes"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_codes"'):
        layer.load_state_dict(missing)
    assert is_repacked(layer)
    assert torch.equal(layer.portable_weight, before)


def test_saved_and_loaded(quantized, tmp_path):
    expected = logits(quantized)
    save_quantized(quantized, tmp_path / "int4")
    stored = load_file(tmp_path / "int4" / "model.safetensors")
    for name, layer in layers_of(quantized).items():
        assert stored[f"{name}.weight_codes"].dtype == torch.uint8
        assert torch.equal(stored[f"{name}.weight_codes"], layer.portable_weight)
    loaded = load_quantized(tmp_path / "int4")
    assert all(is_repacked(layer) for layer in layers_of(loaded).values())
    assert torch.equal(logits(loaded), expected)


def test_a_checkpoint_from_before(tmp_path):
    shutil.copytree(BEFORE, tmp_path / "int4")
    loaded = load_quantized(tmp_path / "int4")
    assert is_repacked(loaded.model.layers[0].mlp.down_proj)
    assert not is_repacked(loaded.model.layers[0].mlp.up_proj)  # 40 outputs
    torch.testing.assert_close(logits(loaded)[:, -1, :6], torch.tensor(BEFORE_LOGITS), rtol=0, atol=5e-3)
    # What it saves is what it was loaded from, under the names of today.
    save_quantized(loaded, tmp_path / "again")
    stored, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("int4", "again"))
    new_names = old_names(loaded)
    assert {name.rpartition(".")[2] for name in new_names} == {"weight", "weight_scale", "clip"}
    assert set(new_names) <= set(stored)
    assert again.pop("model.layers.0.self_attn.q_proj.weight").numel() == 0
    assert {new_names.get(name, name) for name in stored} == set(again)
    assert all(torch.equal(tensor, again[new_names.get(name, name)]) for name, tensor in stored.items())
    description = json.loads((tmp_path / "again" / "config.json").read_text("utf-8"))["quantization_config"]
    assert description["schema"] == 3
    assert description["version"] == la_aciq.__version__
    assert torch.equal(logits(load_quantized(tmp_path / "again")), logits(loaded))


def test_a_state_dict_from_before():
    """Tensors under the names of 0.1, in memory, in either layout of the layer, copied and assigned."""
    old_to_new = {"weight": "weight_codes", "weight_scale": "weight_clip", "clip": "clips"}
    layer = made(32, 48, 16, activations=8)
    x = torch.randn(3, 48)
    state = layer.state_dict()
    before = {old: state[new] for old, new in old_to_new.items()} | {
        name: tensor for name, tensor in state.items() if name not in old_to_new.values()
    }
    for repacked in (False, True):
        for assign in (False, True):
            other = made(32, 48, 16, seed=1, activations=8)
            if repacked:
                other.repack()
            assert not torch.equal(other(x), layer(x))
            container = nn.ModuleDict({"a": other})
            old_state = {f"a.{name}": tensor.clone() for name, tensor in before.items()}
            container.load_state_dict(old_state, assign=assign)
            torch.testing.assert_close(other(x), layer(x))
            assert set(old_state) == {f"a.{name}" for name in before}  # as it was handed over
            assert torch.equal(other.weight_codes, layer.weight_codes)


def test_copies_and_pickles(quantized):
    other = copy.deepcopy(quantized)
    assert all(is_repacked(layer) for layer in layers_of(other).values())
    assert torch.equal(logits(other), logits(quantized))
    mine = {layer._buffers["weight_codes"].data_ptr() for layer in layers_of(quantized).values()}
    assert mine.isdisjoint(layer._buffers["weight_codes"].data_ptr() for layer in layers_of(other).values())
    layer = made(32, 48, 16)
    layer.repack()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_repacked(loaded)
    assert torch.equal(loaded._buffers["weight_codes"], layer._buffers["weight_codes"])


def test_what_leaves_the_cpu_is_portable_and_what_comes_back_is_repacked():
    layer = made(32, 48, 16)
    state, codes = layer.state_dict(), layer._buffers["weight_codes"]
    layer.to(torch.bfloat16)
    assert is_repacked(layer)
    layer.to("meta")
    assert layer._buffers["weight_codes"].is_meta
    assert layer._buffers["weight_codes"].dtype == torch.uint8
    assert layer._buffers["weight_codes"].shape == codes.shape
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    assert is_repacked(layer)
    assert torch.equal(layer.portable_weight, codes)


def test_modules_that_accelerate_moves_are_left_alone():
    layer = made(32, 48, 16)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", offload=True, offload_buffers=True))
    layer.repack()
    assert layer._buffers["weight_codes"].dtype == torch.uint8
    assert torch.equal(layer(x), expected)
    remove_hook_from_module(layer)
    layer.repack()
    assert is_repacked(layer)
    torch.testing.assert_close(layer(x), expected)


def test_a_copy_of_a_layer_alone_is_not_one_of_its_model(quantized):
    layer = quantized.model.layers[0].self_attn.q_proj
    logits(quantized)
    memo = {}
    alone = copy.deepcopy(layer, memo)
    assert not any(id(module) in memo for module in quantized.modules() if module is not layer)
    assert alone.state is layer.state
    assert alone.joined_layers is None
    assert torch.equal(alone._buffers["weight_codes"], layer._buffers["weight_codes"])
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(alone(x), layer(x))
    # A body that is copied has passes of its own, a model too.
    for other in (copy.deepcopy(quantized), copy.deepcopy(quantized.model)):
        copies = layers_of(other)
        assert all(one.state is not layer.state for one in copies.values())
        assert len({id(one.state) for one in copies.values()}) == 1
        assert all(
            one.joined_layers is not None for name, one in copies.items() if name.endswith(("q_proj", "up_proj"))
        )

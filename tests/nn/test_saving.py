"""Whatever saves, loads, copies, pickles or offloads a quantized model has every tensor, before and after a pass."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from safetensors.torch import load_file
from tiny_llama import random_texts, tiny_llama
from torch import nn

import la_aciq
from la_aciq import LaAciqError
from la_aciq.nn import LanguageAwareLinear, QuantConfig, quantize_model

IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(scope="module")
def setting():
    model = tiny_llama(tie_word_embeddings=False)
    return model, la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)


def quantized(setting, **changes):
    return quantize_model(*setting, QuantConfig(**({"group_size": 16} | changes)), progress=False)


def logits(model):
    with torch.no_grad(), la_aciq.languages(["sw", "en"]):
        return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def expected(setting):
    """The tensors before any pass, and the logits."""
    model = quantized(setting)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model)


@pytest.fixture
def used(setting):
    """A model whose layers have been joined by a pass."""
    model = quantized(setting)
    logits(model)
    queries, keys = (getattr(model.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj"))
    assert queries.joined_layers is keys.joined_layers is not None
    codes = [layer._buffers["weight_codes"] for layer in (queries, keys)]
    assert codes[0].untyped_storage().data_ptr() == codes[1].untyped_storage().data_ptr()  # or this tests nothing
    return model


def storages(tensors):
    return [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]


def assert_same(tensors, expected):
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_a_state_dict_has_a_storage_for_each_tensor(used, expected):
    state = used.state_dict()
    assert_same(state, expected[0])
    assert len(set(storages(state))) == len(state)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
    # In memory there is each weight once.
    counted = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in used.buffers()}
    assert sum(counted.values()) <= sum(tensor.nbytes for tensor in used.buffers())


def _accelerate_model(model, folder):
    Accelerator(cpu=True).save_model(model, folder)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _accelerate_state(model, folder):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    return load_file(folder / "model.safetensors")


def _save_model(model, folder):
    safetensors.torch.save_model(model, folder / "m.safetensors")
    other = copy.deepcopy(model)
    other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})
    assert safetensors.torch.load_model(other, folder / "m.safetensors") == (set(), [])
    assert torch.equal(logits(other), logits(model))
    return load_file(folder / "m.safetensors")


def _save_file(model, folder):
    safetensors.torch.save_file(model.state_dict(), folder / "m.safetensors")
    return load_file(folder / "m.safetensors")


def _torch_save(model, folder):
    torch.save(model.state_dict(), folder / "m.pt")
    return torch.load(folder / "m.pt", weights_only=True)


def saved(folder):
    """The tensors of a saved model, without the one by which transformers alone refuses it."""
    tensors = load_file(folder / "model.safetensors")
    assert tensors.pop("model.layers.0.self_attn.q_proj.weight").numel() == 0
    return tensors


def _save_pretrained(model, folder):
    model.save_pretrained(folder)
    other = copy.deepcopy(model)
    other.load_state_dict(load_file(folder / "model.safetensors"))
    return saved(folder)


def _wrapped(model, folder):
    """As wrappers such as FSDP and DDP do: under a prefix, from a module around the model."""
    state = nn.ModuleDict({"module": model}).state_dict()
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _of_each_module(model, folder):
    """As those do that take a checkpoint apart by modules."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if not list(module.children())
        for key, tensor in module.state_dict().items()
    }


SAVERS = [
    _accelerate_model,
    _accelerate_state,
    _save_model,
    _save_file,
    _torch_save,
    _save_pretrained,
    _wrapped,
    _of_each_module,
]


@pytest.mark.parametrize("save", SAVERS)
def test_every_tensor_is_saved_after_a_pass(used, expected, tmp_path, save):
    assert_same(save(used, tmp_path), expected[0])
    assert torch.equal(logits(used), expected[1])


def test_a_loaded_model_gives_the_bits_of_the_saved_one_in_every_layer(setting, tmp_path):
    """Rounding in products of layers that are not quantized depends on where their factors lie in memory."""
    model, profile = setting
    config = QuantConfig(group_size=16, ignore=["lm_head", "*.mlp.*"])
    saved = quantize_model(model, profile, config, progress=False)
    saved.save_pretrained(tmp_path)
    offsets = {name: begin for name, (begin, _) in _offsets(tmp_path / "model.safetensors").items() if "mlp" in name}
    assert any(begin % 64 for begin in offsets.values())  # or this tests nothing
    loaded = type(model).from_pretrained(tmp_path)
    assert {tensor.data_ptr() % 64 for tensor in [*loaded.parameters(), *loaded.buffers()]} == {0}
    assert torch.equal(logits(loaded), logits(saved))


def _offsets(file):
    """By tensor the bytes of the file that it takes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return {
        name: [8 + length + place for place in tensor["data_offsets"]]
        for name, tensor in header.items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_is_loaded_into_joined_layers(setting, used, assign):
    other = quantized(setting, rounding="nearest")
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert not torch.equal(logits(other), logits(used))
    used.load_state_dict(state, assign=assign)
    assert torch.equal(logits(used), logits(other))
    used.state_dict()["model.layers.0.self_attn.k_proj.weight_codes"].zero_()  # nothing of the model's
    assert torch.equal(logits(used), logits(other))


def test_a_state_dict_with_other_codes_leaves_the_layer_as_it_is(used, expected):
    wrong = {name: tensor.float() if name.endswith("weight_codes") else tensor for name, tensor in expected[0].items()}
    with pytest.raises(RuntimeError, match=r"q_proj\.weight_codes: expected uint8 codes, got float32"):
        used.load_state_dict(wrong)
    assert torch.equal(logits(used), expected[1])


def test_a_copy_of_one_layer_has_its_tensors_alone(used):
    layer = used.model.layers[0].self_attn.k_proj
    for alone in (copy.deepcopy(layer), copy.copy(layer), copy.deepcopy(used.model.layers[0]).self_attn.k_proj):
        sizes = [tensor.untyped_storage().nbytes() for tensor in alone.buffers()]
        assert sizes == [tensor.nbytes for tensor in layer.buffers()]
    layer.joined_layers.part()
    sizes = [tensor.untyped_storage().nbytes() for tensor in copy.deepcopy(layer).buffers()]
    assert sizes == [tensor.nbytes for tensor in layer.buffers()]
    deep = copy.deepcopy(used)
    whole = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in deep.buffers()}
    assert sum(whole.values()) <= sum(tensor.nbytes for tensor in used.buffers())


def _pickle(model, folder):
    return pickle.loads(pickle.dumps(model))


def _torch_save_whole(model, folder):
    torch.save(model, folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=False)


@pytest.mark.parametrize("round_trip", [_pickle, _torch_save_whole])
@pytest.mark.parametrize(
    "changes", [{}, {"clip": "static", "kv": 4, "kv_clip": "static"}, {"weights": 16, "clip": "rms"}]
)
def test_a_pickled_model_computes_the_same(setting, tmp_path, round_trip, changes):
    model = quantized(setting, **changes)
    before = logits(model)
    other = round_trip(model, tmp_path)
    assert torch.equal(logits(other), before)
    assert torch.equal(logits(round_trip(other, tmp_path)), before)
    ids = [m.generate(IDS[:, :4], language=["sw", "en"], max_new_tokens=6, do_sample=False) for m in (model, other)]
    assert torch.equal(*ids)
    assert other.la_aciq.state is other.model.layers[0].mlp.up_proj.state
    # The two are apart: neither sees the other's writes or passes.
    for buffer in other.buffers():
        buffer.zero_()
    assert torch.equal(logits(model), before)


def test_a_pickle_is_no_larger_than_the_tensors(setting, used):
    assert len(pickle.dumps(used)) < 1.02 * len(pickle.dumps(quantized(setting)))


def test_a_pickled_model_works_in_another_process(setting, tmp_path):
    model = quantized(setting)
    torch.save(model, tmp_path / "whole.pt")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = """
import sys, torch
model, logits = torch.load(sys.argv[1], weights_only=False), torch.load(sys.argv[2])
import la_aciq
with torch.no_grad(), la_aciq.languages(["sw", "en"]):
    assert torch.equal(model(torch.arange(1, 25).view(2, 12), use_cache=False).logits, logits)
    assert model.generate(torch.arange(1, 5).view(1, 4), language="sw", max_new_tokens=3).shape == (1, 7)
"""
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "whole.pt"), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr


# --- Offloading ---------------------------------------------------------------------------------------------------


def _cpu(model, folder):
    return cpu_offload(model, execution_device="cpu", offload_buffers=True)


def _cpu_by_blocks(model, folder):
    return cpu_offload(
        model, execution_device="cpu", offload_buffers=True, preload_module_classes=["LlamaDecoderLayer"]
    )


def _disk(model, folder):
    return disk_offload(model, folder, execution_device="cpu", offload_buffers=True)


def _hooks_alone(model, folder):
    for module in list(model.modules()):
        if isinstance(module, LanguageAwareLinear):
            add_hook_to_module(module, AlignDevicesHook("cpu", offload=True, offload_buffers=True))
    return model


def _dispatch(model, folder):
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, offload_buffers=True, force_hooks=True
    )


OFFLOADERS = [_cpu, _cpu_by_blocks, _disk, _hooks_alone, _dispatch]


@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.parametrize("offload", OFFLOADERS)
def test_an_offloaded_model_computes_the_same(setting, expected, tmp_path, offload, passed):
    model = quantized(setting)
    if passed:
        logits(model)
    offload(model, tmp_path / "offloaded")
    for _ in range(3):
        torch.testing.assert_close(logits(model), expected[1], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert_same(saved(tmp_path / "saved"), expected[0])
    assert torch.equal(logits(la_aciq.load_quantized(tmp_path / "saved")), expected[1])
    remove_hook_from_submodules(model)
    if offload is not _disk and offload is not _dispatch:
        torch.testing.assert_close(logits(model), expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("passed", [False, True])
def test_a_checkpoint_is_dispatched_into_a_quantized_model(setting, expected, tmp_path, passed):
    quantized(setting).save_pretrained(tmp_path)
    other = quantized(setting, rounding="nearest")
    if passed:
        logits(other)
    load_checkpoint_and_dispatch(other, tmp_path, device_map={"": "cpu"})
    torch.testing.assert_close(logits(other), expected[1], rtol=1e-4, atol=1e-4)


def test_a_model_without_values_is_not_saved(setting, tmp_path):
    model, profile = setting
    with torch.device("meta"):
        empty = type(model)(model.config)
    out = quantize_model(empty, profile, QuantConfig(group_size=16), progress=False)
    with pytest.raises(LaAciqError, match=r"expected values to save, got none: it is on the meta device"):
        out.save_pretrained(tmp_path / "saved")
    assert not list(Path(tmp_path).rglob("*.safetensors"))

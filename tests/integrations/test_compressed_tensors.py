"""Export to compressed-tensors: what its own package and transformers read is what we computed."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_llama import random_texts, tiny_llama
from transformers import AutoModelForCausalLM

import la_aciq
from la_aciq import clipping
from la_aciq.errors import LaAciqError
from la_aciq.integrations.compressed_tensors import export_compressed_tensors, load_table, save_table
from la_aciq.nn import QuantConfig, quantize_model

pytest.importorskip("compressed_tensors")

GROUP = 32
IDS = torch.arange(1, 25).reshape(2, 12)


def even_llama(dtype, tie):
    """Sizes that are multiples of the group, as the format needs."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.2}
    return tiny_llama(tie=tie, dtype=dtype, **sizes)


def calibrated(model, **settings):
    settings = {"group_size": GROUP, "rotate": False, "center": False} | settings
    return la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, progress=False, **settings)


def config_of(**changes):
    usual = {"activations": 16, "codebook": "midtread", "rotate": False, "center": False, "group_size": GROUP}
    return QuantConfig(**(usual | changes))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_it_and_gives_the_same_logits(tmp_path, dtype, tie):
    model = even_llama(dtype, tie)
    profile = calibrated(model)
    quantized = quantize_model(model, profile, config_of(), progress=False)
    logits(quantized)  # a model that has run keeps the weights of layers that share their input in one storage
    table = clipping.table(profile, bits=8, codebook="midtread")
    export_compressed_tensors(quantized, tmp_path / "ct", table=table)

    # What the file stands for, computed here: (code - 8) * Delta, in the basis of the model.
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored = safetensors.torch.load_file(tmp_path / "ct" / "model.safetensors")
    for name in quantized.la_aciq.layers:
        words = stored[f"{name}.weight_packed"].numpy().view(np.uint32)
        codes = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
        step = stored[f"{name}.weight_scale"]
        assert step.dtype == dtype
        n, k = stored[f"{name}.weight_shape"].tolist()
        weight = (codes.reshape(n, k // GROUP, GROUP).astype(np.float64) - 8) * step.double().numpy()[..., None]
        expected[f"{name}.weight"] = torch.from_numpy(weight.reshape(n, k)).to(dtype)
        clip = quantized.get_submodule(name).weight_clip
        torch.testing.assert_close(step, (clip.double() * 2 / 15).to(dtype), rtol=1e-2, atol=0)
    reference = even_llama(dtype, tie)
    reference.load_state_dict(expected)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    assert loaded.dtype == dtype
    torch.testing.assert_close(
        logits(loaded), logits(reference), rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 0.1
    )
    if dtype == torch.float32:
        torch.testing.assert_close(logits(loaded), logits(quantized), rtol=1e-4, atol=1e-4)

    again = load_table(tmp_path / "ct" / "la_aciq" / "clip_table.safetensors")
    assert again.entries == table.entries
    assert all(np.array_equal(again.clips[name], clips) for name, clips in table.clips.items())


def test_the_packages_own_unpacking(tmp_path):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    model = even_llama(torch.float32, True)
    quantized = quantize_model(model, calibrated(model), config_of(), progress=False)
    export_compressed_tensors(quantized, tmp_path / "ct")
    stored = safetensors.torch.load_file(tmp_path / "ct" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    codes = unpack_from_int32(stored[f"{name}.weight_packed"], 4, torch.Size(stored[f"{name}.weight_shape"].tolist()))
    packed = quantized.get_submodule(name).portable_weight
    own = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(codes.shape)
    assert torch.equal(codes.int(), own.int() - 8)


def test_ignored_layers_stay_as_they_are(tmp_path):
    model = even_llama(torch.float32, False)
    ignore = ("lm_head", "model.layers.0.mlp.*")
    quantized = quantize_model(model, calibrated(model, ignore=ignore), config_of(ignore=ignore), progress=False)
    export_compressed_tensors(quantized, tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text("utf-8"))
    assert set(config["quantization_config"]["ignore"]) == set(quantized.la_aciq.skipped)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    torch.testing.assert_close(logits(loaded), logits(quantized), rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook": "midrise"}, "codebook = 'midtread', got 'midrise'"),
        ({"activations": 8}, "activations = 16, got 8"),
        ({"rotate": True}, "rotate = False"),
        ({"group_size": 0}, "one group per row"),
        ({"group_size": 36}, r"q_proj' has 64 inputs; .* group_size = 36"),
    ],
)
def test_what_the_format_cannot_hold(tmp_path, changes, message):
    model = even_llama(torch.float32, True)
    settings = {"rotate": changes.get("rotate", False), "group_size": changes.get("group_size", GROUP)}
    quantized = quantize_model(model, calibrated(model, **settings), config_of(**changes), progress=False)
    with pytest.raises(LaAciqError, match=message):
        export_compressed_tensors(quantized, tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


def test_its_own_folder_is_replaced_and_no_other(tmp_path):
    model = even_llama(torch.float32, True)
    profile = calibrated(model)
    quantized = quantize_model(model, profile, config_of(), progress=False)
    export_compressed_tensors(quantized, tmp_path / "ct", table=clipping.table(profile))
    with pytest.raises(LaAciqError, match="exists"):
        export_compressed_tensors(quantized, tmp_path / "ct")
    export_compressed_tensors(quantized, tmp_path / "ct", table=clipping.table(profile), force=True)
    # vLLM takes every safetensors file in the folder for weights.
    assert [file.name for file in (tmp_path / "ct").glob("*.safetensors")] == ["model.safetensors"]
    config = json.loads((tmp_path / "ct" / "config.json").read_text("utf-8"))
    del config["la_aciq"]
    (tmp_path / "ct" / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(LaAciqError, match="did not write"):
        export_compressed_tensors(quantized, tmp_path / "ct", force=True)


def test_only_quantized_models(tmp_path):
    with pytest.raises(LaAciqError, match="quantize_model returned"):
        export_compressed_tensors(tiny_llama(), tmp_path / "ct")


def test_a_table_that_was_tampered_with(tmp_path):
    model = even_llama(torch.float32, True)
    table = clipping.table(calibrated(model), bits=4)
    file = tmp_path / "table.safetensors"
    save_table(table, file)
    arrays = safetensors.torch.load_file(file)
    metadata = {"clip_table": json.dumps(table.to_arrays()[1])}
    arrays["alpha/model.layers.0.mlp.up_proj"][1, 0] = float("nan")
    safetensors.torch.save_file(arrays, file, metadata=metadata)
    with pytest.raises(LaAciqError, match=r"up_proj.*finite and positive"):
        load_table(file)
    safetensors.torch.save_file(arrays, file)
    with pytest.raises(LaAciqError, match="not a table of clips"):
        load_table(file)
    file.write_bytes(b"12345678")
    with pytest.raises(LaAciqError, match="not a table of clips"):
        load_table(file)
    with pytest.raises(LaAciqError, match="cannot be read"):
        load_table(tmp_path / "nowhere")

"""LA-ACIQ as a quantization method of transformers: quantize on load, save, load."""

import copy
import os
import re
import subprocess
import sys
import textwrap
import weakref

import pytest
import safetensors.torch
import torch
from tiny_llama import random_texts, tiny_llama
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import la_aciq
from la_aciq.checkpoint import load_quantized, save_quantized
from la_aciq.errors import LaAciqError
from la_aciq.integrations.transformers import LaAciqConfig
from la_aciq.nn import LanguageAwareLinear, QuantConfig, quantize_model

IDS = torch.arange(1, 25).reshape(2, 12)


def logits(model):
    with torch.no_grad(), la_aciq.languages(["sw", "th"]):
        return model(input_ids=IDS).logits


def calibrated(model):
    return la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def profile(model):
    return calibrated(model)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path, max_shard_size="10KB")
    return path


@pytest.mark.parametrize("settings", [{}, {"activations": 16}, {"kv": 4, "activations": 8}, {"weights": 16}], ids=str)
@pytest.mark.parametrize("device_map", [None, "auto"])
def test_quantized_on_load_as_in_memory_and_loaded_again_as_saved(
    model, profile, folder, tmp_path, settings, device_map
):
    expected = quantize_model(model, profile, QuantConfig(group_size=16, **settings), progress=False)
    config = LaAciqConfig(profile, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map=device_map
    )
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(expected))
    assert loaded.la_aciq.config == expected.la_aciq.config
    assert loaded.la_aciq.skipped == expected.la_aciq.skipped
    assert loaded.la_aciq.fingerprint == expected.la_aciq.fingerprint

    loaded.save_pretrained(tmp_path / "int4")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", device_map=device_map)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(expected))
    assert torch.equal(logits(load_quantized(tmp_path / "int4")), logits(expected))
    generated = again.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, expected.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_both_ways_of_saving_write_the_same(model, profile, tmp_path):
    quantized = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    save_quantized(quantized, tmp_path / "a")
    quantized.save_pretrained(tmp_path / "b")
    (tmp_path / "a" / "README.md").unlink()  # the card, which save_pretrained does not write
    a, b = (sorted((tmp_path / name).iterdir()) for name in "ab")
    assert [file.name for file in a] == [file.name for file in b]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(a, b, strict=True))


def test_a_profile_folder_and_bfloat16(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    profile = calibrated(model)
    model.save_pretrained(tmp_path / "model")
    profile.save(tmp_path / "profile")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=LaAciqConfig(tmp_path / "profile")
    )
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.layers[0].mlp.up_proj.clips.dtype == torch.float32
    expected = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    assert torch.equal(logits(loaded), logits(expected))
    # The dtype of what is not quantized may be chosen when a quantized model is loaded; clips stay float32.
    loaded.save_pretrained(tmp_path / "int4")
    wide = load_quantized(tmp_path / "int4", dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.model.layers[0].mlp.up_proj.clips, loaded.model.layers[0].mlp.up_proj.clips)


def test_at_most_one_layer_is_unquantized_while_loading(profile, folder, monkeypatch):
    """How many linear layers have a float weight whenever one of them is quantized."""
    alive, counts = [], []
    assign, made = torch.nn.Linear.__setattr__, LanguageAwareLinear.from_linear.__func__

    def watch(module, name, value):
        assign(module, name, value)
        if name == "weight" and not value.is_meta:
            alive.append(None)
            weakref.finalize(value, alive.pop)

    def count(cls, linear, *args, **kwargs):
        counts.append(len(alive))
        return made(cls, linear, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Linear, "__setattr__", watch)
    monkeypatch.setattr(LanguageAwareLinear, "from_linear", classmethod(count))
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=LaAciqConfig(profile), dtype=torch.float32)
    assert counts == [1] * 14


def test_the_profile_of_another_model_is_refused(folder):
    with pytest.raises(LaAciqError, match="another model"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=LaAciqConfig(calibrated(tiny_llama(seed=1))), dtype=torch.float32
        )


def test_a_quantized_model_is_not_quantized_again(model, profile, tmp_path):
    quantized = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    quantized.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LaAciqConfig(profile, activations=8))
    assert again.la_aciq.config.activations == 4  # transformers' rule: the checkpoint's own configuration is used
    with pytest.raises(LaAciqError, match="quantized already"):
        quantize_model(again, profile, QuantConfig(group_size=16))


def test_broken_weights_are_named(profile, model, tmp_path):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[1, 1] = float("nan")
    broken.save_pretrained(tmp_path)
    with pytest.raises(LaAciqError, match=r"model\.layers\.1\.mlp\.down_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LaAciqConfig(profile), dtype=torch.float32)


def test_a_tampered_table_is_refused_by_from_pretrained(model, profile, tmp_path):
    quantize_model(model, profile, QuantConfig(group_size=16), progress=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.0.mlp.up_proj.clips"][1, 0] = float("inf")
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LaAciqError, match=r"model\.layers\.0\.mlp\.up_proj.*not finite and positive"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_configurations_copies_share_the_profile(profile):
    config = LaAciqConfig(profile, activations=8)
    copied = copy.deepcopy(config)
    assert copied.profile is profile
    assert copied.to_dict() == config.to_dict() == {"quant_method": "la_aciq", "config": config.config.to_dict()}


def test_a_part_of_a_quantized_model_is_not_loaded_alone(model, profile, tmp_path):
    quantize_model(model, profile, QuantConfig(group_size=16), progress=False).save_pretrained(tmp_path)
    with pytest.raises(LaAciqError, match="that of a LlamaForCausalLM"):
        AutoModel.from_pretrained(tmp_path)


def test_settings_are_checked(profile):
    with pytest.raises(LaAciqError, match=r"activations: expected .*, got 5"):
        LaAciqConfig(profile, activations=5)
    with pytest.raises(LaAciqError, match="unknown quantization setting 'bits'"):
        LaAciqConfig(profile, bits=4)
    with pytest.raises(LaAciqError, match="not a profile folder"):
        LaAciqConfig("nowhere")
    with pytest.raises(LaAciqError, match="disk"):
        AutoModelForCausalLM.from_pretrained(
            "anything", config=tiny_llama().config, quantization_config=LaAciqConfig(profile), device_map={"": "disk"}
        )


@pytest.mark.parametrize(
    ("imports", "works"),
    [
        ("import la_aciq, transformers", True),
        ("import transformers.quantizers, la_aciq", True),
        ("import transformers", False),
    ],
)
def test_la_aciq_must_be_imported_and_nothing_more(model, profile, tmp_path, imports, works):
    quantize_model(model, profile, QuantConfig(group_size=16), progress=False).save_pretrained(tmp_path)
    script = f"""
    {imports}
    import sys
    model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
    print(type(model.model.layers[0].mlp.up_proj).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "warning"},
    )
    if works:
        assert done.stdout.strip() == "LanguageAwareLinear", done.stderr
    else:  # transformers warns and goes on, and the tensors do not fit
        assert done.returncode != 0
        assert "Unknown quantization type, got la_aciq" in done.stderr


def test_importing_la_aciq_imports_neither_transformers_nor_torch():
    script = "import sys, la_aciq; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_pickled_checkpoints_are_refused(model, profile, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LaAciqError, match="safetensors files only"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LaAciqConfig(profile), use_safetensors=False)


@pytest.mark.parametrize("loaded", [False, True])
def test_after_a_change_of_dtype_it_runs_and_is_saved_as_it_is(model, profile, tmp_path, loaded):
    moved = quantize_model(model, profile, QuantConfig(group_size=16, kv=4), progress=False)
    if loaded:
        moved.save_pretrained(tmp_path / "before")
        moved = load_quantized(tmp_path / "before")
    before = {name: buffer.clone() for name, buffer in moved.named_buffers() if name.endswith(("clip", "scale"))}
    moved = moved.to(torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert all(torch.equal(moved.get_buffer(name), buffer) for name, buffer in before.items())
    moved.save_pretrained(tmp_path / "after")
    again = load_quantized(tmp_path / "after")
    assert again.dtype == torch.bfloat16
    again = again.to(torch.bfloat16)  # the rotary frequencies, which transformers does not save and makes in float32
    assert torch.equal(logits(again), logits(moved))
    # To another device and back. On the meta device there are no values, but there are the shapes of all the outputs.
    away = copy.deepcopy(again).to("meta")
    assert away(input_ids=IDS.to("meta")).logits.shape == (*IDS.shape, 61)


def test_a_copy_is_a_quantized_model_of_its_own(model, profile, tmp_path):
    quantized = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    copied = copy.deepcopy(quantized)
    expected = logits(quantized)
    with torch.no_grad():
        quantized.model.layers[0].mlp.up_proj.clips.fill_(1e-3)
    assert not torch.equal(logits(quantized), expected)
    assert torch.equal(logits(copied), expected)
    copied.save_pretrained(tmp_path)
    assert torch.equal(logits(load_quantized(tmp_path)), expected)


def test_another_batch_between_prefill_and_decode_is_refused(model, profile):
    quantized = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    with torch.no_grad(), la_aciq.languages(["sw", "th"]):
        cache = quantized(input_ids=IDS, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(LaAciqError, match="2 tags for a batch of 1 rows"):
            quantized(input_ids=IDS[1:, :1], past_key_values=cache)
        # The call that was refused left nothing behind: with the tag of the row that stays, it goes on.
        with la_aciq.languages(["th"]):
            assert torch.isfinite(quantized(input_ids=IDS[1:, :1], past_key_values=cache).logits).all()


def test_a_checkpoint_without_a_layers_weight(model, profile, folder, tmp_path):
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    del state["model.layers.1.mlp.up_proj.weight"]
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LaAciqError, match=r"lacks .*model\.layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LaAciqConfig(profile), dtype=torch.float32)


@pytest.fixture
def in_memory_and_loaded(model, profile, tmp_path):
    quantized = quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    quantized.save_pretrained(tmp_path)
    return quantized, AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_quantized_in_memory_is_marked_as_a_loaded_one(in_memory_and_loaded):
    marks = [
        {
            "is_quantized": model.is_quantized,
            "method": model.quantization_method,
            "config": model.config._is_quantized,
            "trainable": model.hf_quantizer.is_trainable,
            "pre_quantized": model.hf_quantizer.pre_quantized,
        }
        for model in in_memory_and_loaded
    ]
    assert marks[0] == marks[1]
    assert marks[0]["is_quantized"] is True
    assert marks[0]["method"] == "la_aciq"


def test_it_is_not_trained_or_cast(model, profile, in_memory_and_loaded, tmp_path):
    copied = quantize_model(copy.deepcopy(model), profile, QuantConfig(group_size=16), progress=False, inplace=True)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    settings = TrainingArguments(output_dir=tmp_path / "out", use_cpu=True, report_to=[], max_steps=1)
    for quantized in (*in_memory_and_loaded, copied, copy.deepcopy(copied)):
        with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
            Trainer(model=quantized, args=settings, train_dataset=data)
        for cast in (quantized.half, quantized.float):
            with pytest.raises(ValueError, match="not supported for quantized model"):
                cast()


def test_casting_by_to_is_safe(in_memory_and_loaded):
    """`to` is the one cast that transformers leaves to a method: the clips keep float32, and the model computes."""
    logits = []
    for quantized in in_memory_and_loaded:
        wide = {name: buffer for name, buffer in quantized.named_buffers() if name.endswith(("clip", "clips"))}
        assert quantized.to(torch.bfloat16).dtype == torch.bfloat16
        assert all(torch.equal(quantized.get_buffer(name), buffer) for name, buffer in wide.items())
        with torch.no_grad(), la_aciq.language("sw"):
            logits.append(quantized(IDS).logits)
    assert torch.equal(*logits)
    assert logits[0].dtype == torch.bfloat16


@pytest.mark.parametrize("saved", [True, False])
def test_tensor_parallelism_is_refused_before_a_tensor_is_loaded(model, profile, tmp_path, saved):
    settings = {} if saved else {"quantization_config": LaAciqConfig(profile)}
    source = quantize_model(model, profile, QuantConfig(group_size=16), progress=False) if saved else model
    source.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:200])  # nothing could be read of it
    with pytest.raises(LaAciqError, match=r"cannot be distributed by transformers \(tp_plan\); expected one process"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, distributed_config=DistributedConfig(tp_plan="auto"), dtype=torch.float32, **settings
        )


def test_a_distributed_model_is_not_quantized(model, profile, tmp_path):
    torch.save((model, profile), tmp_path / "model.pt")
    script = f"""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor
    from la_aciq import LaAciqError, QuantConfig, quantize_model
    model, profile = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
    try:
        quantize_model(model, profile, QuantConfig(group_size=16), progress=False)
    except LaAciqError as error:
        print(error)
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "layers.1.mlp.up_proj.weight' is distributed over processes; expected a model" in process.stdout, (
        process.stderr
    )


@pytest.mark.parametrize("shown", [True, False])
def test_a_progress_bar_counts_the_layers_that_are_quantized_on_load(folder, profile, capsys, shown):
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=LaAciqConfig(profile), dtype=torch.float32
        )
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
    error = capsys.readouterr().err
    if shown:
        assert re.search(rf"Quantizing: +0%.* 0/{len(loaded.la_aciq.layers)} \[00:00<\?, \?layer/s\]", error)
    else:
        assert "layer" not in error

"""Quantized models on disk: identical after loading, refused when anything was changed."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from tiny_llama import random_texts, tiny_llama

import la_aciq
from la_aciq.checkpoint import load_quantized, save_quantized
from la_aciq.errors import LaAciqError
from la_aciq.nn import QuantConfig, quantize_model

IDS = torch.arange(1, 25).reshape(2, 12)


def made(dtype):
    model = tiny_llama(dtype=dtype)
    return model, la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)


@pytest.fixture(scope="module")
def setting():
    return made(torch.float32)


@pytest.fixture(scope="module")
def setting_in_16_bits():
    return made(torch.bfloat16)


def quantized(setting, **changes):
    model, profile = setting
    return quantize_model(
        model, profile, QuantConfig(**({"group_size": 16, "kv": 4, "kv_clip": "static"} | changes)), progress=False
    )


@pytest.fixture
def saved(setting, tmp_path):
    save_quantized(quantized(setting), tmp_path / "model")
    return tmp_path / "model"


def logits(model):
    with torch.no_grad(), la_aciq.languages(["sw", "th"]):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv": 16, "activations": 8, "codebook": "midtread"},
        {"weights": 16, "activations": 16},
        {"weights": 16, "clip": "rms", "granularity": "token"},
        {"activations": 16, "rotate": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loaded_model_computes_the_same_bits(setting, setting_in_16_bits, tmp_path, changes, dtype):
    model = quantized(setting if dtype == torch.float32 else setting_in_16_bits, **changes)
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert next(loaded.parameters()).dtype == dtype
    assert loaded.la_aciq.config == model.la_aciq.config
    assert loaded.la_aciq.state.entries == model.la_aciq.state.entries
    assert loaded.la_aciq.skipped == model.la_aciq.skipped
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    # And it can be saved again.
    save_quantized(loaded, tmp_path / "again")
    assert torch.equal(logits(load_quantized(tmp_path / "again")), logits(model))


def test_nothing_in_the_folder_executes(saved):
    assert {file.name for file in saved.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_generation_settings_travel(setting, tmp_path):
    model = quantized(setting)
    model.generation_config.max_new_tokens = 7
    save_quantized(model, tmp_path / "model")
    assert load_quantized(tmp_path / "model").generation_config.max_new_tokens == 7


def test_untied_heads(tmp_path):
    model = tiny_llama(tie=False)
    profile = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, ignore=(), progress=False)
    out = quantize_model(model, profile, QuantConfig(group_size=16, ignore=()), progress=False)
    save_quantized(out, tmp_path / "model")
    assert torch.equal(logits(load_quantized(tmp_path / "model")), logits(out))


def test_an_existing_folder_is_refused_and_left_alone(setting, saved):
    before = (saved / "config.json").read_bytes()
    model = quantized(setting, kv=16)
    with pytest.raises(LaAciqError, match="exists"):
        save_quantized(model, saved)
    assert (saved / "config.json").read_bytes() == before
    save_quantized(model, saved, force=True)
    assert (saved / "config.json").read_bytes() != before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_nothing(setting, tmp_path):
    model = quantized(setting)

    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_quantized(model, tmp_path / "model", Tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_only_quantized_models_are_saved(setting, tmp_path):
    with pytest.raises(LaAciqError, match="quantize_model or load_quantized"):
        save_quantized(setting[0], tmp_path / "model")


def edit_settings(folder, change=lambda settings: None):
    """Change the description and make its checksums fit again, as somebody with intent would."""
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    settings = config["quantization_config"]
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    one_by_one = b"".join(
        hashlib.sha256(
            f"{name} {str(tensor.dtype)[6:]} {list(tensor.shape)} ".encode()
            + hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
        ).digest()
        for name, tensor in sorted(tensors.items())
    )
    before = settings["sha256"]
    settings["sha256"] = hashlib.sha256(one_by_one).hexdigest()
    if change is None:
        assert settings["sha256"] == before
    else:
        change(settings)
    settings.pop("checksum", None)
    text = json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()
    settings["checksum"] = hashlib.sha256(text).hexdigest()
    file.write_text(json.dumps(config), "utf-8")


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    edit_settings(folder)


def test_the_checksums_are_as_documented(saved):
    before = (saved / "config.json").read_text("utf-8")
    edit_settings(saved, None)
    assert json.loads((saved / "config.json").read_text("utf-8")) == json.loads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("schema"), "schema: expected 2 or 3, got None"),
        (lambda s: s.update(schema=4, version="9.1"), r"newer LA-ACIQ \(9.1\)"),
        (lambda s: s.pop("entries"), "'entries' is missing"),
        (lambda s: s.update(entries=["en", "und"]), "'entries': expected 'und'"),
        (lambda s: s["entries"].append("ja"), "shape"),
        (lambda s: s["config"].update(weights=3), "weights: expected 4 or 16, got 3"),
        (lambda s: s["config"].update(bits=3), "unknown quantization setting 'bits'"),
        (lambda s: s["config"].update(group_size=32), "down_proj.*shape"),
        (lambda s: s["config"].update(rotate=False), "signs"),
        (lambda s: s["layers"].append("model.layers.7.mlp.up_proj"), r"model\.layers\.7\.mlp\.up_proj"),
        (lambda s: s["layers"].append("model.norm"), "no linear layer"),
        (lambda s: s["layers"].pop(), "do not fit"),
        (lambda s: s["cache"].update({"1": 5}), r"la_aciq_cache\.1_clip.*shape"),
        (lambda s: s["cache"].update({"first": 4}), "'cache' has the layer 'first'"),
        (lambda s: s.update(layers="all"), "'layers' is missing or not a JSON list"),
        (lambda s: s["layers"].append(5), "'layers' has an element that is not a JSON str"),
        (lambda s: s["entries"].append(5), "'entries' has an element"),
        (lambda s: s["entries"].__setitem__(1, "no language"), "not BCP-47"),
        (lambda s: s["calibration_tokens"].update(en="many"), "'calibration_tokens' has an element"),
        (lambda s: s["config"].update(ignore=5), "ignore: expected .*, got 5"),
        (lambda s: s["config"].update(weights=4.0), r"weights: expected .*, got 4\.0"),
        (lambda s: s["config"].update(clip=["static"]), "clip: expected"),
    ],
)
def test_edited_settings_are_refused(saved, change, message):
    edit_settings(saved, change)
    with pytest.raises(LaAciqError, match=message):
        load_quantized(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_edit_that_leaves_everything_consistent_is_noticed(saved, name):
    """Two languages' rows swapped, say, would serve each other's clips."""
    file = saved / name
    edits = {
        "config.json": (b'"sw",\n      "th"', b'"th",\n      "sw"'),
        "model.safetensors": (file.read_bytes()[-8:], bytes(8)),
    }
    before, after = edits[name]
    data = file.read_bytes()
    assert data.count(before) >= 1
    file.write_bytes(data.replace(before, after))
    with pytest.raises(LaAciqError, match="edited"):
        load_quantized(saved)


LAYER = "model.layers.0.mlp.up_proj"


def set_to(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to(f"{LAYER}.clips", (1, 0), float("nan")), f"{LAYER}.*clip table.*not finite and positive"),
        (set_to(f"{LAYER}.clips", (1, 0), 0.0), f"{LAYER}.*clip table.*not finite and positive"),
        (set_to(f"{LAYER}.weight_clip", (1, 0), -1.0), f"{LAYER}.*clips of its weight"),
        (set_to(f"{LAYER}.signs", 3, 2), f"{LAYER}.*signs"),
        (lambda t: t.pop(f"{LAYER}.clips"), "lack 'model.layers.0.mlp.up_proj.clips'"),
        (lambda t: t.update(extra=torch.zeros(1)), "have 'extra'"),
        (lambda t: t.update({f"{LAYER}.clips": t[f"{LAYER}.clips"][:-1].clone()}), "shape"),
        (lambda t: t.update({f"{LAYER}.weight_codes": t[f"{LAYER}.weight_codes"].to(torch.int8)}), "int8"),
        (lambda t: t.update({f"{LAYER}.clips": t[f"{LAYER}.clips"].to(torch.bfloat16)}), "bfloat16"),
    ],
)
def test_edited_tensors_are_refused(saved, change, message):
    edit_tensors(saved, change)
    with pytest.raises(LaAciqError, match=message):
        load_quantized(saved)


def test_a_flipped_bit_is_noticed(saved):
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(LaAciqError, match="SHA-256: a file was edited"):
        load_quantized(saved)


def test_truncated_or_missing_files(saved, tmp_path):
    tensors = saved / "model.safetensors"
    data = tensors.read_bytes()
    tensors.write_bytes(data[: len(data) // 2])
    with pytest.raises(LaAciqError, match=r"model\.safetensors.*not a safetensors file: it was edited or cut short"):
        load_quantized(saved)
    tensors.unlink()
    with pytest.raises(LaAciqError, match=r"no file named model\.safetensors"):
        load_quantized(saved)
    (saved / "config.json").write_text("{", "utf-8")
    with pytest.raises(LaAciqError, match="not valid JSON"):
        load_quantized(saved)
    (saved / "config.json").write_text("{}", "utf-8")
    with pytest.raises(LaAciqError, match="not a model quantized by LA-ACIQ"):
        load_quantized(saved)
    with pytest.raises(LaAciqError, match="not a model quantized by LA-ACIQ"):
        load_quantized(tmp_path / "nowhere")


def test_shards(setting, tmp_path):
    model = quantized(setting)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(logits(load_quantized(tmp_path)), logits(model))
    shards[1].unlink()
    with pytest.raises(LaAciqError, match=shards[1].name):
        load_quantized(tmp_path)


def test_a_config_of_no_known_class(saved):
    config = json.loads((saved / "config.json").read_text("utf-8"))
    (saved / "config.json").write_text(json.dumps(config | {"architectures": ["AutoConfig"]}), "utf-8")
    with pytest.raises(LaAciqError, match="expected one class of transformers"):
        load_quantized(saved)


def test_a_config_of_another_model(saved):
    config = json.loads((saved / "config.json").read_text("utf-8"))
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), "utf-8")
    with pytest.raises(LaAciqError, match="no linear layer of that name"):
        load_quantized(saved)

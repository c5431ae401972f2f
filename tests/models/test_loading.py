"""Loading models: one sentence for what cannot be loaded, before any weights are read."""

import json
import shutil
import time

import pytest
import torch
from byte_llama import byte_llama
from transformers import BertConfig, GPT2Config, T5Config

import la_aciq
from la_aciq.checkpoint import save_quantized
from la_aciq.errors import LaAciqError
from la_aciq.models import load_model


def refused(name, message, **arguments):
    with pytest.raises(LaAciqError, match=message) as error:
        load_model(str(name), **arguments)
    assert "\n" not in str(error.value)


def test_a_saved_model_comes_back(model_folder):
    model, tokenizer = load_model(str(model_folder))
    expected = byte_llama().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("mto")["input_ids"]) == "mto"


@pytest.mark.parametrize("suffix", ["gguf", "GGUF", "Gguf"])
def test_a_gguf_file_whatever_the_case_of_its_suffix(tmp_path, monkeypatch, suffix):
    from transformers import AutoConfig

    asked = {}

    def from_pretrained(**place):
        asked.update(place)
        raise OSError("the file is read here")

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    (tmp_path / f"model.{suffix}").write_bytes(b"GGUF")
    refused(tmp_path / f"model.{suffix}", "cannot be loaded: the file is read here")
    assert (asked["pretrained_model_name_or_path"], asked["gguf_file"]) == (str(tmp_path), f"model.{suffix}")


def test_dtype(model_folder):
    assert load_model(str(model_folder), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_path_that_does_not_exist(tmp_path):
    refused(tmp_path / "nowhere", "model path '.*nowhere' does not exist")
    refused("./nowhere", "model path './nowhere' does not exist")
    refused("", "model '' does not exist")


def test_a_name_that_is_nowhere_is_refused_at_once(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    refused(
        "nobody/no-such-model", "neither a local folder nor in the Hugging Face cache, and the hub cannot be reached"
    )
    assert time.monotonic() - start < 10


def test_a_folder_that_holds_no_model(tmp_path):
    refused(tmp_path, "has no config.json")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    refused(tmp_path / "model.bin", "is a file; expected a model folder")


@pytest.mark.parametrize("config", [BertConfig, T5Config])
@pytest.mark.parametrize("named", [True, False])
def test_a_model_that_is_not_causal(tmp_path, config, named):
    made = config()
    if named:
        made.architectures = ["BertForMaskedLM" if config is BertConfig else "T5ForConditionalGeneration"]
    made.save_pretrained(tmp_path)
    refused(tmp_path, "is not a causal language model: it is .*; expected an architecture ...ForCausalLM")


def test_a_causal_model_of_another_naming_is_accepted_as_causal(tmp_path):
    config = GPT2Config(n_layer=1)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    refused(tmp_path, "cannot be loaded")  # there is nothing else in the folder


def test_a_model_that_is_quantized_already(model_folder, tmp_path):
    config = json.loads((model_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "is quantized already")


def test_a_folder_without_weights(model_folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    refused(tmp_path, "cannot be loaded")


def test_truncated_weights(model_folder, tmp_path):
    for path in model_folder.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    refused(tmp_path, "cannot be loaded")


def test_code_that_comes_with_a_model_is_not_run(model_folder, tmp_path):
    config = json.loads((model_folder / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    refused(tmp_path, "cannot be loaded")


def test_nobody_is_asked_whether_to_run_a_models_code(model_folder, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise SystemExit")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    refused(tmp_path, "cannot be loaded")
    assert not ran.exists()


def test_a_folder_that_save_quantized_wrote(model_folder, tmp_path):
    profile = la_aciq.calibrate(
        byte_llama(), {"en": torch.arange(64)}, seqlen=32, tokens=64, group_size=10, progress=False
    )
    config = la_aciq.QuantConfig(weights=4, activations=8, group_size=10)
    save_quantized(la_aciq.quantize_model(byte_llama(), profile, config, progress=False), tmp_path / "int4")
    refused(tmp_path / "int4", "is quantized already; expected floating-point weights; evaluate it with --quantized")


def test_a_method_of_another_package_that_cannot_run_here(model_folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((model_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 10, "desc_act": False}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "model", "is quantized already; expected floating-point weights")
    refused(
        tmp_path / "model", "cannot be loaded: .*(gptq|optimum|GPTQ)", quantized=True
    )  # its package is not installed

    def needs_a_gpu(**_):
        raise RuntimeError("GPU is required to quantize or run quantized model.\nSee the documentation.")

    def too_large(**_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", needs_a_gpu)
    refused(tmp_path / "model", "cannot be loaded: GPU is required to quantize or run", quantized=True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_large)
    with pytest.raises(RuntimeError, match="can't allocate memory"):  # the command line has a sentence for it
        load_model(str(tmp_path / "model"), quantized=True)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(model_folder, device):
    refused(model_folder, f"device '{device}' cannot be used", device=device)

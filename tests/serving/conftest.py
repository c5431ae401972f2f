"""The engine and the server of these tests: vLLM has its own virtual environment, in which `make test` runs them.

make .venv-vllm/.ready && .venv-vllm/bin/python -m pytest tests/serving
"""

import hashlib
import importlib.util
import json
import os

import pytest
import safetensors.torch
from byte_llama import SENTENCES, byte_llama, byte_tokenizer, sentences

import la_aciq
from la_aciq.checkpoint import save_quantized
from la_aciq.checkpoint.folder import digest

if importlib.util.find_spec("vllm"):
    os.environ |= {  # before vLLM is imported, which reads them
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_ATTN_SPLIT_KV": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "LA_ACIQ_BATCH_INVARIANT": "1",
    }


@pytest.fixture(scope="session")
def model():
    """A random Llama over bytes, with heads of a size that vLLM has kernels for."""
    return byte_llama(hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.1)


@pytest.fixture(scope="session")
def profile(model):
    """Of that model, in three languages."""
    texts = {tag: [sentences(tag)] for tag in SENTENCES}
    return la_aciq.calibrate(model, texts, byte_tokenizer(), seqlen=128, tokens=512)


@pytest.fixture(scope="session")
def quantized(model, profile):
    """That model quantized by language."""
    return la_aciq.quantize_model(model, profile, la_aciq.QuantConfig(), progress=False)


@pytest.fixture(scope="session")
def served_folder(quantized, tmp_path_factory):
    """The folder of that model."""
    folder = tmp_path_factory.mktemp("served") / "model"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    save_quantized(quantized, folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def static(model, profile):
    """That model with static clips."""
    return la_aciq.quantize_model(model, profile, la_aciq.QuantConfig(clip="static"), progress=False)


@pytest.fixture(scope="session")
def static_folder(static, tmp_path_factory):
    """The folder of the model with static clips, in schema 2: these tests serve folders of both schemas."""
    folder = tmp_path_factory.mktemp("static") / "model"
    save_quantized(static, folder, byte_tokenizer())
    _to_schema_2(folder)
    return folder


def _to_schema_2(folder):
    """Rewrite a folder of schema 3 in schema 2."""
    names = {"weight_codes": "weight", "weight_clip": "weight_scale", "clips": "clip"}
    config = json.loads((folder / "config.json").read_text())
    description = config["quantization_config"]
    tensors = {}
    for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items():
        layer, _, buffer = name.rpartition(".")
        if layer not in description["layers"]:
            tensors[name] = tensor
        elif tensor.numel():  # an empty one is there for transformers without LA-ACIQ
            tensors[f"{layer}.{names.get(buffer, buffer)}"] = tensor
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    description["rows"], description["shared"] = description.pop("entries"), description.pop("joined")
    description |= {"schema": 2, "version": "0.1.0", "sha256": digest(tensors)}
    del description["checksum"]
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    description["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def static_llm(static_folder):
    """An engine of the model with static clips, for LoRA adapters and samples in every step.

    It does not adapt: a test lets it, as --adapt does when a server starts.
    """
    from vllm import LLM

    from la_aciq.clipping.adapt import AdaptationRule
    from la_aciq.integrations.vllm import adapt, tail_sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LA_ACIQ_SAMPLE_STEPS", "1")
        patch.setattr(adapt, "SAMPLES", 4)
        patch.setattr(tail_sums, "RULE", AdaptationRule(minimum=256))
        yield LLM(
            str(static_folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=192,
            max_num_seqs=16,
            block_size=32,
            enable_lora=True,
            max_loras=2,
            max_lora_rank=8,
        )

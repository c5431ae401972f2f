"""The engine and the server of these tests: vLLM has its own virtual environment, in which `make test` runs them.

make .venv-vllm/.ready && .venv-vllm/bin/python -m pytest tests/serving
"""

import importlib.util
import os

import pytest
from byte_llama import SENTENCES, byte_llama, byte_tokenizer, sentences

import la_aciq
from la_aciq.checkpoint import save_quantized

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

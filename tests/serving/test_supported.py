"""What a model of ours is not served with is refused before an engine starts, in one sentence."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

from vllm.config import set_current_vllm_config
from vllm.config.kv_transfer import KVTransferConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import LinearBase

from la_aciq.errors import LaAciqError
from la_aciq.integrations.vllm.method import LanguageLinearMethod
from la_aciq.integrations.vllm.settings import ENVIRONMENT
from la_aciq.integrations.vllm.supported import check_supported


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """That of `la-aciq serve`."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", ENVIRONMENT["VLLM_USE_V2_MODEL_RUNNER"])
    monkeypatch.delenv("LA_ACIQ_BATCH_INVARIANT")


def engine_config(folder, **options):
    """vLLM's configuration of an engine, which is checked when it is made."""
    return EngineArgs(model=str(folder), dtype="float32", max_model_len=128, **options).create_engine_config()


def test_what_is_served(served_folder):
    engine_config(served_folder, enable_lora=True, enable_prompt_embeds=True, load_format="safetensors")


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"runner": "pooling"}, "pooling"),
        ({"model_impl": "transformers"}, "model_impl='transformers'"),
        ({"load_format": "dummy"}, r"load_format='dummy' \(expected one of auto, hf, safetensors\)"),
        ({"load_format": "sharded_state"}, "load_format='sharded_state'"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline parallelism"),
        (
            {"enable_lora": True, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
            "LoRA adapters and tensor parallelism",
        ),
        ({"cpu_offload_gb": 1}, "weights offloaded to the CPU"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
    ],
)
def test_options_are_refused_before_an_engine_starts(served_folder, options, feature):
    with pytest.raises(LaAciqError, match=f"^a model quantized by LA-ACIQ cannot be served with {feature}"):
        engine_config(served_folder, **options)


def test_bit_identical_batches_need_eager_mode(served_folder, monkeypatch):
    monkeypatch.setenv("LA_ACIQ_BATCH_INVARIANT", "1")
    engine_config(served_folder, enforce_eager=True)
    with pytest.raises(LaAciqError, match="--enforce-eager"):
        engine_config(served_folder)


@pytest.fixture(scope="module")
def vllm_config(served_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        patch.delenv("LA_ACIQ_BATCH_INVARIANT")
        return engine_config(served_folder)


@pytest.mark.parametrize(
    ("part", "name", "value", "feature"),
    [
        ("parallel_config", "data_parallel_size", 2, "data parallelism"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "enable_dbo", True, "overlapping of two batches"),
        ("model_config", "enable_sleep_mode", True, "sleep mode"),
        ("model_config", "attention_chunk_size", 64, "chunked local attention"),
        ("model_config", "multimodal_config", object(), "multimodal models"),
        (None, "kv_transfer_config", KVTransferConfig(), "transfer of key and value blocks"),
        (None, "weight_transfer_config", WeightTransferConfig(backend="nccl"), "weight transfer from a trainer"),
    ],
)
def test_settings_that_no_cpu_has(vllm_config, monkeypatch, part, name, value, feature):
    check_supported(vllm_config, 16)
    monkeypatch.setattr(vllm_config if part is None else getattr(vllm_config, part), name, value)
    with pytest.raises(LaAciqError, match=feature):
        check_supported(vllm_config, 16)


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("is_encoder_decoder", "encoder-decoder"),
        ("is_hybrid", "state-space layers"),
        ("is_attention_free", "state-space layers"),
    ],
)
def test_architectures(vllm_config, monkeypatch, name, feature):
    monkeypatch.setattr(type(vllm_config.model_config), name, property(lambda self: True))
    with pytest.raises(LaAciqError, match=feature):
        check_supported(vllm_config, 16)


def test_the_v2_model_runner_is_refused(vllm_config, monkeypatch):
    monkeypatch.setattr(type(vllm_config), "use_v2_model_runner", property(lambda self: True))
    with pytest.raises(LaAciqError, match="V2 model runner"):
        check_supported(vllm_config, 16)


def test_quantized_layers_that_are_no_linear_layers_are_refused(vllm_config):
    """As experts, which vLLM computes in one layer."""
    config = vllm_config.quant_config
    with (
        set_current_vllm_config(vllm_config),
        pytest.raises(LaAciqError, match=r"'model.layers.0.mlp' is quantized, and vLLM's Module"),
    ):
        config.get_quant_method(torch.nn.Module(), "model.layers.0.mlp")


@pytest.mark.parametrize(
    ("layout", "served"),
    [
        ("batch tokens", True),
        ("tokens batch", True),
        ("batch*tokens", True),
        ("tokens*batch", True),
        ("batch kept", True),
        (None, True),  # a folder without layouts, whose calibration found none
        ("batch n tokens", False),
        ("memory batch", False),
        ("batch", False),
        ("n batch", False),
        ("none", False),
    ],
)
def test_layers_without_a_row_for_each_token_are_refused(vllm_config, monkeypatch, layout, served):
    config, name = vllm_config.quant_config, "model.layers.0.mlp.down_proj"
    assert name in config.quantization.layers
    monkeypatch.delitem(config.quantization.layouts, name, raising=False)
    if layout is not None:
        monkeypatch.setitem(config.quantization.layouts, name, layout)
    layer = LinearBase.__new__(LinearBase)
    with set_current_vllm_config(vllm_config):
        if served:
            assert isinstance(config.get_quant_method(layer, name), LanguageLinearMethod)
        else:
            with pytest.raises(LaAciqError, match=rf"{name}'.*were '{layout}' in calibration.*in --ignore"):
                config.get_quant_method(layer, name)


def test_an_int4_cache_is_refused(vllm_config):
    with pytest.raises(LaAciqError, match="kv_bits 16"):
        check_supported(vllm_config, 4)

"""Which of vLLM's features a model quantized by LA-ACIQ cannot be served with."""

from vllm.config import VllmConfig

from ...errors import LaAciqError
from .settings import batch_invariant

# vLLM reads safetensors files of the folder with these.
_LOAD_FORMATS = ("auto", "hf", "safetensors")


def check_supported(vllm_config: VllmConfig, kv_bits: int) -> None:
    """Refuse, at the start, features that lose or mix up the languages of requests, have no kernel, or are untested.

    Args:
        vllm_config: of the engine.
        kv_bits: of the model's `QuantConfig`, 16 or 4.

    Raises:
        LaAciqError: the configuration asks for such a feature.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    load_format, offload = vllm_config.load_config.load_format, vllm_config.offload_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "vLLM's V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
        "pooling": model.runner_type != "generate",
        "encoder-decoder models": model.is_encoder_decoder,
        "multimodal models": model.is_multimodal_model,
        "state-space layers": model.is_hybrid or model.is_attention_free,
        "chunked local attention": model.attention_chunk_size is not None,
        "model_impl='transformers' (use the architecture's model in vLLM)": model.using_transformers_backend(),
        "LoRA adapters and tensor parallelism at once": vllm_config.lora_config is not None
        and parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism (start one server for each replica)": parallel.data_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "overlapping of two batches": parallel.enable_dbo,
        "transfer of key and value blocks between engines": vllm_config.kv_transfer_config is not None,
        "kv_sharing_fast_prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "weights offloaded to the CPU": offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0,
        "sleep mode": model.enable_sleep_mode,
        "weight transfer from a trainer": vllm_config.weight_transfer_config is not None,
        f"load_format={load_format!r} (expected one of {', '.join(_LOAD_FORMATS)})": load_format not in _LOAD_FORMATS,
        "bit-identical batches outside of eager mode (--enforce-eager)": batch_invariant() and not model.enforce_eager,
        "an INT4 key and value cache (quantize with kv_bits 16)": kv_bits != 16,
    }
    for feature, requested in refused.items():
        if requested:
            raise LaAciqError(f"a model quantized by LA-ACIQ cannot be served with {feature}")

"""Settings of the plugin: environment variables, because vLLM's processes inherit those."""

import os

BATCH_INVARIANT = "LA_ACIQ_BATCH_INVARIANT"  # "1": outputs do not depend on the batch, bit for bit; CPU only, slower
ADAPT = "LA_ACIQ_ADAPT"  # profile folder: static clips start from this profile and follow what is served
SAMPLE_STEPS = "LA_ACIQ_SAMPLE_STEPS"  # static clips: one step in this many is a sample (default 64); 0: none
DETECT = "LA_ACIQ_DETECT_LANGUAGE"  # "1": detect the language of requests without a tag

ENVIRONMENT = {  # defaults for vLLM's processes
    "HF_HUB_OFFLINE": "1",  # the model is a folder
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the plugin follows the batch of the V1 model runner
    "VLLM_USE_RUST_FRONTEND": "0",  # the plugin validates requests in the Python frontend
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def batch_invariant() -> bool:
    """Whether the logits of a request must be bit-identical whatever other requests are in the batch."""
    return os.environ.get(BATCH_INVARIANT) == "1"


def sample_steps() -> int:
    """One step in this many is a sample; 0: no step is."""
    return int(os.environ.get(SAMPLE_STEPS, "64"))

"""LA-ACIQ in vLLM: serves checkpoints of `la-aciq quantize` with the clips of each request's language.

    llm = vllm.LLM("folder")
    llm.generate("Habari", SamplingParams(extra_args={"language": "sw"}))  # over HTTP: "vllm_xargs": {"language": "sw"}

vLLM loads the package through its entry points, in each of its processes: `vllm.general_plugins` calls `register`,
`vllm.logits_processors` loads `requests.LanguageProcessor`. Neither changes how other models are served. In each step
a language tag becomes a language id of every token:

    tag -> language id of the request, by slot of vLLM's batch (`requests.LanguageProcessor`)
        -> language id of each token (`language_ids.BatchLanguageIds`) -> the layers' kernels (`method`)

The language ids are tensors on the model's device. The plugin writes them in place before each forward pass and outside
of CUDA graphs, so that a graph reads the ids of the running step.
"""


def register() -> None:
    """Register the quantization method "la_aciq" and the hooks in this process's vLLM. Idempotent."""
    from .engine_hooks import install
    from .method import register_method

    register_method()
    install()


__all__ = ["register"]

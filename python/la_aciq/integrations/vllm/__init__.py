"""LA-ACIQ in vLLM: checkpoints that `la-aciq quantize` wrote, served with the clips of each request's language.

    llm = vllm.LLM("folder")
    llm.generate("Habari", SamplingParams(extra_args={"language": "sw"}))  # over HTTP: "vllm_xargs": {"language": "sw"}

vLLM finds the package by its entry points, in each of its processes: `vllm.general_plugins` is `register`,
`vllm.logits_processors` is `requests.LanguageProcessor`. Both leave other models alone. Per step, data flows so:

    tag -> row of the clip tables (`requests.ServedRows.slots`, by slot of vLLM's batch)
        -> row of each token (`requests.ServedRows.tokens`) -> the layers' kernels (`method.LanguageLinearMethod`)

The two tables are tensors on the model's device, written in place before each forward pass and outside of CUDA graphs,
which therefore read the rows of the running step.
"""


def register() -> None:
    """Tell this process's vLLM of the quantization method "la_aciq", and put the language of each request into its key
    of the prefix cache; again is nothing.
    """
    from . import method, requests

    method.register()
    requests.register()


__all__ = ["register"]

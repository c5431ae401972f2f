"""LoRA adapters over INT4 layers: an adapter of the request, beside the language of the request."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

from lora_adapters import log_probabilities, write_adapter
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

PROMPT = "The committee met on Tuesday, and nobody could say why the river had risen."
CASES = [(tag, name) for tag in ("en", "sw", "th") for name in (None, "one", "two")]


@pytest.fixture(scope="module")
def adapters(static_folder, tmp_path_factory):
    """By name: a request for vLLM, and by layer the pair of factors A [rank, K], B [N, rank]."""
    adapters = {}
    for number, name in enumerate(("one", "two"), start=1):
        folder = tmp_path_factory.mktemp(name)
        factors = write_adapter(folder, static_folder, number)
        adapters[name] = LoRARequest(name, number, str(folder)), factors
    return adapters


def parameters(tag, tokens):
    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=0,
        extra_args={"language": tag},
    )


def generate(llm, adapters, cases, prompt=PROMPT, tokens=16):
    """The outputs of requests that are served at once."""
    return llm.generate(
        [prompt] * len(cases),
        [parameters(tag, tokens) for tag, _ in cases],
        lora_request=[None if name is None else adapters[name][0] for _, name in cases],
        use_tqdm=False,
    )


def test_log_probabilities_are_those_of_the_quantized_layer_and_the_adapter(static_llm, static, adapters):
    for (tag, name), output in zip(CASES, generate(static_llm, adapters, CASES, tokens=32), strict=True):
        ids = torch.tensor([*output.prompt_token_ids, *output.outputs[0].token_ids])
        generated = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
        served = torch.tensor([logprobs[token].logprob for token, logprobs in generated], dtype=torch.float64)
        errors = {}
        for language, adapter in CASES:
            factors = adapters[adapter][1] if adapter else {}
            expected = log_probabilities(static, ids, language, factors).gather(1, ids[1:, None])[:, 0]
            errors[language, adapter] = (expected[-len(served) :] - served).abs().mean()
        assert errors[tag, name] < 0.1 * min(error for case, error in errors.items() if case != (tag, name))


def test_requests_at_once_are_answered_as_one_by_one(static_llm, adapters):
    """Languages and adapters in one batch: each output is, token for token, that of the request alone."""
    alone = {}
    for case in CASES:
        static_llm.reset_prefix_cache()
        alone[case] = generate(static_llm, adapters, [case])[0].outputs[0].token_ids
    assert len(set(map(tuple, alone.values()))) >= 7
    static_llm.reset_prefix_cache()
    for case, output in zip(CASES, generate(static_llm, adapters, CASES), strict=True):
        assert output.outputs[0].token_ids == alone[case]


def test_prompt_logprobs_are_refused_where_vllm_fails_on_them(static_llm, adapters):
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, extra_args={"language": "sw"})
    with pytest.raises(VLLMValidationError, match="prompt_logprobs are not served on a CPU with enable_lora"):
        static_llm.generate(PROMPT, params, use_tqdm=False)
    assert generate(static_llm, adapters, [("sw", "one")])[0].finished


def test_prefix_blocks_serve_their_language_and_adapter_alone(static_llm, adapters):
    static_llm.reset_prefix_cache()
    cached = []
    for tag, name in [("sw", "one"), ("sw", "one"), ("sw", None), ("sw", "two"), ("th", "one"), ("th", "one")]:
        params = SamplingParams(temperature=0, max_tokens=1, extra_args={"language": tag})
        request = None if name is None else adapters[name][0]
        output = static_llm.generate(PROMPT, params, lora_request=request, use_tqdm=False)[0]
        cached.append(output.num_cached_tokens)
    assert cached == [0, 64, 0, 0, 0, 64]

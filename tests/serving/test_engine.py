"""One vLLM engine with the plugin: the same model as in transformers, and no request sees another's language.

The engine computes every token on its own (LA_ACIQ_BATCH_INVARIANT), so that outputs can be compared token by token:
otherwise sums are rounded differently in batches of different sizes, and a near tie may fall either way.
"""

import random

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

import la_aciq
from la_aciq.checkpoint import load_quantized

TAGS = [None, "en", "sw", "th", "sw-KE", "fi"]  # fi has no row
CAPACITY = 32


@pytest.fixture(scope="module")
def llm(served_folder):
    """40 blocks of 32 tokens for up to 32 requests of up to 160 tokens: requests are preempted and prefilled again."""
    return LLM(
        str(served_folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=192,
        max_num_seqs=CAPACITY,
        max_num_batched_tokens=96,
        block_size=32,
        num_gpu_blocks_override=40,
        disable_log_stats=False,
    )


def parameters(tag, tokens=16, **settings):
    extra = None if tag is None else {"language": tag}
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra, **settings)


def alone(llm, prompt, tag, tokens=16):
    """The greedy output of a request with nothing else in the engine and nothing in its prefix cache."""
    llm.reset_prefix_cache()
    return list(llm.generate(prompt, parameters(tag, tokens), use_tqdm=False)[0].outputs[0].token_ids)


def counter(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


PROMPT = "The committee met on Tuesday, and nobody could say why the river had risen."


@pytest.mark.parametrize("tag", ["en", "sw", "th"])
def test_the_model_is_the_one_of_transformers(llm, quantized, tag):
    """Log-probabilities of a prompt under its language; under another's clips they are elsewhere."""
    output = llm.generate(PROMPT, parameters(tag, 1, prompt_logprobs=0), use_tqdm=False)[0]
    ids = torch.tensor([output.prompt_token_ids])
    found = torch.tensor(
        [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[0, 1:].tolist(), strict=True)],
        dtype=torch.float64,
    )

    def expected(tag):
        with torch.no_grad(), la_aciq.language(tag):
            logits = quantized(ids).logits.double()
        return logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]

    error = (found - expected(tag)).abs().mean()
    others = min((found - expected(other)).abs().mean() for other in ("en", "sw", "th") if other != tag)
    assert error < 0.1 * others


def test_the_folder_loads_with_the_transformers_that_vllm_asks_for(quantized, served_folder):
    loaded = load_quantized(served_folder)
    ids = torch.arange(40)[None]
    with torch.no_grad(), la_aciq.language("sw"):
        assert torch.equal(loaded(ids).logits, quantized(ids).logits)


def test_the_language_decides(llm):
    prompts = [f"{i}{PROMPT}" for i in range(8)]
    outputs = [[alone(llm, prompt, tag) for tag in ("en", "sw", "th")] for prompt in prompts]
    assert sum(len({tuple(output) for output in by_tag}) > 1 for by_tag in outputs) >= 6


def test_tags_fall_back(llm):
    """sw-KE is served by sw; Finnish, which has no row, and no tag at all by the pooled row."""
    assert alone(llm, PROMPT, "sw-KE") == alone(llm, PROMPT, "sw") != alone(llm, PROMPT, "und")
    assert alone(llm, PROMPT, "fi") == alone(llm, PROMPT, None) == alone(llm, PROMPT, "und")


def test_prefix_blocks_serve_their_language_alone(llm):
    """75 tokens are two blocks: found again under the same row, not under another."""
    llm.reset_prefix_cache()
    cached = {}
    for tag in ("sw", "sw", "sw-KE", "th", "en", None, "fi", "th"):
        output = llm.generate(PROMPT, parameters(tag), use_tqdm=False)[0]
        cached.setdefault(tag, []).append(output.num_cached_tokens)
    assert cached == {"sw": [0, 64], "sw-KE": [64], "th": [0, 64], "en": [0], None: [0], "fi": [64]}


def test_salt_of_the_client_still_separates(llm):
    llm.reset_prefix_cache()
    prompts = [{"prompt": PROMPT, "cache_salt": salt} for salt in ("one", "two", "one")]
    cached = [llm.generate(prompt, parameters("sw"), use_tqdm=False)[0].num_cached_tokens for prompt in prompts]
    assert cached == [0, 0, 64]


@given(seed=st.integers(0, 2**32 - 1))
@example(20)
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_no_request_sees_another(llm, seed):
    """200 requests with six tags arrive and are cancelled at random in a full engine: each output is, token for
    token, that of the request alone."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz ,."
    prompts = ["".join(rng.choices(letters, k=rng.randrange(1, 120))) for _ in range(24)]
    requests = [(rng.choice(prompts), rng.choice(TAGS), rng.randrange(2, 40)) for _ in range(200)]
    expected = {request: alone(llm, *request) for request in set(requests)}

    llm.reset_prefix_cache()
    engine = llm.llm_engine
    preempted = counter(llm, "num_preemptions")
    waiting = dict(enumerate(requests))
    running, outputs = set(), {}
    hits = cancelled = fullest = 0
    while waiting or engine.has_unfinished_requests():
        for _ in range(rng.choice([0, 0, 1, 3, 12])):
            if waiting and len(running) < CAPACITY + 4:
                number = next(iter(waiting))
                prompt, tag, tokens = waiting.pop(number)
                engine.add_request(str(number), prompt, parameters(tag, tokens))
                running.add(number)
        if running and rng.random() < 0.04:
            number = rng.choice(sorted(running))
            engine.abort_request([str(number)])
            running.remove(number)
            cancelled += 1
        fullest = max(fullest, len(running))
        for output in engine.step():
            number = int(output.request_id)
            if output.finished and number in running:
                running.remove(number)
                outputs[number] = list(output.outputs[0].token_ids)
                hits += bool(output.num_cached_tokens)

    assert len(outputs) + cancelled == len(requests)
    assert [number for number in outputs if outputs[number] != expected[requests[number]]] == []
    # What the schedule was to bring about, it did.
    assert cancelled >= 5
    assert hits >= 10
    assert fullest >= CAPACITY
    assert counter(llm, "num_preemptions") - preempted >= 10


@pytest.mark.parametrize("tag", ["klingon", "", "x" * 10_000, 5, ["sw"], {"sw": 1}, b"sw", "sw\0", 1.5, True])
def test_bad_tags_are_refused_before_they_reach_the_engine(llm, tag):
    with pytest.raises(VLLMValidationError, match="language tag"):
        llm.generate(PROMPT, SamplingParams(max_tokens=1, extra_args={"language": tag}), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_missing_tag_is_detected_where_that_is_switched_on(llm, monkeypatch):
    """The tag of the request still wins; what the caller gave is left as it is."""
    seen = []
    monkeypatch.setenv("LA_ACIQ_DETECT_LANGUAGE", "1")
    monkeypatch.setattr("la_aciq.integrations.vllm.requests.detected", lambda text: seen.append(text) or "sw")
    given = parameters(None)
    found = list(llm.generate(PROMPT, given, use_tqdm=False)[0].outputs[0].token_ids)
    assert seen == [PROMPT]
    assert given.extra_args is None
    assert alone(llm, PROMPT, "th") != found
    assert len(seen) == 1
    monkeypatch.delenv("LA_ACIQ_DETECT_LANGUAGE")
    assert found == alone(llm, PROMPT, "sw") != alone(llm, PROMPT, None)


def test_beam_search_is_refused(llm):
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(VLLMValidationError, match="beam search"):
        llm.beam_search([{"prompt": PROMPT}], BeamSearchParams(beam_width=2, max_tokens=2))

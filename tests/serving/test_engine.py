"""One vLLM engine with the plugin: the same model as in transformers, and no request sees another's language.

The engine computes every token on its own (LA_ACIQ_BATCH_INVARIANT), so that outputs can be compared token by token:
otherwise sums are rounded differently in batches of different sizes, and a near tie may fall either way.
"""

import collections
import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

import la_aciq
from la_aciq.checkpoint import load_quantized
from la_aciq.errors import LaAciqError
from la_aciq.integrations.vllm import metrics
from la_aciq.integrations.vllm.language_ids import BatchLanguageIds

SERVED_BY = {None: "und", "en": "en", "sw": "sw", "th": "th", "sw-KE": "sw", "fi": "und"}  # fi has no entry
TAGS = list(SERVED_BY)
LONGEST = 40
_rng = random.Random(0)
PROMPTS = ["".join(_rng.choices("abcdefghijklmnopqrstuvwxyz ,.", k=_rng.randrange(1, 120))) for _ in range(24)]
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
        enable_prompt_embeds=True,
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


def engine_core(llm):
    return llm.llm_engine.engine_core.engine_core


PROMPT = "The committee met on Tuesday, and nobody could say why the river had risen."


@pytest.mark.parametrize("tag", ["en", "sw", "th"])
def test_the_model_is_the_one_of_transformers(llm, quantized, tag):
    """Log-probabilities of a prompt under its language; under another's clips they are elsewhere."""
    output = llm.generate(PROMPT, parameters(tag, 1, prompt_logprobs=0), use_tqdm=False)[0]
    ids = torch.tensor([output.prompt_token_ids])
    logprobs = torch.tensor(
        [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[0, 1:].tolist(), strict=True)],
        dtype=torch.float64,
    )

    def expected(tag):
        with torch.no_grad(), la_aciq.language(tag):
            logits = quantized(ids).logits.double()
        return logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]

    error = (logprobs - expected(tag)).abs().mean()
    others = min((logprobs - expected(other)).abs().mean() for other in ("en", "sw", "th") if other != tag)
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
    """sw-KE is served by sw; Finnish, which has no entry, and no tag at all by the pooled entry."""
    assert alone(llm, PROMPT, "sw-KE") == alone(llm, PROMPT, "sw") != alone(llm, PROMPT, "und")
    assert alone(llm, PROMPT, "fi") == alone(llm, PROMPT, None) == alone(llm, PROMPT, "und")


@pytest.mark.parametrize("tag", ["und-Latn", "und_Thai", "UND-US", "mul", "mis", "zxx-Arab", "i-default"])
def test_tags_that_name_no_language_are_und(llm, tag):
    """They are no language that the model lacks, and are not counted as such."""
    unknown = metrics.UNKNOWN._value.get()
    assert alone(llm, PROMPT, tag) == alone(llm, PROMPT, "und")
    assert metrics.UNKNOWN._value.get() == unknown
    alone(llm, PROMPT, "fi")
    assert metrics.UNKNOWN._value.get() == unknown + 1


def test_prefix_blocks_serve_their_language_alone(llm):
    """75 tokens are two blocks: found again under the same entry, not under another."""
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


@pytest.fixture(scope="module")
def expected():
    """By prompt and entry the output of the request alone, filled as tests need it."""
    return {}


@given(seed=st.integers(0, 2**32 - 1))
@example(20)
@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_request_sees_another(llm, expected, monkeypatch, seed):
    """200 requests with six tags arrive and are cancelled at random in a full engine: each output is, token for
    token, that of the request alone."""
    rng = random.Random(seed)
    requests = [(rng.choice(PROMPTS), rng.choice(TAGS), rng.randrange(2, LONGEST)) for _ in range(200)]
    for prompt, tag, _ in requests:
        if (prompt, SERVED_BY[tag]) not in expected:  # greedy: a shorter output is the beginning of a longer one
            expected[prompt, SERVED_BY[tag]] = alone(llm, prompt, SERVED_BY[tag], LONGEST)

    # The entry of the sink is that of position 0, as vLLM counts positions, and of no other.
    runner = engine_core(llm).model_executor.driver_worker.worker.model_runner
    positions = collections.Counter()
    begin = BatchLanguageIds.begin

    def compare_positions(ids, starts, lengths, count):
        begin(ids, starts, lengths, count)
        first = runner.positions[:count] == 0
        positions["wrong"] += int(((ids.token_language_ids[:count] == ids.entries.index("sink")) != first).sum())
        positions["first"] += int(first.sum())
        # A step begins behind a prefix hit or an earlier chunk, and has more than one token of its request.
        positions["continued"] += int(((runner.positions[starts[:-1].long()] > 0) & (starts.diff() > 1)).sum())

    monkeypatch.setattr(BatchLanguageIds, "begin", compare_positions)
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
    for number, tokens in outputs.items():
        prompt, tag, count = requests[number]
        assert tokens == expected[prompt, SERVED_BY[tag]][:count]
    # What the schedule was to bring about, it did.
    assert cancelled >= 5
    assert hits >= 10
    assert fullest >= CAPACITY
    assert counter(llm, "num_preemptions") - preempted >= 5
    monkeypatch.undo()
    assert positions["wrong"] == 0
    assert positions["first"] > len(requests) // 4  # hits and cancelled requests have none, preempted ones several
    assert positions["continued"] >= 10


@pytest.mark.parametrize("tag", ["klingon", "", "x" * 10_000, 5, ["sw"], {"sw": 1}, b"sw", "sw\0", 1.5, True])
def test_bad_tags_are_refused_before_they_reach_the_engine(llm, tag):
    with pytest.raises(VLLMValidationError, match="language tag"):
        llm.generate(PROMPT, SamplingParams(max_tokens=1, extra_args={"language": tag}), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_missing_tag_is_detected_where_that_is_switched_on(llm, monkeypatch):
    """The tag of the request still wins; what the caller gave is left as it is."""
    seen = []
    monkeypatch.setenv("LA_ACIQ_DETECT_LANGUAGE", "1")
    monkeypatch.setattr("la_aciq.integrations.vllm.requests.detect_language", lambda text: seen.append(text) or "sw")
    untagged = parameters(None)
    tokens = list(llm.generate(PROMPT, untagged, use_tqdm=False)[0].outputs[0].token_ids)
    assert seen == [PROMPT]
    assert untagged.extra_args is None
    assert alone(llm, PROMPT, "th") != tokens
    assert len(seen) == 1
    monkeypatch.delenv("LA_ACIQ_DETECT_LANGUAGE")
    assert tokens == alone(llm, PROMPT, "sw") != alone(llm, PROMPT, None)


def test_beam_search_is_refused(llm):
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(VLLMValidationError, match="beam search"):
        llm.beam_search([{"prompt": PROMPT}], BeamSearchParams(beam_width=2, max_tokens=2))


# --- Features of vLLM ----------------------------------------------------------------------------------------------


def first_logprobs(output):
    """Log-probabilities of the first generated token, by token."""
    return {token: entry.logprob for token, entry in output.logprobs[0].items()}


def close(one, other):
    return one.keys() == other.keys() and all(abs(one[token] - other[token]) < 1e-4 for token in one)


def test_samples_of_one_request_have_its_language(llm):
    """n = 3: as many requests of vLLM's, each with the tag."""
    greedy = {tag: llm.generate(PROMPT, parameters(tag, 1, logprobs=5))[0].outputs[0] for tag in ("sw", "th")}
    sampled = SamplingParams(n=3, seed=1, max_tokens=8, logprobs=5, extra_args={"language": "sw"})
    outputs = llm.generate(PROMPT, sampled, use_tqdm=False)[0].outputs
    assert len({tuple(output.token_ids) for output in outputs}) == 3
    for output in outputs:
        # The sampled token is listed beside the five likeliest.
        likeliest = dict(sorted(first_logprobs(output).items(), key=lambda item: -item[1])[:5])
        assert close(likeliest, first_logprobs(greedy["sw"]))
        assert not close(likeliest, first_logprobs(greedy["th"]))


def test_embeddings_of_a_prompt_are_served_under_its_language(llm, quantized):
    ids = llm.generate(PROMPT, parameters("sw", 1), use_tqdm=False)[0].prompt_token_ids
    with torch.no_grad():
        embeddings = quantized.get_input_embeddings()(torch.tensor(ids))
    for tag in ("sw", "th"):
        llm.reset_prefix_cache()
        output = llm.generate({"prompt_embeds": embeddings}, parameters(tag), use_tqdm=False)[0]
        assert list(output.outputs[0].token_ids) == alone(llm, PROMPT, tag)


def test_structured_output_is_served_under_its_language(llm, quantized):
    """The grammar leaves two tokens; their probabilities are the language's."""
    choice = StructuredOutputsParams(choice=["ab", "cd"])
    first = [llm.get_tokenizer().encode(letter, add_special_tokens=False)[0] for letter in "ac"]

    def expected(tag, ids):
        with torch.no_grad(), la_aciq.language(tag):
            return quantized(torch.tensor([ids])).logits[0, -1, first].double().log_softmax(-1)

    for tag, other in (("sw", "th"), ("th", "sw")):
        params = SamplingParams(
            temperature=0, max_tokens=2, logprobs=2, structured_outputs=choice, extra_args={"language": tag}
        )
        output = llm.generate(PROMPT, params, use_tqdm=False)[0]
        assert output.outputs[0].text in ("ab", "cd")
        logprobs = first_logprobs(output.outputs[0])
        served = torch.tensor([logprobs[token] for token in first], dtype=torch.float64)
        errors = [(served - expected(language, output.prompt_token_ids)).abs().max() for language in (tag, other)]
        assert errors[0] < 0.1 * errors[1]


def test_reloading_weights_is_refused_and_the_engine_goes_on(llm, tmp_path):
    expected = alone(llm, PROMPT, "sw")
    for arguments in ({}, {"weights_path": str(tmp_path)}, {"weights_iterator": [], "is_checkpoint_format": False}):
        with pytest.raises(LaAciqError, match="reload_weights cannot replace the tensors of a model quantized"):
            llm.collective_rpc("reload_weights", kwargs=arguments)
    with pytest.raises(RuntimeError, match="Weight transfer not configured"):
        llm.collective_rpc("update_weights", args=({},))
    assert alone(llm, PROMPT, "sw") == expected


def test_sleeping_and_waking(llm):
    expected = {tag: alone(llm, PROMPT, tag) for tag in ("sw", "th")}
    for level in (0, 1):
        llm.sleep(level=level)
        llm.wake_up(tags=["scheduling"] if level == 0 else None)
        assert {tag: alone(llm, PROMPT, tag) for tag in expected} == expected

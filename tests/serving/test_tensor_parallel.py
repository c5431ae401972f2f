"""Two processes of vLLM that share each layer of one model, against the whole model in transformers."""

import asyncio
import json

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

import aiohttp
import psutil
from byte_llama import SENTENCES, byte_llama, byte_tokenizer, sentences

import la_aciq
from benchmarks import soak
from la_aciq.checkpoint import save_quantized
from la_aciq.errors import LaAciqError

PROMPT = "The committee met on Tuesday, and nobody could say why the river had risen."
OPTIONS = ["--tensor-parallel-size", "2", "--max-model-len", "256", "--max-num-seqs", "4"]


def quantized():
    """4 heads and 2 of keys and values, 2 and 1 in each process; clips by language and group that the halves share."""
    model = byte_llama(hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.1)
    texts = {tag: [sentences(tag)] for tag in SENTENCES}
    profile = la_aciq.calibrate(model, texts, byte_tokenizer(), seqlen=128, tokens=512, rotate=False, progress=False)
    config = la_aciq.QuantConfig(activations=8, clip="static", rotate=False)
    return la_aciq.quantize_model(model, profile, config, progress=False)


async def asked(server):
    """By language the tokens of the prompt and of what follows it, and the log-probabilities of all but the first."""
    found = {}
    async with aiohttp.ClientSession(server.address) as session:
        for tag in SENTENCES:
            body = {"model": server.model, "prompt": PROMPT, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
            body |= {"vllm_xargs": {"language": tag}, "return_token_ids": True, "prompt_logprobs": 0, "logprobs": 0}
            async with session.post("/v1/completions", json=body) as answer:
                choice = (await answer.json())["choices"][0]
            ids = choice["prompt_token_ids"]
            after = [entry[str(i)]["logprob"] for entry, i in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)]
            after += choice["logprobs"]["token_logprobs"]
            found[tag] = torch.tensor(ids + choice["token_ids"]), torch.tensor(after, dtype=torch.float64)
    return found


def test_two_processes_are_one_model(tmp_path):
    """Sums over two halves round differently, which may move an 8-bit code by one: far less than the language does."""
    model = quantized()
    save_quantized(model, tmp_path / "model", byte_tokenizer())
    server = soak.Server(str(tmp_path / "model"), tmp_path / "log", OPTIONS, cores="0|1")
    try:
        server.wait()
        workers = [child.name() for child in psutil.Process(server.process.pid).children(recursive=True)]
        assert sum(name.startswith("VLLM::Worker") for name in workers) == 2
        found = asyncio.run(asked(server))
    finally:
        server.stop()

    def expected(tag, ids):
        with torch.no_grad(), la_aciq.language(tag):
            return model(ids[None]).logits[0, :-1].double().log_softmax(-1)

    for tag, (ids, after) in found.items():
        assert len(ids) == len(PROMPT) + 32
        by_language = {other: expected(other, ids).gather(1, ids[1:, None])[:, 0] for other in SENTENCES}
        errors = {other: (after - own).abs().mean() for other, own in by_language.items()}
        assert errors[tag] < 0.1 * min(error for other, error in errors.items() if other != tag)
        # What it generated is what the whole model would, but for near ties.
        generated = slice(len(PROMPT) - 1, None)
        lost = expected(tag, ids)[generated].max(-1).values - by_language[tag][generated]
        assert lost.max() < 0.05
        assert (lost == 0).sum() >= 28


def test_blocks_of_the_rotation_that_two_processes_would_cut_are_refused(served_folder):
    """The largest power of two that divides K never divides K / 2."""
    from la_aciq.integrations.vllm.method import LaAciqVllmConfig, LanguageLinearMethod

    config = LaAciqVllmConfig(json.loads((served_folder / "config.json").read_text())["quantization_config"])
    method = LanguageLinearMethod(config, "model.layers.0.self_attn.o_proj")
    with pytest.raises(LaAciqError, match=r"each rank 64 of 128 inputs, which are no whole number of blocks"):
        method.create_weights(torch.nn.Module(), 64, [128], 128, 128, torch.float32)

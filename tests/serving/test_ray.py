"""Ray on one machine with more than one worker process."""

import functools
import json
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

pytest.importorskip("ray", reason="Ray is in the environment of vLLM: make test runs these in .venv-vllm")

import ray
from byte_llama import SENTENCES, byte_llama, byte_tokenizer, sentences

import la_aciq
from la_aciq import models
from la_aciq.errors import LaAciqError
from la_aciq.integrations import ray as la_aciq_ray

TEXTS = {tag: sentences(tag) for tag in SENTENCES}
PROMPT = "The committee met on Tuesday, and nobody could say why the river had risen."
SETTINGS = {"seqlen": 64, "tokens": 192, "group_size": 16}


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    byte_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return functools.partial(models.load_model, str(folder), device="cpu", dtype="float32")


def test_calibration_is_that_of_one_process(cluster, load, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, tokenizer = load()
        single = la_aciq.calibrate(model, TEXTS, tokenizer, progress=False, **SETTINGS)
    finally:
        torch.set_num_threads(threads)
    divided = la_aciq_ray.calibrate(load, TEXTS, workers=2, **SETTINGS)
    single.save(tmp_path / "single")
    divided.save(tmp_path / "ray")
    name = "profile.safetensors"
    assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "single" / name).read_bytes()
    assert (divided.entries, divided.layers, divided.metadata) == (single.entries, single.layers, single.metadata)
    assert list(divided.second_moments) == list(single.second_moments)
    for site, matrix in single.second_moments.items():
        scale = np.sqrt(np.outer(matrix.diagonal(), matrix.diagonal()))
        assert np.all(np.abs(divided.second_moments[site] - matrix) <= 1e-6 * scale)


def test_errors_of_workers_are_those_of_calibrate(cluster, load):
    with pytest.raises(LaAciqError, match="seqlen = 513 is longer than the 512 positions"):
        la_aciq_ray.calibrate(load, TEXTS, workers=1, seqlen=513)
    with pytest.raises(LaAciqError, match="workers = 0; expected at least 1"):
        la_aciq_ray.calibrate(load, TEXTS, workers=0)


def test_ray_serve(cluster, quantized, served_folder):
    """Over HTTP, through Ray's proxy, to a replica with vLLM's engine: the languages of requests, good and bad."""
    from ray import serve

    from la_aciq.integrations.ray_serve import application

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"port": port})
    options = ["--max-model-len", "256", "--max-num-seqs", "4", "--served-model-name", "tiny"]
    try:
        serve.run(application(str(served_folder), vllm_arguments=options, batch_invariant=True))

        def ask(**extra):
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True} | extra
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body | {"return_token_ids": True}).encode(),
                {"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, json.loads(error.read())

        generated = {}
        for tag in SENTENCES:
            status, answer = ask(vllm_xargs={"language": tag})
            assert status == 200
            generated[tag] = answer["choices"][0]["token_ids"]
        assert len(set(map(tuple, generated.values()))) == 3
        ids = torch.tensor([answer["choices"][0]["prompt_token_ids"]])
        for tag, tokens in generated.items():
            with torch.no_grad(), la_aciq.language(tag):
                assert tokens[0] == quantized(ids).logits[0, -1].argmax()
        status, answer = ask(vllm_xargs={"language": "klingon"})
        assert status == 400
        assert "language" in answer["error"]["message"]
    finally:
        serve.shutdown()

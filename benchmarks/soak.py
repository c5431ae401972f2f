"""A soak of the server: `python -m benchmarks.soak MODEL` keeps `la-aciq serve MODEL` full for half an hour and writes
results/soak-<cpu>.json.

Requests in all languages of the model and in none arrive faster than they are served, start alike so that they meet in
the prefix cache, stop at different lengths, stream, and are cancelled in the middle. The server runs batch-invariant,
in a cache so small that requests are preempted. Every output is compared with that of the same request alone, before
the load began. The memory of the server's processes is read every few seconds; it is flat when, after the first
quarter, the line through it (Theil-Sen) rises by less than 2 % of it to the end.

The exit status is 1 when an output is wrong or missing, or memory is not flat.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import scipy.stats

import la_aciq
from la_aciq.bench import cpu_name, in_file_names, versions
from la_aciq.checkpoint.folder import read_description, read_folder
from la_aciq.tags import SINK, UND

BEGINNINGS = [
    "The committee met on Tuesday, and nobody could say why the river had risen. ",
    "Kamati ilikutana siku ya Jumanne, na hakuna aliyejua kwa nini mto ulikuwa umejaa. ",
]
PROMPTS = 6  # per language
CANCELLED = 0.05  # share of the requests
WARM_UP = 0.25  # share of the time before memory counts
FLAT = 0.02  # of the memory, from the end of the warm-up to the end
PATIENCE_S = 600  # for one request, on a machine that may be busy with something else
SEQUENCES, CLIENTS = 8, 20
# Blocks of 32 tokens, fewer than the requests that run at once may need.
OPTIONS = ["--max-model-len", "192", "--max-num-seqs", str(SEQUENCES), "--max-num-batched-tokens", "96"]
OPTIONS += ["--block-size", "32", "--num-gpu-blocks-override", "14"]

Request = tuple[str | None, str, int]  # tag, prompt, tokens


class Server:
    """`la-aciq serve` in a process group of its own."""

    def __init__(self, model: str, log: Path, options: list[str], cores: str = "nobind") -> None:
        self.model, self.log = model, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        # vLLM's usual settings, whatever those of this process are: the engine is a process of its own.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "LA_ACIQ_"))}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "la_aciq.cli", "serve", model, "--port", str(port), "--batch_invariant"),
                    *("--", *options),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment | {"VLLM_CPU_OMP_THREADS_BIND": cores},
            )

    def wait(self) -> None:
        while "Serving at" not in self.log.read_text():
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text()[-3000:])
            time.sleep(0.5)

    def memory(self) -> dict[str, float]:
        """Resident MiB by process: the server and what it started."""
        resident: dict[str, float] = {}
        root = psutil.Process(self.process.pid)
        for number, process in enumerate([root, *root.children(recursive=True)]):
            with contextlib.suppress(psutil.NoSuchProcess):
                resident["server" if number == 0 else process.name()] = process.memory_info().rss / 2**20
        return resident

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(120)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def requests_of(languages: list[str], seed: int = 0) -> list[Request]:
    """The requests of the soak: each prompt in every language and in none."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz ,."
    prompts = [rng.choice(BEGINNINGS) + "".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(PROMPTS)]
    lengths = [rng.randrange(4, 48) for _ in prompts]
    return [(tag, *pair) for tag in (None, *languages) for pair in zip(prompts, lengths, strict=True)]


async def completion(
    session: aiohttp.ClientSession, model: str, request: Request, *, stop_after: int | None = None, salt: str = ""
) -> str | None:
    """The text that is streamed for a greedy request; None where it was given up after `stop_after` pieces."""
    tag, prompt, tokens = request
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= (
        {"ignore_eos": True}
        | ({"vllm_xargs": {"language": tag}} if tag else {})
        | ({"cache_salt": salt} if salt else {})
    )
    text, pieces = "", 0
    async with session.post("/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                return text
            text += json.loads(line[6:])["choices"][0]["text"]
            pieces += 1
            if pieces == stop_after:
                return None
    raise RuntimeError("the stream broke off")


async def metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    """Of the server's counters those that say what the load brought about."""
    async with session.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    names = ("vllm:num_preemptions_total", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
    return {
        name: sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")) for name in names
    }


async def soak(server: Server, languages: list[str], seconds: float) -> dict[str, Any]:
    """Load the server for so long; what came back, and its memory over time."""
    requests = requests_of(languages)
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.address, timeout=timeout, connector=connector) as session:
        expected = {}
        for number, request in enumerate(requests):
            # A salt of its own: nothing is found in the prefix cache.
            expected[request] = await completion(session, server.model, request, salt=f"alone-{number}")
        by_prompt: dict[str, set[str | None]] = {}
        for (_, prompt, _), text in expected.items():
            by_prompt.setdefault(prompt, set()).add(text)

        before = await metrics(session)
        counts: Counter[str] = Counter()
        served: Counter[str] = Counter()
        wrong: list[dict[str, Any]] = []
        start = time.monotonic()

        async def client(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() - start < seconds:
                request = rng.choice(requests)
                cancel = rng.randrange(1, 4) if rng.random() < CANCELLED else None
                try:
                    text = await completion(session, server.model, request, stop_after=cancel)
                except (aiohttp.ClientError, TimeoutError, RuntimeError) as error:
                    counts["failed"] += 1
                    wrong.append({"request": request, "error": repr(error)})
                    if server.process.poll() is not None:
                        return
                    continue
                if text is None:
                    counts["cancelled"] += 1
                    continue
                counts["completed"] += 1
                counts["tokens"] += request[2]
                served[request[0] or "none"] += 1
                if text != expected[request]:
                    counts["wrong"] += 1
                    wrong.append({"request": request, "expected": expected[request], "found": text})

        samples: list[tuple[float, dict[str, float]]] = []

        async def watch() -> None:
            while server.process.poll() is None:
                samples.append((time.monotonic() - start, server.memory()))
                await asyncio.sleep(min(10.0, seconds / 30))

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(client(number) for number in range(CLIENTS)))
        watcher.cancel()
        after = await metrics(session)
    return {
        "seconds": round(time.monotonic() - start),
        "requests": len(requests),
        "prompts_told_apart_by_language": sum(len(texts) > 1 for texts in by_prompt.values()),
        "completed": counts["completed"],
        "cancelled": counts["cancelled"],
        "wrong": counts["wrong"],
        "failed": counts["failed"],
        "tokens": counts["tokens"],
        "completed_by_language": dict(served),
        "preemptions": after["vllm:num_preemptions_total"] - before["vllm:num_preemptions_total"],
        "prefix_cache_hit_tokens": after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"],
        "first_wrong": wrong[:5],
        "memory": flatness(samples, seconds),
    }


def flatness(samples: list[tuple[float, dict[str, float]]], seconds: float) -> dict[str, Any]:
    """The line through the memory of all processes after the warm-up, and whether it is flat."""
    counted = [(at, sum(by_process.values())) for at, by_process in samples if at >= WARM_UP * seconds]
    times, totals = zip(*counted, strict=True)
    slope, _, low, high = scipy.stats.theilslopes(totals, times)
    growth = float(slope) * (times[-1] - times[0])
    typical = statistics.median(totals)
    return {
        "median_mib": round(typical, 1),
        "mib_per_hour": round(float(slope) * 3600, 2),
        "mib_per_hour_95": [round(float(low) * 3600, 2), round(float(high) * 3600, 2)],
        "growth_share": round(growth / typical, 5),
        "flat": bool(growth < FLAT * typical),
        "samples": [
            [round(at), {name: round(mib, 1) for name, mib in by_process.items()}] for at, by_process in samples
        ],
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", help="folder that la-aciq quantize wrote")
    parser.add_argument("--minutes", type=float, default=30, help="of load (default: 30)")
    parser.add_argument("--output", type=Path, help="file to write (default: benchmarks/results/soak-<cpu>.json)")
    arguments = parser.parse_args(argv)
    quantization, _ = read_description(read_folder(arguments.model)[0]["quantization_config"])
    languages = [entry for entry in quantization.state.entries if entry not in (UND, SINK)]
    device = cpu_name()
    output = arguments.output or Path(__file__).parent / "results" / f"soak-{in_file_names(device)}.json"
    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments.model, Path(folder) / "log", OPTIONS)
        try:
            server.wait()
            outcome = asyncio.run(soak(server, languages, arguments.minutes * 60))
        finally:
            server.stop()
    result = {
        "schema": 1,
        "device": device,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"la_aciq": la_aciq.__version__} | versions(("torch", "vllm-cpu")),
        "languages": languages,
        "clients": CLIENTS,
        "server_options": OPTIONS,
        **outcome,
    }
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    memory = outcome["memory"]
    print(
        f"{outcome['completed']} requests completed, {outcome['cancelled']} cancelled, {outcome['wrong']} wrong, "
        f"{outcome['failed']} failed; {memory['median_mib']:.0f} MiB, {memory['mib_per_hour']:+.1f} MiB per hour"
    )
    return int(bool(outcome["wrong"] or outcome["failed"] or not memory["flat"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The tables and the plot of docs/serving.md, from the result file of `make bench-serve`."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from la_aciq.bench import data_plane, serve

PLOT = "latency.png"


def latest(folder: Path) -> dict[str, Any] | None:
    """The result file that was measured last; None where there is none."""
    files = [json.loads(path.read_text("utf-8")) for path in folder.glob("serve-*.json")]
    if unknown := [results["schema"] for results in files if results["schema"] != serve.SCHEMA]:
        raise ValueError(f"serve: expected schema {serve.SCHEMA}, got {unknown[0]}; run: make bench-serve")
    return max(files, key=lambda results: results["measured"], default=None)


def tables(results: dict[str, Any] | None) -> dict[str, str]:
    """By the name of its markers, each table."""
    if results is None:
        return dict.fromkeys(("serve-latency", "serve-data-plane"), "Not measured yet.\n")
    load = results["load"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    head = (
        f"{results['device']}, {results['cores']} cores, {results['measured'][:10]}, {versions}. Each run: "
        f"{load['num_prompts']} prompts of {load['input_len']} tokens, answered by {load['output_len']} tokens each, "
        f"{load['max_concurrency']} at a time; servers started with `{' '.join(results['server'])}`. Milliseconds.\n"
    )
    return {
        "serve-latency": f"{head}\n{serve.table(results)}\n\n![latencies by language](serving/{PLOT})\n",
        "serve-data-plane": data_plane.table(results["data_plane"]) + "\n",
    }


def digest(results: dict[str, Any]) -> str:
    content = json.dumps(results) + inspect.getsource(serve.plot)
    return hashlib.sha256(content.encode()).hexdigest()


def stale(results: dict[str, Any], folder: Path) -> list[Path]:
    """The plot where it is missing or was drawn from something else."""
    path = folder / PLOT
    return [] if path.exists() and digest(results).encode() in path.read_bytes() else [path]


def draw(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    serve.plot(results).savefig(folder / PLOT, dpi=120, metadata={"Comment": digest(results)})

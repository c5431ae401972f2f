"""What the server does beside answering requests: before it answers /metrics, it asks the engine about the clips; on
SIGUSR1 it restores the checkpoint's clips.

SIGUSR1 is a signal, because whoever may send one to the server may stop it too: no client's request can change clips.
"""

import asyncio
import signal
from typing import Any

from .metrics import CLIPS

_SECONDS = 1.0  # that /metrics waits for an engine in the middle of a long step


class Operations:
    """ASGI middleware of vLLM's server (`--middleware`)."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            engine = scope["app"].state.engine_client
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGUSR1, lambda: asyncio.ensure_future(_roll_back(engine)))
        elif scope["type"] == "http" and scope["path"].startswith("/metrics"):
            await _refresh(scope["app"].state.engine_client)
        await self._app(scope, receive, send)


async def _refresh(engine: Any) -> None:
    report = asyncio.ensure_future(_ask(engine, "la_aciq_report"))
    answered, _ = await asyncio.wait([report], timeout=_SECONDS)
    # An engine that is late or gone leaves the numbers as they were; vLLM's own metrics tell of its state.
    if answered and report.exception() is None:
        CLIPS.by_entry = report.result()


async def _roll_back(engine: Any) -> None:
    entries = await _ask(engine, "la_aciq_roll_back")
    print(f"la-aciq: the checkpoint's clips are served, and do not move; others had {', '.join(entries) or 'no entry'}")


async def _ask(engine: Any, method: str) -> Any:
    return await engine.engine_core.call_utility_async(method)

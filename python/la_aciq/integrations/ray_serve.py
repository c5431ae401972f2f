"""Serving through Ray Serve: replicas of vLLM's OpenAI-compatible server, each with an engine of its own (extra `ray`).

    from ray import serve
    from la_aciq.integrations.ray_serve import application

    serve.run(application("model", vllm_arguments=["--max-model-len", "4096"], num_replicas=2))

Requests and their language tags are those of `la-aciq serve`. A replica has all languages, so that a request may go to
any replica. Ray's own `ray.serve.llm` requires another version of vLLM than the plugin does.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

from ray import serve

from .vllm.serve import prepare

MAX_REQUESTS = 1024  # of a replica, at a time; further ones are refused with HTTP 503


def application(
    folder: str,
    *,
    vllm_arguments: Sequence[str] = (),
    detect: bool = False,
    batch_invariant: bool = False,
    **options: Any,
) -> Any:
    """Make a Ray Serve application of a quantized model.

    Args:
        folder: that `la-aciq quantize` wrote; every machine must have it at this path.
        vllm_arguments: options of vLLM's own server, such as ["--max-model-len", "4096"].
        detect: detect the language of requests without a tag.
        batch_invariant: make outputs independent of the batch, bit for bit.
        options: of the deployment, such as num_replicas or ray_actor_options={"num_gpus": 1}.

    Returns:
        The application, for `ray.serve.run`.
    """
    deployment: Any = Server
    return deployment.options(**options).bind(folder, list(vllm_arguments), detect, batch_invariant)


@serve.deployment
@serve.ingress()
class Server:
    """A replica: vLLM's engine and the routes of its server."""

    # Ray awaits the constructor of a replica.
    async def __init__(  # type: ignore[misc]
        self, folder: str, vllm_arguments: list[str], detect: bool, batch_invariant: bool
    ) -> None:
        parsed, _ = prepare(
            folder,
            vllm_arguments,
            detect=detect,
            batch_invariant=batch_invariant,
            adapt=None,
            max_requests=MAX_REQUESTS,
        )
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app

        self._stack = AsyncExitStack()
        self._engine = await self._stack.enter_async_context(build_async_engine_client(parsed))
        tasks = await self._engine.get_supported_tasks()
        self._app = build_app(parsed, tasks, self._engine.model_config)
        await init_app_state(self._engine, self._app.state, parsed, tasks)
        # What vLLM tells to exit when the engine has died; here `check_health` tells Ray.
        self._app.state.server = SimpleNamespace(should_exit=False)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def check_health(self) -> None:
        """Raise an error when the engine has died; Ray then starts another replica."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        await self._stack.aclose()

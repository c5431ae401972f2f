"""`la-aciq serve`: vLLM's server with a language tag per request."""

import argparse

from .arguments import VLLM_OPTIONS, Commands, positive


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "serve", run, "serve a quantized model with vLLM's OpenAI-compatible server, a language tag per request"
    )
    parser.add_argument("model", help="folder that quantize wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=positive, default=8000, help="port to listen at")
    parser.add_argument(
        "--detect_language",
        action="store_true",
        help="detect the language of requests without a tag (needs lingua, extra detect)",
    )
    parser.add_argument(
        "--batch_invariant",
        action="store_true",
        help="make outputs independent of the other requests, bit for bit (on a CPU; slower)",
    )
    parser.add_argument(
        "--adapt",
        metavar="PROFILE",
        help="let static clips follow the served text, from the statistics of this profile folder",
    )
    parser.add_argument(
        "--max_requests",
        type=positive,
        default=1024,
        help="largest number of requests at a time; further ones get HTTP 503",
    )
    parser.epilog = VLLM_OPTIONS


def run(arguments: argparse.Namespace) -> None:
    """Serve until the process is told to stop."""
    from ..integrations.vllm import serve

    serve.run(
        arguments.model,
        host=arguments.host,
        port=arguments.port,
        detect=arguments.detect_language,
        batch_invariant=arguments.batch_invariant,
        adapt=arguments.adapt,
        max_requests=arguments.max_requests,
        vllm_arguments=arguments.vllm,
    )

"""Models that `compare` can read text with: by transformers, by llama.cpp, or behind a server."""

from collections.abc import Sequence
from pathlib import Path

from ...errors import LaAciqError
from ...models import usable_device
from .candidate import Candidate, OpenedModel, TextsToRead, UnreachableError
from .llama_cpp import LlamaCppModel
from .server import Server
from .transformers import TransformersModel

__all__ = ["Candidate", "OpenedModel", "TextsToRead", "UnreachableError", "parse"]


def parse(names: Sequence[str], device: str = "cpu", dtype: str | None = None) -> list[Candidate]:
    """The candidates that these names stand for, with different names in the report.

    Args:
        names: each a folder, a Hugging Face model id or "embedded", with "@float32", "@bfloat16", "@float16" or "@auto"
            at its end for a dtype; a .gguf file; or the URL of a server, with "#MODEL" at its end where it serves
            several models.
        device: where models run; a server's device is its own.
        dtype: of models that transformers loads and whose name has none.

    Returns:
        The candidates, in this order.

    Raises:
        LaAciqError: a name is given twice, or names nothing that exists; or the device cannot be used.
    """
    usable_device(device)
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise LaAciqError(f"candidate {twice!r} is given twice")
    candidates = [_parse(name, device, dtype) for name in names]
    short = [candidate.name for candidate in candidates]
    for name, candidate in zip(names, candidates, strict=True):
        if short.count(candidate.name) > 1:
            candidate.name = name
    return candidates


def _parse(name: str, device: str, dtype: str | None) -> Candidate:
    if name.startswith(("http://", "https://")):
        return Server(name)
    if Path(name).suffix.lower() == ".gguf":
        return LlamaCppModel(name, device)
    return TransformersModel(name, device, dtype)

"""`generate` of a quantized Hugging Face model: its argument `language`, and the languages of beams."""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import LaAciqError
from . import request


def add_language_to_generate(model: nn.Module) -> None:
    """Give a model's `generate` the argument `language`: one tag, or a list with one per row of the inputs.

    Where it has an argument of that name already, as Whisper's has, that keeps its meaning, and `la_aciq.language` or
    `languages` around the call says the language.
    """
    generate = getattr(type(model), "generate", None)
    if generate is not None:
        taken = "language" in inspect.signature(generate).parameters
        # A partial function and no method, which would be looked up in the class by its name when it is unpickled.
        model.generate = partial(_generate_in_context if taken else _generate, model)  # type: ignore[assignment]


def _generate(model: Any, *args: Any, language: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
    """`generate` of a quantized model: the class's, under `language`, which this call alone sees.

    Args:
        model: The model.
        *args: Of the class's `generate`.
        language: A BCP-47 tag, or a list with one per row of the inputs (beams and return sequences have their
            input's); None for that of the surrounding `la_aciq.language` or `languages`.
        **kwargs: Of the class's `generate`.

    Raises:
        LaAciqError: The number of tags is not the number of rows, or a tag is not BCP-47.
    """
    context = (
        nullcontext()
        if language is None
        else request.language(language)
        if isinstance(language, str)
        else request.languages(language)
    )
    with context:
        return _generate_in_context(model, *args, **kwargs)


def _generate_in_context(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of a quantized model: the class's, in whose passes beams and return sequences have the language of
    their input.

    Raises:
        LaAciqError: `languages` around it has another number of tags than the inputs have rows.
    """
    tags = request.REQUESTED.get()
    inputs = args[0] if args else None
    for name in ("inputs", "input_ids", "inputs_embeds", getattr(model, "main_input_name", "input_ids")):
        inputs = kwargs.get(name) if inputs is None else inputs
    if isinstance(tags, tuple) and isinstance(inputs, torch.Tensor) and len(inputs) != len(tags):
        raise LaAciqError(f"language has {len(tags)} tags for {len(inputs)} rows of inputs; expected one per row")
    token = request.GENERATING.set(True)
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        request.GENERATING.reset(token)

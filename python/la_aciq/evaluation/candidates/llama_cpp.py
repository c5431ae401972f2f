"""A .gguf file that llama.cpp runs with its own kernels, through the package llama-cpp-python."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...calibration import Window
from ...errors import LaAciqError
from ...models import load_tokenizer
from ..from_losses import Description
from ..loss import check_finite
from .candidate import Candidate, TextsToRead, sha256_of_files

_MAGIC = b"GGUF"
_LAYERS_ON_DEVICE = -1  # all of them


class LlamaCppModel(Candidate):
    """A .gguf file of any type that the installed llama.cpp knows."""

    def __init__(self, name: str, device: str) -> None:
        self._file = Path(name).expanduser()
        self.name = self._file.name
        self._device = torch.device(device)
        if not self._file.is_file():
            raise LaAciqError(f"model {name!r} does not exist; expected a .gguf file")
        with self._file.open("rb") as opened:
            if opened.read(len(_MAGIC)) != _MAGIC:
                raise LaAciqError(f"{name!r} is not a .gguf file: it does not begin with {_MAGIC.decode()}")
        try:
            import llama_cpp
        except ImportError as error:
            raise LaAciqError(
                f"{name!r} is run by llama.cpp, which is not installed; run: pip install llama-cpp-python"
            ) from error
        self._llama_cpp: Any = llama_cpp
        self._context = 0  # tokens of the longest window, which `check` finds

    def identity(self) -> dict[str, Any]:
        return {"kind": "llama.cpp", "sha256": sha256_of_files([self._file]), "device": self._device.type}

    def tokenizer(self) -> Any:
        return load_tokenizer(str(self._file))

    def check(self, texts: TextsToRead) -> None:
        # The header alone: llama.cpp refuses an architecture that it does not know.
        model = self._load(vocab_only=True)
        try:
            metadata = model.metadata
            positions = metadata.get(f"{metadata.get('general.architecture')}.context_length")
            texts.check_limits(self.name, None if positions is None else int(positions), model.n_vocab())
            texts.check_vocabulary(self.name, lambda ids: model.detokenize(ids).decode("utf-8", errors="replace"))
        finally:
            model.close()
        self._context = max(len(window.ids) for windows in texts.windows.values() for window in windows)

    @contextmanager
    def opened(self) -> Iterator["_Opened"]:
        layers = 0 if self._device.type == "cpu" else _LAYERS_ON_DEVICE
        model = self._load(n_ctx=self._context, n_batch=self._context, logits_all=True, n_gpu_layers=layers)
        try:
            yield _Opened(model, Description({"runtime": "llama.cpp", "file": self._file.name}, None))
        finally:
            model.close()

    def _load(self, **settings: Any) -> Any:
        version = getattr(self._llama_cpp, "__version__", "of an unknown version")
        try:
            return self._llama_cpp.Llama(model_path=str(self._file), verbose=False, **settings)
        except (ValueError, RuntimeError, OSError, AssertionError) as error:
            raise LaAciqError(
                f"{str(self._file)!r} cannot be loaded by llama-cpp-python {version}, which does not know its "
                f"architecture, or the file is damaged: {error}"
            ) from error


@dataclass(frozen=True)
class _Opened:
    model: Any
    description: Description

    def nats(self, window: Window, tag: str) -> NDArray[np.float32]:
        ids = window.ids.tolist()
        self.model.reset()
        self.model.eval(ids)
        logits = torch.from_numpy(np.asarray(self.model.scores[: len(ids) - 1], dtype=np.float32))
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(window.ids[1:]), reduction="none")
        check_finite(losses, tag)
        return losses.numpy()

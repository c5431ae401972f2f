"""A candidate that transformers loads: floating-point, quantized by LA-ACIQ, or by a method whose package is there."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ... import embedded
from ...calibration import Window
from ...checkpoint import load_quantized
from ...checkpoint.folder import METHOD
from ...errors import LaAciqError
from ...models import is_quantized, load_config, load_model, load_tokenizer
from ..from_losses import Description
from ..loss import token_losses
from ..measure import describe
from .candidate import Candidate, TextsToRead, sha256_of_files

_EMBEDDED = "embedded"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


class TransformersModel(Candidate):
    """A folder or an id, with "@DTYPE" at its end for a dtype."""

    def __init__(self, name: str, device: str, dtype: str | None) -> None:
        path, _, ending = name.rpartition("@")
        self._path = path if ending in _DTYPES and path else name
        self._dtype = ending if self._path != name else dtype
        suffix = f"@{self._dtype}" if self._path != name else ""
        if self._path == _EMBEDDED:
            self.name = embedded.MODEL_NAME + suffix
            self._path = str(embedded.model_file())
        else:
            self.name = (Path(self._path).resolve().name if Path(self._path).exists() else self._path) + suffix
        self._device = device
        self._config = load_config(self._path)
        quantization: Any = getattr(self._config, "quantization_config", None) or {}
        self._description: dict[str, Any] = quantization if isinstance(quantization, dict) else quantization.to_dict()

    @property
    def _ours(self) -> bool:
        return self._description.get("quant_method") == METHOD

    @property
    def calibration_tokens(self) -> dict[str, int]:
        return dict(self._description.get("calibration_tokens", {})) if self._ours else {}

    def identity(self) -> dict[str, Any]:
        path = Path(self._path)
        if path.is_file():
            weights: dict[str, Any] = {"sha256": sha256_of_files([path])}
        elif path.is_dir():
            weights = {"sha256": sha256_of_files([path / "config.json", *sorted(path.glob("*.safetensors"))])}
        else:
            weights = {"id": self._path, "commit": getattr(self._config, "_commit_hash", None)}
        device = torch.device(self._device).type
        return {"kind": "transformers", **weights, "dtype": self._dtype, "device": device}

    def tokenizer(self) -> Any:
        return load_tokenizer(self._path)

    def check(self, texts: TextsToRead) -> None:
        config = self._config.get_text_config()
        positions, vocabulary = (getattr(config, key, None) for key in ("max_position_embeddings", "vocab_size"))
        texts.check_limits(self.name, positions, vocabulary)
        try:
            tokenizer = self.tokenizer()
        except LaAciqError:
            return  # a folder of weights alone does not say what its ids mean
        texts.check_vocabulary(self.name, tokenizer.decode)

    @contextmanager
    def opened(self) -> Iterator["_Opened"]:
        if self._ours:
            settings = {} if self._dtype is None else {"dtype": self._dtype}
            model = load_quantized(self._path, **settings).to(self._device)
        else:
            model, _ = load_model(self._path, device=self._device, dtype=self._dtype, quantized=True)
        try:
            yield _Opened(model, self._describe(model))
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _describe(self, model: nn.Module) -> Description:
        if self._ours or not is_quantized(self._config):
            return describe(model)
        dtype = str(getattr(model, "dtype", None)).removeprefix("torch.")
        return Description({"dtype": dtype, "quant_method": str(self._description.get("quant_method"))}, None)


@dataclass(frozen=True)
class _Opened:
    model: nn.Module
    description: Description

    def nats(self, window: Window, tag: str) -> NDArray[np.float32]:
        return token_losses(self.model, [window], tag)[0]

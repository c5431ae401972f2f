"""Calibration: from texts to what every layer's input looks like in each language.

`calibrate` runs a model over texts and returns a `Profile`, which saves to and loads from a folder. `Profile` and
`SiteStats` need NumPy and safetensors only; the functions that run a model import PyTorch on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .profile import SINK, Profile, SiteStats

if TYPE_CHECKING:
    from ..models import fingerprint
    from .collect import calibrate
    from .distributed import calibrate_distributed
    from .texts import TokenizedText, Window, load_texts, tokenize

_HOME = {
    "TokenizedText": ".texts",
    "Window": ".texts",
    "calibrate": ".collect",
    "calibrate_distributed": ".distributed",
    "fingerprint": "..models",
    "load_texts": ".texts",
    "tokenize": ".texts",
}

__all__ = [
    "SINK",
    "Profile",
    "SiteStats",
    "TokenizedText",
    "Window",
    "calibrate",
    "calibrate_distributed",
    "fingerprint",
    "load_texts",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value

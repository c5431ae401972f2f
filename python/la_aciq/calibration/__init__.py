"""Calibration: from texts to a `Profile` of every layer's input by language. Names are imported at first use."""

from typing import TYPE_CHECKING

from .. import _lazy

if TYPE_CHECKING:
    from .collect import calibrate
    from .distributed import calibrate_distributed
    from .texts import TokenizedText, Window, load_texts, tokenize

__all__ = ["TokenizedText", "Window", "calibrate", "calibrate_distributed", "load_texts", "tokenize"]

__getattr__ = _lazy(
    __name__,
    {
        "collect": ("calibrate",),
        "distributed": ("calibrate_distributed",),
        "texts": ("TokenizedText", "Window", "load_texts", "tokenize"),
    },
)

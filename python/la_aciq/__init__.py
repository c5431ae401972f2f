"""LA-ACIQ: INT4 quantization of multilingual models with a clip chosen for each request's language.

Names are imported on first use, so that `la_aciq.clipping`, `la_aciq.disparity` and `la_aciq.Moments` need NumPy and
SciPy only and do not pay for importing PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .integrations import _register

if TYPE_CHECKING:
    from ._moments import Moments
    from .calibration import Profile, calibrate
    from .clipping import ClipTable
    from .errors import LaAciqError
    from .evaluation import evaluate
    from .nn import QuantConfig, language, languages, quantize_model
    from .ops import (
        dequantize,
        linear,
        moments,
        quantize,
        quantize_dynamic,
        repack_weight,
        restore_weight,
        rotate,
        use_backend,
    )

# The submodule is `_moments` because importing a submodule `moments` would shadow the function of that name.
_HOME = {
    "ClipTable": "clipping",
    "LaAciqError": "errors",
    "Moments": "_moments",
    "Profile": "calibration",
    "QuantConfig": "nn",
    "calibrate": "calibration",
    "dequantize": "ops",
    "evaluate": "evaluation",
    "language": "nn",
    "languages": "nn",
    "linear": "ops",
    "moments": "ops",
    "quantize": "ops",
    "quantize_dynamic": "ops",
    "quantize_model": "nn",
    "repack_weight": "ops",
    "restore_weight": "ops",
    "rotate": "ops",
    "use_backend": "ops",
}
_SUBPACKAGES = ("calibration", "clipping", "disparity", "evaluation", "integrations", "nn")

__all__ = [
    "ClipTable",
    "LaAciqError",
    "Moments",
    "Profile",
    "QuantConfig",
    "__version__",
    "calibrate",
    "dequantize",
    "evaluate",
    "language",
    "languages",
    "linear",
    "moments",
    "quantize",
    "quantize_dynamic",
    "quantize_model",
    "repack_weight",
    "restore_weight",
    "rotate",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBPACKAGES})


_register.register()

"""LA-ACIQ: language-aware analytical clipping for integer quantization of multilingual models.

The names below are stable; docs/api.md says what is experimental. They are imported at first use: `import la_aciq`
loads neither PyTorch nor transformers, and `la_aciq.clipping`, `la_aciq.disparity` and `la_aciq.Moments` never load
PyTorch. `la_aciq.ops` registers `torch.ops.la_aciq.*`.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .calibration import calibrate
    from .checkpoint import load_quantized, save_quantized
    from .clipping import ClipTable
    from .errors import LaAciqError, UnavailableError
    from .evaluation import evaluate
    from .nn import QuantConfig, language, languages, quantize_model
    from .ops import (
        Moments,
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
    from .profile import Profile

__all__ = [
    "ClipTable",
    "LaAciqError",
    "Moments",
    "Profile",
    "QuantConfig",
    "UnavailableError",
    "__version__",
    "calibrate",
    "dequantize",
    "evaluate",
    "language",
    "languages",
    "linear",
    "load_quantized",
    "moments",
    "quantize",
    "quantize_dynamic",
    "quantize_model",
    "repack_weight",
    "restore_weight",
    "rotate",
    "save_quantized",
    "use_backend",
]


def _lazy(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that imports its names at first use.

    homes: for each submodule, the names that the package has from it; a submodule without names is itself one.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in home_of:
            value = getattr(importlib.import_module(f".{home_of[name]}", package), name)
        elif name in homes:
            value = importlib.import_module(f".{name}", package)
        else:
            from ._deprecated import moved

            return moved(package, name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__


_HOMES: dict[str, tuple[str, ...]] = {
    "calibration": ("calibrate",),
    "checkpoint": ("load_quantized", "save_quantized"),
    "choices": (),
    "clipping": ("ClipTable",),
    "disparity": (),
    "embedded": (),
    "errors": ("LaAciqError", "UnavailableError"),
    "evaluation": ("evaluate",),
    "integrations": (),
    "models": (),
    "nn": ("QuantConfig", "language", "languages", "quantize_model"),
    "ops": (
        "Moments",
        "dequantize",
        "linear",
        "moments",
        "quantize",
        "quantize_dynamic",
        "repack_weight",
        "restore_weight",
        "rotate",
        "use_backend",
    ),
    "profile": ("Profile",),
    "tags": (),
    "udhr": (),
}
__getattr__ = _lazy(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})


# transformers has no entry point for other packages' quantization methods: it looks them up in a table of this module.
# Importing transformers takes seconds, so the method is registered when something else imports it.
_METHODS = "transformers.quantizers.auto"


def _register_method() -> None:
    try:
        importlib.import_module("la_aciq.integrations.transformers")
    except ImportError as error:  # another version of transformers; everything else works without it
        warnings.warn(f"LA-ACIQ cannot register with the installed transformers: {error}", stacklevel=2)


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds the module of transformers' table as Python does, once, and registers after its code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _METHODS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_method()

            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _METHODS in sys.modules:
    _register_method()
elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterAfterImport())

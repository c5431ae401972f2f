"""Registers the quantization method with transformers when transformers is imported, and not before.

transformers has no entry point for methods of other packages: it looks them up in a table of its module
`transformers.quantizers.auto`. Importing transformers takes seconds, which `import la_aciq` must not.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Register now if transformers' table is there, otherwise as soon as it is."""
    if _TABLE in sys.modules:
        _register_now()
    elif not any(isinstance(finder, _AfterTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTable())


def _register_now() -> None:
    try:
        importlib.import_module("la_aciq.integrations.transformers")
    except ImportError as error:  # another version of transformers; everything else works without it
        warnings.warn(f"LA-ACIQ cannot register with the installed transformers: {error}", stacklevel=2)


class _AfterTable(importlib.abc.MetaPathFinder):
    """Finds the table's module as everyone does, once, and registers when its code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            run = loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register_now()

            loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec

"""Which implementation of an operation runs: the compiled core, Triton or the reference.

Of CUDA tensors by operation and number of rows: the first backend that is available in the row of a table that was made
from measurements, cuda_backends.json beside this file or the file that LA_ACIQ_BACKEND_TABLE names.
Everything here is settled when the module is imported or follows from the tensor's device and shape, so that
torch.compile traces through it and nothing is chosen by trial while a CUDA graph is captured.
"""

import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import LaAciqError, UnavailableError
from . import fakes, reference

Backend = Literal["reference", "cpu", "cuda", "triton"]
# Those with kernels of every backend.
OPERATIONS = ("moments", "quantize", "quantize_dynamic", "dequantize", "rotate", "linear")
ROUNDED = "linear, rounded activations"
# Operations without Triton kernels, whose operators run in PyTorch on CUDA tensors: nothing to choose from.
IN_PYTORCH_ON_CUDA = ("round_weights",)

Rules = tuple[tuple[float, tuple[Backend, ...]], ...]


def read_table(path: Path) -> tuple[dict[str, Rules], bool]:
    """The backends of CUDA tensors by operation, (largest number of rows, backends, best first) each, and whether the
    kernels passed their tests on a GPU, from a file as benchmarks/choose_backends.py writes it.

    Raises ValueError if it is not such a file.
    """
    try:
        table = json.loads(path.read_text("utf-8"))
        if table["schema"] != 1:
            raise ValueError(f"expected schema 1, got {table['schema']!r}")
        preferences = {
            operation: tuple((math.inf if r["rows"] is None else r["rows"], tuple(r["backends"])) for r in rules)
            for operation, rules in table["preferences"].items()
        }
        if preferences.keys() != {*OPERATIONS, ROUNDED}:
            raise ValueError(f"expected the operations {', '.join((*OPERATIONS, repr(ROUNDED)))}")
        for operation, rules in preferences.items():
            bounds = [bound for bound, _ in rules]
            if bounds != sorted(bounds) or not bounds or bounds[-1] != math.inf:
                raise ValueError(f"{operation}: expected increasing numbers of rows and null at last, got {bounds}")
            for _, backends in rules:
                if not backends or not {"cuda", "triton"}.issuperset(backends):
                    raise ValueError(f"{operation}: expected backends cuda and triton, got {list(backends)}")
        return preferences, bool(table["verified"])
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of backends: {type(error).__name__}: {error}") from error


def _table_of_this_process() -> tuple[dict[str, Rules], bool]:
    named = os.environ.get("LA_ACIQ_BACKEND_TABLE")
    if not named:
        return read_table(Path(__file__).with_name("cuda_backends.json"))
    try:
        return read_table(Path(named))
    except ValueError as error:
        raise LaAciqError(f"LA_ACIQ_BACKEND_TABLE: {error}") from error


# VERIFIED_ON_GPU: whether the CUDA and Triton kernels have passed their tests and benchmarks/gpu.sh on a GPU.
PREFERENCES, VERIFIED_ON_GPU = _table_of_this_process()


def _load_core() -> str | None:
    """Registers the compiled operations; the reason if that is not possible."""
    try:
        from .. import _C
    except ImportError as error:
        return f"the compiled core la_aciq._C cannot be loaded ({error})"
    built = _C.build_info()["torch"].split(".")[:2]
    if built != torch.__version__.split(".")[:2]:
        return f"the compiled core was built against PyTorch {'.'.join(built)}, and this is {torch.__version__}"
    fakes.register()
    return None


_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_NOT_INTERPRETED = "TRITON_INTERPRET=1 (Triton's interpreter, for tests) is not set"


def _load_triton(cuda_devices: bool) -> str | None:
    """Registers the operations of la_aciq.kernels where they can run; the reason if they cannot."""
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install 'la-aciq[triton]')"
    if not cuda_devices and not _INTERPRETS:
        return f"PyTorch finds no CUDA device, and {_NOT_INTERPRETED}"
    try:
        for name in OPERATIONS:
            import_module(f"la_aciq.kernels.{name}")
    except ImportError as error:
        return f"the Triton kernels cannot be loaded ({error})"
    return None


def _why_no_cuda(cuda_devices: bool) -> str | None:
    if WHY_NO_CORE is not None:
        return WHY_NO_CORE
    from .. import _C

    if not _C.build_info()["cuda"]:
        return "the compiled core was built without CUDA (LA_ACIQ_CUDA=1 builds it, where nvcc and a CUDA PyTorch are)"
    return None if cuda_devices else "PyTorch finds no CUDA device"


WHY_NO_CORE = _load_core()
# Counting the devices, unlike torch.cuda.is_available(), leaves CUDA alone: a process may still fork.
_HAS_CUDA_DEVICES = torch.cuda.device_count() > 0
_WHY_NOT: dict[str, str | None] = {
    "reference": None,
    "cpu": WHY_NO_CORE,
    "cuda": _why_no_cuda(_HAS_CUDA_DEVICES),
    "triton": _load_triton(_HAS_CUDA_DEVICES),
}
if WHY_NO_CORE is not None:
    warnings.warn(
        f"la_aciq runs its slow reference implementation on the CPU: {WHY_NO_CORE}. "
        "Install with a C++ compiler, PyTorch and `pip install --no-build-isolation` to build the core.",
        RuntimeWarning,
        stacklevel=2,
    )
_FROM_ENVIRONMENT = os.environ.get("LA_ACIQ_BACKEND") or None


def _warning_for_cuda(cuda_devices: bool) -> str | None:
    """What a user of CUDA tensors has to know about the kernels that will run on them."""
    if not cuda_devices:
        return None
    if _WHY_NOT["cuda"] and _WHY_NOT["triton"]:
        return (
            f"la_aciq runs its slow reference implementation on CUDA tensors: {_WHY_NOT['cuda']}; {_WHY_NOT['triton']}."
        )
    if VERIFIED_ON_GPU or _FROM_ENVIRONMENT == "reference":
        return None
    return (
        "la_aciq's kernels for CUDA tensors are not yet verified on a GPU: run benchmarks/gpu.sh from the repository "
        "to check them on yours; LA_ACIQ_BACKEND=reference is the safe and slow choice."
    )


if (_warning := _warning_for_cuda(_HAS_CUDA_DEVICES)) is not None:
    warnings.warn(_warning, RuntimeWarning, stacklevel=2)


class _Choice(threading.local):
    """The backend this thread is held to (thread-local and not a context variable: torch.compile traces the former)."""

    backend: str | None = _FROM_ENVIRONMENT


_choice = _Choice()


def _overloads(namespace: Any, names: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    return {name: getattr(namespace, name).default for name in names}


# By backend and operation. Looking one up in torch.ops in every call takes twice as long.
_FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "reference": {name: getattr(reference, name) for name in (*OPERATIONS, *IN_PYTORCH_ON_CUDA)}
}
if WHY_NO_CORE is None:
    _FUNCTIONS["cpu"] = _FUNCTIONS["cuda"] = _overloads(torch.ops.la_aciq, (*OPERATIONS, *IN_PYTORCH_ON_CUDA))
if _WHY_NOT["triton"] is None:
    _FUNCTIONS["triton"] = _overloads(torch.ops.la_aciq_triton, OPERATIONS)


def register() -> None:
    """Make the operators `torch.ops.la_aciq.*` exist, for code that calls them by that name (`la_aciq.ops.register()`).

    Importing this module does it, and so does the first use of any function of `la_aciq.ops`. `import la_aciq` alone
    does not, because that would import PyTorch.

    Raises:
        UnavailableError: The compiled core cannot be loaded, so there are no operators; the functions of `la_aciq.ops`
            then run the reference.
    """
    if WHY_NO_CORE is not None:
        raise _unavailable("cpu", WHY_NO_CORE)


def why_unavailable(backend: str) -> str | None:
    """Why a backend cannot run here, or None if it can.

    Args:
        backend: "reference", "cpu", "cuda" or "triton".

    Returns:
        The reason, or None.

    Raises:
        ValueError: There is no backend of that name.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    return _WHY_NOT[backend]


def forced_by_environment() -> str | None:
    """The backend that LA_ACIQ_BACKEND holds this process to, or None.

    Raises `LaAciqError` if it names none, or one that cannot run here.
    """
    forced = _FROM_ENVIRONMENT
    if forced is None:
        return None
    if forced not in _WHY_NOT:
        raise LaAciqError(f"LA_ACIQ_BACKEND: expected one of {', '.join(_WHY_NOT)}, got {forced!r}")
    if (reason := _WHY_NOT[forced]) is not None:
        raise _unavailable(forced, reason)
    return forced


def _unavailable(backend: str, reason: str) -> UnavailableError:
    source = " (of LA_ACIQ_BACKEND)" if backend == _FROM_ENVIRONMENT else ""
    return UnavailableError(f"backend {backend!r}{source} is not available: {reason}")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Runs the operations called inside by this thread on one backend: "reference", "cpu", "cuda" or "triton".

    The environment variable LA_ACIQ_BACKEND sets the same for a whole process.

    Args:
        backend: "reference", "cpu", "cuda" or "triton".

    Yields:
        Nothing.

    Raises:
        UnavailableError: The backend cannot run here.
        ValueError: There is no backend of that name.
    """
    reason = why_unavailable(backend)
    if reason is not None:
        raise _unavailable(backend, reason)
    before = _choice.backend
    _choice.backend = backend
    try:
        yield
    finally:
        _choice.backend = before


def choose(operation: str, x: Tensor, rounded: bool = False) -> str:
    """The backend that runs an operation on x [..., K]; `rounded`: `linear` with INT8 or INT4 activations.

    An operation without a Triton kernel runs on its device's own backend where "triton" is asked for.

    Raises RuntimeError if the backend this thread is held to cannot run on x.
    """
    forced = _choice.backend
    if forced is not None:
        if forced == _FROM_ENVIRONMENT:
            forced_by_environment()  # another has been looked at by use_backend
        if forced in ("cpu", "cuda") and x.device.type != forced:
            raise _unavailable(forced, f"x is on {x.device}")
        if forced == "triton" and x.device.type != "cuda" and not _INTERPRETS:
            raise _unavailable(forced, f"x is on {x.device}, and {_NOT_INTERPRETED}")
        if forced != "triton" or operation not in IN_PYTORCH_ON_CUDA:
            return forced
    if x.is_cpu:
        return "cpu" if WHY_NO_CORE is None else "reference"
    if x.device.type != "cuda":
        return "reference"
    if operation in IN_PYTORCH_ON_CUDA:
        return "cuda" if WHY_NO_CORE is None else "reference"
    rows = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 1
    for bound, backends in PREFERENCES[ROUNDED if rounded else operation]:
        if rows <= bound:
            return next((backend for backend in backends if _WHY_NOT[backend] is None), "reference")
    raise AssertionError(f"no preference covers {rows} rows")


def implementation(operation: str, x: Tensor, rounded: bool = False) -> Callable[..., Any]:
    """The function, with the signature of the schema in csrc/ops.cpp, that `choose` chose."""
    return _FUNCTIONS[choose(operation, x, rounded)][operation]

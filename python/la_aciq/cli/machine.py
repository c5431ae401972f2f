"""This machine, its compiled core and its threads, in words."""

from ..errors import LaAciqError


def core() -> str:
    """The compiled core in words: how it was built and what it runs on."""
    from .. import ops

    reason = ops.why_unavailable("cpu")
    if reason is not None:
        return f"not available: {reason}"
    from .. import _C

    built, cpu = _C.build_info(), _C.cpu_info()
    # Of GCC, __VERSION__ is a number alone; other compilers begin it with their name.
    compiler = f"GCC {built['compiler']}" if built["compiler"][:1].isdigit() else built["compiler"]
    return f"{cpu['isa']} of {', '.join(cpu['available'])}; built with {compiler} for torch {built['torch']}"


def threads() -> str:
    """How many threads the operations run on, in words."""
    import torch

    from .. import ops

    count = torch.get_num_threads()
    if ops.why_unavailable("cpu") is None:
        from .. import _C

        count = _C.cpu_info()["threads"]
    return "1 thread" if count == 1 else f"{count} threads"


def forced_backend() -> str:
    """The backend that LA_ACIQ_BACKEND forces, in words."""
    from ..ops.backends import forced_by_environment

    try:
        backend = forced_by_environment()
    except LaAciqError as error:
        return str(error)
    return "no backend (LA_ACIQ_BACKEND is not set)" if backend is None else f"{backend} (by LA_ACIQ_BACKEND)"

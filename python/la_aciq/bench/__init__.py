"""What `la-aciq bench` measures on this machine: operations (`ops`), single layers (`layer`), a server (`serve`)."""

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The model of this machine's CPU, as Linux names it, or its architecture elsewhere."""
    for line in _CPUINFO.read_text("utf-8").splitlines() if _CPUINFO.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


__all__ = ["cpu_name"]

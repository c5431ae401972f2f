"""What `la-aciq bench` measures on this machine: operations (`ops`), single layers (`layer`), a server (`serve`)."""

import importlib.metadata
import platform
import re
from collections.abc import Iterable
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The model of this machine's CPU, as Linux names it, or its architecture elsewhere.

    A virtual machine may call CPUs of several generations by one name without a number, such as "AMD EPYC". Then the
    name gets the family and the model.
    """
    lines = _CPUINFO.read_text("utf-8").splitlines() if _CPUINFO.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = fields.get("model name")
    if not name:
        return platform.processor() or platform.machine()
    if re.search(r"\d", name) or not {"cpu family", "model"} <= fields.keys():
        return name
    return f"{name} (family {fields['cpu family']}, model {fields['model']})"


def in_file_names(device: str) -> str:
    """A device's name as result files have it: "AMD EPYC" is amd-epyc."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of installed packages; a package that is not installed is left out.

    Args:
        packages: names as pip knows them.

    Returns:
        Versions by name.
    """
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


__all__ = ["cpu_name", "in_file_names", "versions"]

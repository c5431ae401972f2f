"""Builds csrc/cuda for the CPU (tests/cuda/emulation) and loads it as torch.ops.la_aciq_emulated.

Objects are kept in build/cuda-emulation, named by a hash of everything they are made from.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
EMULATION = Path(__file__).parent / "emulation"
FOLDER = ROOT / "build" / "cuda-emulation"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))

# Undefined behaviour in a kernel, such as a misaligned 16-byte access, stops the process with a message.
KERNEL_FLAGS = ["-O1", "-g1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-Wall", "-Wextra", "-Werror"]
KERNEL_FLAGS += ["-Wno-unknown-pragmas", "-Wno-unused-function"]
# Reads and writes outside of an allocation, also of shared memory.
SANITIZE = os.environ.get("LA_ACIQ_EMULATION_ASAN") == "1"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def library() -> Path:
    """The shared library, built if it is not there; tests that run side by side wait for one build."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / "lock"):
        return build()


def build() -> Path:
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler")
    flags = ["-std=c++20", "-fPIC", "-ffp-contract=off", f"-I{EMULATION}", f"-I{CSRC}"]
    kernel_flags = [*KERNEL_FLAGS, *(["-fsanitize=address"] if SANITIZE else [])]
    torch_flags = ["-O1", "-w", f"-I{sysconfig.get_path('include')}"]
    torch_flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    torch_flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    units = [(source, kernel_flags) for source in (*KERNELS, EMULATION / "emulation.cpp", EMULATION / "faulty.cpp")]
    units.append((EMULATION / "bindings.cpp", torch_flags))

    headers = hashlib.sha256(torch.__version__.encode())
    for path in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *EMULATION.rglob("*.h"), *CSRC.glob("**/ops.cpp")]):
        if "cpu" not in path.parts:
            headers.update(path.read_bytes())

    def compile_one(unit: tuple[Path, list[str]]) -> Path:
        source, own_flags = unit
        command = [cxx, *flags, *own_flags, "-x", "c++", "-c", str(source)]
        key = headers.copy()
        key.update(repr(command).encode() + source.read_bytes())
        target = FOLDER / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            run([*command, "-o", str(partial)])
            partial.rename(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, reversed(units)))  # the longest first
    name = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    target = FOLDER / f"emulated-{name}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        sanitizers = ["-fsanitize=undefined", *(["-fsanitize=address"] if SANITIZE else [])]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        run(
            [
                cxx,
                "-shared",
                *sanitizers,
                *map(str, objects),
                *libraries,
                "-ltorch",
                "-ltorch_cpu",
                "-lc10",
                "-o",
                str(partial),
            ]
        )
        partial.rename(target)
    return target


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


@cache
def load() -> ctypes.CDLL:
    torch.ops.load_library(str(library()))
    return ctypes.CDLL(str(library()))


def set_order(order: int) -> None:
    """The order of blocks and threads from here on: 0 ascending, 1 descending, else shuffled by that seed."""
    load().la_aciq_emulation_order(order)

"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over random calls of every instruction set.

fuzz/fuzz_kernels.cpp makes the calls and knows what is right. It is built here with the kernels, without PyTorch and
with the flags of setup.py, in build/fuzz, where objects are kept under a hash of what they are made from.
"""

import ast
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).parent / "fuzz" / "fuzz_kernels.cpp"
FOLDER = ROOT / "build" / "fuzz"
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
SEEDS = (1, 1_000_001)  # a process each, side by side
CASES = 3000


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def sanitizing_compiler() -> list[str]:
    """The compiler's command; skips where it does not make programs with the sanitizers that run."""
    compiler = shlex.split(os.environ.get("CXX", "c++" if shutil.which("c++") else "g++"))
    if not compiler or shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    FOLDER.mkdir(parents=True, exist_ok=True)
    program = FOLDER / f"probe-{os.getpid()}"
    source = program.with_suffix(".cpp")
    source.write_text("#include <sanitizer/common_interface_defs.h>\nint main() { return 0; }\n")
    try:
        built = run([*compiler, *SANITIZERS, str(source), "-o", str(program)])
        said = built.stderr if built.returncode else run([str(program)]).stderr
        if built.returncode or said:
            pytest.skip(f"{' '.join(compiler)} has no working AddressSanitizer and UndefinedBehaviorSanitizer: {said}")
    finally:
        source.unlink()
        program.unlink(missing_ok=True)
    return compiler


def flags_of_setup() -> dict:
    """The constants of setup.py, which is a program and cannot be imported."""
    values = {"sys": sys}
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id.endswith(("_FLAGS", "_ARCHITECTURES")):
            values[node.targets[0].id] = eval(compile(ast.Expression(node.value), "setup.py", "eval"), values)
    return values


@pytest.fixture(scope="module")
def fuzz_kernels() -> Path:
    """The program, built if it is not there."""
    compiler = sanitizing_compiler()
    flags_of = flags_of_setup()
    common, by_isa = flags_of["COMMON_FLAGS"], flags_of["ISA_FLAGS"]
    folder = ROOT / "csrc" / "cpu" / "kernels"
    kernels = sorted((folder / "isa").glob("*.cpp"))
    if platform.machine().lower() not in ("x86_64", "amd64"):
        kernels = [source for source in kernels if source.stem not in by_isa]
    sources = [*kernels, folder / "dispatch.cpp", DRIVER]
    headers = hashlib.sha256()
    for path in sorted([*folder.glob("*.h"), *(ROOT / "csrc" / "common").glob("*.h")]):
        headers.update(path.read_bytes())

    def compile_one(source: Path) -> Path:
        flags = [*common, *by_isa.get(source.stem, []), *SANITIZERS, "-O1", "-g1", "-w", f"-I{ROOT / 'csrc'}"]
        command = [*compiler, *flags, "-c", str(source)]
        key = headers.copy()
        key.update(repr(command).encode() + source.read_bytes())
        target = FOLDER / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            built = run([*command, "-o", str(partial)])
            assert built.returncode == 0, built.stderr
            partial.rename(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = FOLDER / f"fuzz_kernels-{hashlib.sha256(repr(objects).encode()).hexdigest()[:16]}"
    if not program.exists():
        partial = program.with_suffix(f".{os.getpid()}")
        built = run([*compiler, *SANITIZERS, *map(str, objects), "-o", str(partial)])
        assert built.returncode == 0, built.stderr
        partial.rename(program)
    return program


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "AddressSanitizer: heap-buffer-overflow"),
        ("undefined", "runtime error: signed integer overflow"),
        ("wrong", "quantize, code of row 0, element 0: got 15, expected 0.5"),
    ],
)
def test_mistakes_are_found(fuzz_kernels, kind, message):
    result = run([str(fuzz_kernels), "fault", kind])
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def test_kernels_are_right_and_stay_in_bounds(fuzz_kernels):
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        results = list(pool.map(lambda seed: run([str(fuzz_kernels), str(seed), str(CASES)]), SEEDS))
    for result in results:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
        assert result.stdout.startswith(f"{CASES} cases on baseline")

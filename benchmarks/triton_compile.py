"""Compiles every Triton kernel ahead of time and records what the compiler says of it; needs Triton, but no GPU.

    python -m benchmarks.triton_compile                 writes results/triton-compile.json
    python -m benchmarks.triton_compile --check         compares with that file; status 1 if a kernel spills or changed
    python -m benchmarks.triton_compile --candidates    writes results/triton-candidates.json: what tune_triton tries

The operations run on meta tensors, so that what is compiled is what their host code would launch: the same tiles, warps
and specialized arguments (Triton bakes in which integers are 1 or multiples of 16). registers and spills, the
instructions that move registers to and from local memory, are those of the machine code; load_bytes is the widest load
from global memory, and tensor_core the matrix instruction used.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from la_aciq.kernels import tuning

from . import tune_triton

RESULTS = Path(__file__).parent / "results" / "triton-compile.json"
CANDIDATES = RESULTS.with_name("triton-candidates.json")
TARGETS = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPERATIONS = ("moments", "quantize", "quantize_dynamic", "dequantize", "rotate", "linear")
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is compiled: each operation on typical shapes, and on those that are hard on registers."""
    op = {name: getattr(import_module(f"la_aciq.kernels.{name}"), name) for name in OPERATIONS}

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def table(groups: int) -> Tensor:
        return empty(12, groups, dtype=torch.float32)

    def ids(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.int32)

    def signs(k: int) -> Tensor:
        return empty(k, dtype=torch.int8)

    for dtype in (torch.bfloat16, torch.float64):
        x = empty(8, 512, 4096, dtype=dtype)
        yield f"moments {x.dtype}", lambda x=x: op["moments"](x, ids(8), 12, False)
    yield "moments per row of 64, histogram", lambda: op["moments"](empty(4096, 64), ids(4096), 12, True)
    for dtype, codebook in ((torch.float32, "midrise"), (torch.bfloat16, "midtread")):
        x = empty(8, 512, 4096, dtype=dtype)
        yield (
            f"quantize {dtype} {codebook} groups of 64",
            lambda x=x, codebook=codebook: op["quantize"](x, table(64), ids(8), 64, codebook),
        )
        yield (
            f"quantize_dynamic {dtype} {codebook} groups of 64",
            lambda x=x, codebook=codebook: op["quantize_dynamic"](x, table(64), ids(8), 64, "rms", codebook),
        )
        yield f"rotate {dtype} block 4096", lambda x=x: op["rotate"](x, signs(4096))
        yield (
            f"dequantize to {dtype}",
            lambda dtype=dtype: op["dequantize"](
                empty(8, 512, 2048, dtype=torch.uint8), table(64), ids(8), k=4096, group_size=64, dtype=dtype
            ),
        )
    x = empty(8, 512, 4096)
    yield (
        "quantize tail sums, rotated block 4096",
        lambda: op["quantize"](x, table(64), ids(8, 512), 64, "midrise", signs(4096), 0, True),
    )
    yield "quantize one group per row", lambda: op["quantize"](x, table(1), ids(8))
    yield "quantize odd K, groups of 100", lambda: op["quantize"](empty(64, 4095), table(41), ids(64), 100)
    yield "quantize_dynamic absmax per row", lambda: op["quantize_dynamic"](x, table(1), ids(8), 0, "absmax")
    yield (
        "quantize_dynamic rotated, groups of 64",
        lambda: op["quantize_dynamic"](x, table(64), ids(8), 64, "rms", "midrise", signs(4096)),
    )
    for k in (4096, 16384, 28672):
        yield (
            f"quantize_dynamic rotated, one group per row of {k}",
            lambda k=k: op["quantize_dynamic"](empty(64, k), table(1), ids(64), 0, "rms", "midrise", signs(k)),
        )
    yield (
        "quantize_dynamic absmax, one group per row of 28672",
        lambda: op["quantize_dynamic"](empty(64, 28672), table(1), ids(64), 0, "absmax"),
    )
    yield "rotate block 65536", lambda: op["rotate"](empty(64, 65536), signs(65536))

    def linear(rows: int, n: int = 4096, k: int = 4096, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
        groups = k // 64
        if options.get("activation_bits", 16) < 16:
            options |= {"clips": table(groups), "language_ids": ids(rows), "activation_group_size": 64}
        weight = empty(n, k // 2, dtype=torch.uint8)
        return op["linear"](
            empty(rows, k, dtype=dtype), weight, empty(n, groups, dtype=torch.float32), group_size=64, **options
        )

    for rows in (1, 64, 4096):
        yield f"linear 16-bit, {rows} rows", lambda rows=rows: linear(rows)
        for bits in (8, 4):
            yield (
                f"linear INT{bits}, {rows} rows",
                lambda rows=rows, bits=bits: linear(rows, activation_bits=bits, signs=signs(4096)),
            )
    yield (
        "linear float16, mid-tread, bias",
        lambda: linear(16, dtype=torch.float16, weight_codebook="midtread", bias=empty(4096)),
    )
    for rows in (1, 64):
        yield f"linear float32, {rows} rows", lambda rows=rows: linear(rows, dtype=torch.float32)
    yield "linear INT4 rms", lambda: linear(16, activation_bits=4, activation_clip="rms", signs=signs(4096))


class Recorder:
    """Stands in for torch.library.wrap_triton: notes launches instead of making them."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, dict[str, Any], dict[str, int]]] = []

    def __call__(self, kernel: Any) -> "Recorder":
        self.kernel = kernel
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
            self.launches.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs, options))

        return launch


def record(run: Callable[[], Any]) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """The launches of one call on meta tensors."""
    recorder = Recorder()
    modules = [import_module(f"la_aciq.kernels.{name}") for name in OPERATIONS]
    originals = [module.wrap_triton for module in modules]
    try:
        for module in modules:
            module.wrap_triton = recorder
        run()
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.wrap_triton = original
    return recorder.launches


def source_of(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """The kernel specialized as Triton's launcher does for these arguments; tensors are 16-byte aligned."""
    signature, constants, attributes = {}, {}, {}
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constexprs or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


def compile_launch(kernel: Any, arguments: dict[str, Any], options: dict[str, int], target: int) -> dict[str, Any]:
    compiled = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    ptx = compiled.asm["ptx"]
    widths = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (\w+)", ptx)]
    loads = re.findall(r"ld\.global(?:\.\w+(?:::\w+)?)*?(?:\.v(\d))?\.b(\d+)", ptx)
    widths += [int(vector or 1) * int(bits) // 8 for vector, bits in loads]
    matrix = re.findall(r"(wgmma\.mma_async|tcgen05\.mma|mma)\.[\w.:]*?(s32\.s8|f32\.f16|f32\.bf16|kind::\w+)", ptx)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "load_bytes": max(widths, default=0),
        "tensor_core": " ".join(matrix[0]) if matrix else None,
    }


def compile_case(name: str, target: int) -> list[dict[str, Any]]:
    rows = []
    for kernel, arguments, options in record(dict(cases())[name]):
        row = {"case": name, "kernel": kernel.fn.__name__, "target": f"sm_{target}"}
        rows.append(row | compile_launch(kernel, arguments, options, target))
    return rows


def candidates() -> Iterator[tuple[str, dict[str, int], Callable[[], Any]]]:
    """What tune_triton tries: key, parameters, and a call on meta tensors. Neither sizes of inputs nor the number of
    programs changes the code."""
    for make in tune_triton.problems("meta"):
        problem = make()
        if "small" in problem.key:
            continue
        for candidate in problem.candidates:
            if "programs" not in candidate:
                yield problem.key, candidate, problem.run


def compile_candidate(index: int, target: int) -> list[dict[str, Any]]:
    key, candidate, run = list(candidates())[index]
    with tuning.use({key: candidate}):
        launches = record(run)
    rows = []
    for kernel, arguments, options in launches:
        row = {"key": key, "candidate": candidate, "kernel": kernel.fn.__name__, "target": f"sm_{target}"}
        usage = compile_launch(kernel, arguments, options, target)
        rows.append(row | {name: usage[name] for name in ("registers", "spills", "shared")})
    return rows


def compile_candidates(jobs: int) -> dict[str, Any]:
    work = [(index, target) for index in range(len(list(candidates()))) for target in TARGETS]
    with ProcessPoolExecutor(jobs) as pool:
        rows = [row for result in pool.map(compile_candidate, *zip(*work, strict=True)) for row in result]
    return {"schema": 1, "triton": triton.__version__, "candidates": rows}


def compile_all(jobs: int, targets: Sequence[int] = TARGETS) -> dict[str, Any]:
    work = [(name, target) for name, _ in cases() for target in targets]
    with ProcessPoolExecutor(jobs) as pool:
        rows = [row for result in pool.map(compile_case, *zip(*work, strict=True)) for row in result]
    return {"schema": 1, "triton": triton.__version__, "kernels": rows}


def complaints(now: dict[str, Any], recorded: dict[str, Any], targets: Sequence[int] = TARGETS) -> list[str]:
    """Spills, and differences from the record where the compiler is the one the record was made with."""
    names = {f"sm_{target}" for target in targets}
    recorded_kernels = [row for row in recorded["kernels"] if row["target"] in names]
    messages = [
        f"{row['kernel']} ({row['case']}, {row['target']}): {row['spills']} spill instructions"
        for row in now["kernels"]
        if row["spills"]
    ]
    if now["triton"] == recorded["triton"] and now["kernels"] != recorded_kernels:
        changed = [row for row in now["kernels"] if row not in recorded_kernels]
        messages.append(
            f"{RESULTS.name} is not what the kernels compile to ({len(changed)} rows changed); "
            "run python -m benchmarks.triton_compile and commit the file"
        )
    return messages


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the committed record instead of writing it")
    mode.add_argument("--candidates", action="store_true", help="compile what tune_triton tries")
    parser.add_argument("--target", type=int, choices=TARGETS, help="with --check: only this compute capability")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: kernels are interpreted, there is nothing to compile")
    if options.candidates:
        lines = ",\n  ".join(
            map(json.dumps, (record_of_candidates := compile_candidates(options.jobs)).pop("candidates"))
        )
        CANDIDATES.write_text(
            json.dumps(record_of_candidates, indent=1)[:-2] + f',\n "candidates": [\n  {lines}\n ]\n}}\n'
        )
        return 0
    if options.target is not None and not options.check:
        parser.error("--target needs --check: the record holds every target")
    targets = TARGETS if options.target is None else (options.target,)
    now = compile_all(options.jobs, targets)
    if not options.check:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(now, indent=1) + "\n")
        return 0
    messages = complaints(now, json.loads(RESULTS.read_text()), targets)
    print("\n".join(messages) or f"{len(now['kernels'])} kernels as recorded, none spills")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())

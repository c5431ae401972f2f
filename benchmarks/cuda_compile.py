"""Compiles every CUDA kernel and records what the compiler says of it; needs nvcc, but no GPU.

    python -m benchmarks.cuda_compile            writes results/cuda-compile.json
    python -m benchmarks.cuda_compile --check    compares with that file; status 1 if a kernel spills or has changed

Per architecture and kernel: registers of a thread, bytes of local memory (stack and spills) and of static shared
memory. What changes with the compiler is compared only where its version is that of the file.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "cuda-compile.json"
TARGETS = ("80", "90", "100")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc_version() -> str:
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", output)[1]


def compile_source(source: Path) -> str:
    """What nvcc prints for one file and all targets."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-O3", "-lineinfo", "-Xptxas=-v", "-Werror=all-warnings", f"-I{ROOT / 'csrc'}"]
        command += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
        command += ["-c", str(source), "-o", str(Path(folder) / "out.o")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return result.stderr


def demangle(names: list[str]) -> list[str]:
    """Readable names; as they are where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"la_aciq::(cuda::)?|^void ", "", line) for line in text.splitlines()]
    return [line[: line.rindex("(")] for line in short]


def parse(log: str) -> list[dict]:
    """The kernels of the output of ptxas -v."""
    kernels = []
    for block in log.split("Compiling entry function")[1:]:
        name, target = re.match(r" '(\w+)' for 'sm_(\d+)'", block).groups()
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", block).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        shared = re.search(r"(\d+) bytes smem", block)
        kernels.append(
            {
                "kernel": name,
                "target": int(target),
                "registers": registers,
                "stack_bytes": stack,
                "spill_bytes": stores + loads,
                "static_shared_bytes": int(shared[1]) if shared else 0,
            }
        )
    for kernel, name in zip(kernels, demangle([kernel["kernel"] for kernel in kernels]), strict=True):
        kernel["kernel"] = name
    return kernels


def measure() -> dict:
    with ThreadPoolExecutor(2) as pool:
        logs = pool.map(compile_source, sorted(SOURCES, key=lambda path: -path.with_suffix(".cuh").stat().st_size))
        kernels = [kernel for log in logs for kernel in parse(log)]
    return {
        "schema": 1,
        "nvcc": nvcc_version(),
        "targets": [int(target) for target in TARGETS],
        "kernels": sorted(kernels, key=lambda kernel: (kernel["kernel"], kernel["target"])),
    }


def problems(measured: dict, recorded: dict) -> list[str]:
    """What is wrong with the compiled kernels, and where they differ from the record."""
    faults = [
        "{kernel} for sm_{target}: {spill_bytes} bytes of spills, {stack_bytes} of stack".format(**kernel)
        for kernel in measured["kernels"]
        if kernel["spill_bytes"] or kernel["stack_bytes"]
    ]
    if {(kernel["kernel"], kernel["target"]) for kernel in measured["kernels"]} != {
        (kernel["kernel"], kernel["target"]) for kernel in recorded["kernels"]
    }:
        faults.append(f"{RESULTS.name} lists other kernels than csrc/cuda has")
    elif measured["nvcc"] == recorded["nvcc"] and measured["kernels"] != recorded["kernels"]:
        faults.append(f"{RESULTS.name} is not what this compiler gives")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the record instead of writing it")
    arguments = parser.parse_args()
    measured = measure()
    if arguments.check:
        faults = problems(measured, json.loads(RESULTS.read_text()))
        print("\n".join(faults) or f"{len(measured['kernels'])} kernels as recorded")
        return int(bool(faults))
    lines = ",\n  ".join(json.dumps(kernel) for kernel in measured.pop("kernels"))
    RESULTS.write_text(json.dumps(measured, indent=1)[:-2] + f',\n "kernels": [\n  {lines}\n ]\n}}\n')
    print(f"results: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

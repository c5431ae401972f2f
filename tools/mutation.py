"""Seeds faults in the kernels and shows which tests find them.

    python tools/mutation.py cpu [--all-cases] [--only NAME ...]
    python tools/mutation.py cuda [--all-cases] [--only NAME ...]

A copy of the tree is built once with every fault in it, each behind a switch that the environment sets; then the
operations' tests run once per fault and stop at the first failure. --all-cases runs every combination of parameters in
place of pairs (tests/pairwise.py). The command fails when a fault is not found. CUDA kernels run in the emulation of
tests/cuda. A fault that hangs or crashes counts as found.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SWITCH = """#include <cstdlib>
#ifndef LA_ACIQ_FAULT_SWITCH
#define LA_ACIQ_FAULT_SWITCH
inline const int la_aciq_fault = std::getenv("LA_ACIQ_FAULT") ? std::atoi(std::getenv("LA_ACIQ_FAULT")) : 0;
#endif
"""
SECONDS = 1200  # for the tests of one fault


@dataclass(frozen=True)
class Fault:
    """`expression` in `file` becomes `faulty`; `name` begins with the operation."""

    name: str
    file: str
    expression: str
    faulty: str


CPU = (
    Fault("quantize: the odd element's byte keeps its high nibble", "kernels/quantize.h", "rest % 2", "false"),
    Fault("quantize: the end code is one too low", "kernels/quantize.h", "f32(kHalf - 1)", "f32(kHalf - 2)"),
    Fault(
        "quantize: padding counts as beyond a negative clip",
        "kernels/quantize.h",
        "(clip < 0 ? 16 - size : 0)",
        "(clip < 0 ? 0 : 0)",
    ),
    Fault(
        "quantize: tail sums of groups past the first 64",
        "kernels/quantize.h",
        "4 * (entry * args.groups + first + g)",
        "4 * (entry * args.groups + g)",
    ),
    Fault(
        "quantize: the seventeenth of a short group",
        "kernels/quantize.h",
        "rest > 16 ? load_partial(x + i + 16, rest - 16) : f32(0)",
        "rest > 17 ? load_partial(x + i + 16, rest - 16) : f32(0)",
    ),
    Fault(
        "quantize_dynamic: elements that are not finite count in the mean square",
        "kernels/quantize.h",
        "count_finite > 0 ? static_cast<double>(count_finite) : 1",
        "static_cast<double>(range.size)",
    ),
    Fault("quantize_dynamic: infinities in absmax", "kernels/quantize.h", "keep(finite(v), abs(v))", "abs(v)"),
    Fault(
        "quantize_dynamic: a chain of sums is left out",
        "kernels/quantize.h",
        "add(high_sums[2], high_sums[3])",
        "high_sums[2]",
    ),
    Fault(
        "quantize_dynamic: clips of groups past the first 64",
        "kernels/quantize.h",
        "args.row_clips + row * args.groups + first",
        "args.row_clips + row * args.groups",
    ),
    Fault("quantize_dynamic: the factor of the first group", "kernels/quantize.h", "factors[g]", "factors[0]"),
    Fault(
        "dequantize: the last value of an odd group",
        "kernels/dequantize.h",
        "static_cast<size_t>((n - i + 1) / 2)",
        "static_cast<size_t>((n - i) / 2)",
    ),
    Fault("dequantize: a clip of 0 or NaN", "kernels/dequantize.h", "clip_or_zero(clip)", "clip"),
    Fault(
        "dequantize: the second half of 32", "kernels/dequantize.h", "lookup(levels, next16)", "lookup(levels, first16)"
    ),
    Fault("dequantize: clips of the first entry", "kernels/dequantize.h", "entry_of(args.language_ids, row)", "0"),
    Fault("dequantize: the clip of the first group", "kernels/dequantize.h", "clips[group]", "clips[0]"),
    Fault(
        "round_weights: errors of a block's last columns weigh nothing",
        "kernels/round.h",
        "smaller(c + kRoundColumns, size)",
        "c",
    ),
    Fault(
        "round_weights: the share above the best is not tried",
        "kernels/round.h",
        "round == 0 ? kShares : 2",
        "round == 0 ? kShares : 1",
    ),
    Fault(
        "round_weights: a clip is chosen for the last block of its group",
        "kernels/round.h",
        "a == group.first ? error : add(load(total), error)",
        "error",
    ),
    Fault(
        "round_weights: errors over no diagonal", "kernels/round.h", "f32(1.0f / args.factor[j * k + j])", "f32(1.0f)"
    ),
    Fault("round_weights: clips are not refined", "kernels/round.h", "ratio > kLeastRatio", "false"),
    Fault(
        "round_weights: sums of the clip before",
        "kernels/round.h",
        "muladd(change, load(products + 16 * j), load(sums + 16 * j))",
        "load(sums + 16 * j)",
    ),
    Fault(
        "round_weights: errors before the descent",
        "kernels/round.h",
        "add(load(x + 16 * j), change)",
        "load(x + 16 * j)",
    ),
    Fault("round_weights: codes under a clip of 0", "kernels/round.h", "steps[16 * (j / args.group_size)] > 0", "true"),
    Fault("rotate: some sizes of block are a stage short", "kernels/rotate.h", "2 * half == block", "false"),
    Fault(
        "rotate: stages are left out",
        "kernels/rotate.h",
        "half *= kHadamardRadix",
        "half *= 2 * kHadamardRadix",
    ),
    Fault(
        "rotate: signs of the first block",
        "kernels/rotate.h",
        "signed_and_scaled(start + i, load(x + start + i))",
        "signed_and_scaled(i, load(x + start + i))",
    ),
    Fault(
        "rotate: small blocks past the first",
        "kernels/rotate.h",
        "hadamard(out + start, block)",
        "hadamard(out, block)",
    ),
    Fault("rotate: no scale", "kernels/rotate.h", "f32(rotation.scale)", "f32(1)"),
    Fault(
        "moments: padding is in the range",
        "kernels/moments.h",
        "store(lane, fill)",
        "store(lane, f32(static_cast<float>(center)))",
    ),
    Fault(
        "moments: histograms count what is not finite",
        "kernels/moments.h",
        "static_cast<int64_t>(state.nonfinite)",
        "static_cast<int64_t>(0)",
    ),
    Fault("moments: fourth powers of half the chains", "kernels/moments.h", "add(s4, other.s4)", "s4"),
    Fault(
        "moments: far from zero without a second pass",
        "kernels/moments.h",
        "0.9375 * static_cast<double>(n) * s2",
        "2.0 * static_cast<double>(n) * s2",
    ),
    Fault(
        "moments: the first bin has an edge",
        "kernels/moments.h",
        "bin > 0 && bin < kHistogramBins - 1",
        "bin < kHistogramBins - 1",
    ),
    Fault("linear: bias of the first outputs", "kernels/product.h", "args.bias + first", "args.bias"),
    Fault(
        "linear: the clip of the first group of activations",
        "kernels/product.h",
        "row_clips[r * args.activation_groups]",
        "args.row_clips[(row + r) * args.activation_groups]",
    ),
    Fault(
        "linear: few rows, the bias of a short panel",
        "kernels/few_rows.h",
        "load_partial(args.bias + first, outputs)",
        "load_partial(args.bias + first, outputs - 1)",
    ),
    Fault(
        "linear: few rows, the clip of a group of weights",
        "kernels/few_rows.h",
        "segment->weight_group % kClips",
        "segment->weight_group % (kClips / 2)",
    ),
    Fault("linear: sums of the weights in integers", "kernels/few_rows.h", "-product.zero", "1 - product.zero"),
)
CUDA = (
    Fault(
        "quantize: the odd element's byte keeps its high nibble",
        "quantize.cuh",
        "left == 1 ? nibbles & 15 : nibbles",
        "nibbles",
    ),
    Fault(
        "quantize: the clip of the first group",
        "quantize.cuh",
        "args.clips.groups == 1 ? 0 : p / pieces_per_group",
        "0",
    ),
    Fault("quantize: rows past the end", "quantize.cuh", "p >= pieces", "p >= pieces - 1"),
    Fault(
        "quantize: zeros after the end",
        "quantize.cuh",
        "i < left ? __ldg(p + i) : T{}",
        "__ldg(p + (i < left ? i : 0))",
    ),
    Fault(
        "quantize: the codes of the first row",
        "quantize.cuh",
        "args.codes + row * ((k + 1) / 2)",
        "args.codes + row * (k / 2)",
    ),
    Fault("quantize_dynamic: sums that leave float32", "rows.cuh", "sum_of_squares < 1e38f", "true"),
    Fault("quantize_dynamic: infinities in absmax", "rows.cuh", "is_finite(magnitude) ? magnitude : 0.0f", "magnitude"),
    Fault(
        "quantize_dynamic: the short last group",
        "rows.cuh",
        "rest < args.clips.size ? rest : args.clips.size",
        "args.clips.size",
    ),
    Fault(
        "quantize_dynamic: the factor of the first group",
        "rows.cuh",
        "table[first_group + group]",
        "table[first_group]",
    ),
    Fault(
        "quantize_dynamic: elements past a short row count",
        "rows.cuh",
        "i < used && is_finite(v[i])",
        "is_finite(v[i])",
    ),
    Fault("rotate: lanes", "rows.cuh", "lane & distance ? -1.0f : 1.0f", "lane & 1 ? -1.0f : 1.0f"),
    Fault(
        "rotate: a stage in shared memory",
        "rows.cuh",
        "set >> first_bit << (first_bit + kBits)",
        "set >> first_bit << first_bit",
    ),
    Fault(
        "rotate: signs of the first segment",
        "rows.cuh",
        "static_cast<const int8_t*>(args.rotation.signs) + start + element",
        "static_cast<const int8_t*>(args.rotation.signs) + element",
    ),
    Fault("rotate: blocks of 512", "rows.cuh", "block <= 8 * kWarp", "block <= 16 * kWarp"),
    Fault("rotate: no scale", "rows.cuh", "__float_as_uint(args.rotation_scale)", "__float_as_uint(1.0f)"),
    Fault("moments: what is not finite", "moments.cuh", "i >= used || !is_finite(v[i])", "i >= used"),
    Fault("moments: a short piece is full", "moments.cuh", "used == 8", "used > 0"),
    Fault("moments: fourth powers", "moments.cuh", "__fmaf_rn(square, square, f4)", "__fmaf_rn(square, d, f4)"),
    Fault("moments: the last bin has an edge", "moments.cuh", "bin > 0 && bin < kHistogramBins - 1", "bin > 0"),
    Fault("moments: tiles are merged but the last", "moments.cuh", "tile <= last", "tile < last"),
    Fault("linear: the last output", "linear.cuh", "output < n ? output : n - 1", "output < n - 1 ? output : 0"),
    Fault(
        "linear: the clip of the first group",
        "linear.cuh",
        "args.weights.groups == 1 ? 0 : chunk / chunks_per_group",
        "0",
    ),
    Fault("linear: a pair of elements", "linear.cuh", "__byte_perm(v.y, v.w, 0x7632)", "__byte_perm(v.y, v.w, 0x5410)"),
    Fault(
        "linear: a warp's sum",
        "linear.cuh",
        "shared[w * kRows * kOutputs + i]",
        "(w > 0 ? shared[w * kRows * kOutputs + i] : 0.0f)",
    ),
    Fault("linear: the zero of midtread", "linear.cuh", "16.0f", "15.0f"),
)
FAULTS = {"cpu": CPU, "cuda": CUDA}
TESTS = {
    "cpu": [
        "tests/ops/test_ops.py",
        "tests/ops/test_linear.py",
        "tests/ops/test_moments.py",
        "tests/ops/test_round_weights.py",
    ],
    "cuda": ["tests/cuda/test_emulation.py", "tests/cuda/test_operations.py"],
}


def seeded(tree: Path, faults: tuple[Fault, ...]) -> None:
    """Puts every fault behind its switch: fault i is on where LA_ACIQ_FAULT is i + 1."""
    for number, fault in enumerate(faults, 1):
        (path,) = (tree / "csrc").rglob(fault.file)
        source = path.read_text("utf-8")
        if fault.expression not in source:
            sys.exit(f"{fault.name}: {fault.file} has no {fault.expression!r}; bring this list up to date")
        switch = f"(la_aciq_fault == {number} ? ({fault.faulty}) : ({fault.expression}))"
        path.write_text(source.replace(fault.expression, switch), "utf-8")
    for name in {fault.file for fault in faults}:
        (path,) = (tree / "csrc").rglob(name)
        path.write_text(SWITCH + path.read_text("utf-8"), "utf-8")


def copied(folder: str) -> Path:
    """The tracked files of the working tree, as they are on disk."""
    tree = Path(folder) / "tree"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def outcome(tree: Path, tests: list[str], environment: dict[str, str]) -> str:
    """The first test that failed, how the run ended otherwise, or "passed"."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s"
    if run.returncode == 0:
        return "passed"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    if failed is None and run.returncode > 0:
        sys.exit(f"the tests did not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return failed[1] if failed else f"ended by signal {-run.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kernels", choices=FAULTS)
    parser.add_argument("--all-cases", action="store_true", help="every combination of parameters, not pairs")
    parser.add_argument("--only", nargs="+", default=("",), metavar="NAME", help="faults whose names begin so")
    parser.add_argument("--output", type=Path, help="JSON file to write; what it has of other faults is kept")
    arguments = parser.parse_args()
    faults, tests = FAULTS[arguments.kernels], TESTS[arguments.kernels]
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(folder)
        seeded(tree, faults)
        environment = os.environ | {
            "PYTHONPATH": f"{tree / 'python'}:{tree}",
            "LA_ACIQ_CUDA": "0",
            "LA_ACIQ_FAULT": "0",
        }
        environment["LA_ACIQ_ALL_CASES"] = str(int(arguments.all_cases))
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, env=environment | {"LA_ACIQ_BUILD": "1"}, check=True, stdout=subprocess.DEVNULL)
        ask = [sys.executable, "-c", "import torch; from la_aciq import _C; print(*_C.cpu_info()['available'])"]
        answer = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True)
        instruction_sets = answer.stdout.split() if arguments.kernels == "cpu" else ["emulation"]
        started = time.perf_counter()
        if (clean := outcome(tree, tests, environment)) != "passed":
            sys.exit(f"without a fault: {clean}")
        print(f"{time.perf_counter() - started:6.1f} s  without a fault: passed", flush=True)
        results = []
        for number, fault in enumerate(faults, 1):
            if not fault.name.startswith(tuple(arguments.only)):
                continue
            started = time.perf_counter()
            verdict = outcome(tree, tests, environment | {"LA_ACIQ_FAULT": str(number)})
            seconds = round(time.perf_counter() - started, 1)
            results.append({"fault": fault.name, "file": fault.file, "found_by": verdict, "seconds": seconds})
            print(f"{seconds:6.1f} s  {fault.name}: {'NOT FOUND' if verdict == 'passed' else verdict}", flush=True)
    missed = [result["fault"] for result in results if result["found_by"] == "passed"]
    print(f"{len(results) - len(missed)} of {len(results)} faults found")
    if arguments.output:
        recorded = json.loads(arguments.output.read_text("utf-8"))["faults"] if arguments.output.exists() else []
        by_name = {result["fault"]: result for result in [*recorded, *results]}
        description = {
            "kernels": arguments.kernels,
            "all_cases": arguments.all_cases,
            "instruction_sets": instruction_sets,
            "faults": [by_name[fault.name] for fault in faults if fault.name in by_name],
        }
        arguments.output.write_text(json.dumps(description, indent=1) + "\n", "utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

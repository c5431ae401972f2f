"""Which backend runs an operation on CUDA tensors, from what bench_gpu measured, into la_aciq/ops/cuda_backends.json.

    python -m benchmarks.choose_backends [RESULT] [--output FILE]

RESULT is a file of benchmarks/results; without one, the table is that of the defaults below. Per operation and number
of rows the backend with the smaller time wins, over several shapes the one with the smaller geometric mean; within 3 %
the default does. A backend that failed loses. Between two numbers of rows that different backends win, their geometric
middle decides. Numbers of rows that only one backend was measured at are left out, and an operation that has no others
keeps its default. `verified` says that every check of gpu.sh passed and none of our implementations failed.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[1] / "python" / "la_aciq" / "ops" / "cuda_backends.json"
TIE = math.log(1.03)
CHECKS = ("build", "load", "tests-cuda", "tests-triton", "memcheck", "racecheck")

# By reasoning: the compiled kernel where there is one, else Triton; but `linear` with rounded activations, or with more
# rows than the compiled kernel is written for, goes to Triton first, which runs both on tensor cores. Largest number of
# rows (null: any) and the backends, best first.
Rules = list[tuple[int | None, list[str]]]
CUDA, TRITON = ["cuda", "triton"], ["triton", "cuda"]
DEFAULTS: dict[str, Rules] = {
    "moments": [(None, CUDA)],
    "quantize": [(None, CUDA)],
    "quantize_dynamic": [(None, CUDA)],
    "dequantize": [(None, CUDA)],
    "rotate": [(None, CUDA)],
    "linear": [(16, CUDA), (None, TRITON)],
    "linear, rounded activations": [(None, TRITON)],
}


def order_for(rules: Rules, rows: int) -> list[str]:
    return next(backends for bound, backends in rules if bound is None or rows <= bound)


def advantage(times: dict[str, float]) -> float | None:
    """log of Triton's time over the compiled kernel's; infinite where one of them failed (its time is inf); None where
    that is not known."""
    cuda, triton = times.get("cuda"), times.get("triton")
    if cuda is None or triton is None or (math.isinf(cuda) and math.isinf(triton)):
        return None
    return math.log(triton / cuda) if math.isfinite(cuda) else -math.inf


def winners(measured: list[dict[str, Any]], default: Rules) -> list[tuple[int, list[str]]]:
    """The backends, best first, at each number of rows that was measured on both."""
    times: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    for row in measured:
        backend = row["implementation"].removeprefix("la_aciq ")
        times[row["rows"], f"{row['operation']}, {row['shape']}"][backend] = row.get("median_s", math.inf)
    by_rows: dict[int, list[float]] = defaultdict(list)
    for (rows, _), pair in times.items():
        if (known := advantage(pair)) is not None:
            by_rows[rows].append(known)
    orders = []
    for rows, advantages in sorted(by_rows.items()):
        failed = {math.copysign(1, a) for a in advantages if math.isinf(a)}
        mean = 0.0 if len(failed) == 2 else sum(advantages) / len(advantages)
        orders.append((rows, order_for(default, rows) if abs(mean) < TIE else CUDA if mean > 0 else TRITON))
    return orders


def rules_of(orders: list[tuple[int, list[str]]]) -> Rules:
    """Neighbours with the same order are one rule; the last one holds for any more rows."""
    rules: Rules = []
    for (rows, backends), (next_rows, next_backends) in zip(orders, [*orders[1:], (0, None)], strict=True):
        if backends != next_backends:
            rules.append((math.isqrt(rows * next_rows) or None, backends))
    return rules


def table_of(result: dict[str, Any] | None) -> dict[str, Any]:
    ours = [row for row in result["rows"] if row["implementation"].startswith("la_aciq ")] if result else []
    preferences = {}
    for entry, default in DEFAULTS.items():
        orders = winners([row for row in ours if row.get("entry") == entry], default)
        preferences[entry] = rules_of(orders) if orders else default
    table: dict[str, Any] = {"schema": 1, "device": None, "note": "not measured: the choices are by reasoning"}
    if result:
        table = {"schema": 1, **{name: result[name] for name in ("device", "measured", "versions")}}
    passed = all(result["checks"].get(name, {}).get("passed") for name in CHECKS) if result else False
    return table | {
        "verified": bool(ours) and passed and not any("failed" in row for row in ours),
        "preferences": {
            entry: [{"rows": bound, "backends": backends} for bound, backends in rules]
            for entry, rules in preferences.items()
        },
    }


def written(table: dict[str, Any]) -> str:
    """A line per rule."""
    preferences = ",\n".join(
        f"  {json.dumps(entry)}: [\n" + ",\n".join(f"   {json.dumps(rule)}" for rule in rules) + "\n  ]"
        for entry, rules in table["preferences"].items()
    )
    head = json.dumps({name: value for name, value in table.items() if name != "preferences"}, indent=1)[:-2]
    return f'{head},\n "preferences": {{\n{preferences}\n }}\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", help="a file of benchmarks/results, made by bench_gpu")
    parser.add_argument("--output", type=Path, default=TABLE)
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text("utf-8")) if arguments.result else None
    arguments.output.write_text(written(table_of(result)), "utf-8")
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

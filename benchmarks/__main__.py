"""`python -m benchmarks`: run the suites, write results/cpu-<name>.json, and rewrite the tables and plots of the docs.

--quick takes small inputs and two rounds, to see that all of it works, and -k EXPRESSION only some cases (as in
pytest); both print what they measured and write nothing.
"""

import argparse
import json
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import la_aciq
from benchmarks import cpu_tables, measure, tables
from benchmarks.results import from_json
from la_aciq import _C
from la_aciq.bench import cpu_name, in_file_names, versions

HERE = Path(__file__).parent
SUITES = [HERE / "bench_cpu_streaming.py", HERE / "bench_cpu_linear.py"]
PACKAGES = ["torch", "numpy", "scipy", "torchao", "bitsandbytes", "pypiquant", "llama-cpp-python"]


def run(expression: str) -> list[dict] | int:
    """The cases measured, or pytest's exit status where something failed."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        arguments = [
            *map(str, SUITES),
            "--override-ini=python_files=bench_*.py",
            "--override-ini=python_functions=bench_*",
            "--benchmark-enable",
            f"--benchmark-json={raw}",
            "--benchmark-quiet",
            "-q",
            "--durations=8",
            f"-k={expression}",
        ]
        status = pytest.main(arguments)
        if status != 0:
            return int(status)
        return [entry["extra_info"]["case"] for entry in json.loads(raw.read_text())["benchmarks"]]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small inputs, two rounds; writes nothing")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only cases whose name matches; writes nothing")
    arguments = parser.parse_args(argv)
    measure.QUICK = arguments.quick
    cases = run(arguments.k)
    if isinstance(cases, int):
        return cases
    results = {
        "schema": 2,
        "device": cpu_name(),
        "isa": _C.cpu_info()["isa"],
        "quick": measure.QUICK,
        "threads": torch.get_num_threads(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"la_aciq": la_aciq.__version__, "python": platform.python_version()} | versions(PACKAGES),
        "cases": cases,
    }
    if arguments.quick or arguments.k:
        print(cpu_tables.measured_so_far(from_json("this run", results)))
        return 0
    target = HERE / "results" / f"cpu-{in_file_names(results['device'])}.json"
    cases_as_lines = ",\n".join(f"  {json.dumps(case)}" for case in cases)
    head = json.dumps({**results, "cases": []}, indent=1).removesuffix("[]\n}")
    target.write_text(f"{head}[\n{cases_as_lines}\n ]\n}}\n", encoding="utf-8")
    print(f"{target.relative_to(HERE.parent)}: written")
    return tables.main([])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m benchmarks`: run the suites, write results/<device>.json, and rewrite the tables of the docs from it."""

import json
import platform
import re
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy
import pytest
import scipy
import torch

import la_aciq
from benchmarks import tables

HERE = Path(__file__).parent


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def summarize(raw: dict) -> dict:
    """The result file: a row per benchmark with median and quartiles in seconds, and its share of this run's limit."""
    rows = []
    for entry in raw["benchmarks"]:
        times = entry["stats"]["data"]
        low, median, high = statistics.quantiles(times, n=4)
        rows.append(entry["extra_info"] | {"median_s": median, "quartiles_s": [low, high], "rounds": len(times)})
    limits = {row["limit"]: row["bytes"] / row["median_s"] for row in rows if row["operation"].startswith("limit: ")}
    for row in rows:
        row["bytes_per_s"] = row["bytes"] / row["median_s"]
        row["share_of_limit"] = row["bytes_per_s"] / limits[row["limit"]] if row["limit"] else None
    return {
        "schema": 1,
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "la_aciq": la_aciq.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "scipy": scipy.__version__,
        },
        "limits_bytes_per_s": limits,
        "rows": rows,
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        status = pytest.main(
            [
                str(HERE / "bench_cpu_ops.py"),
                "--override-ini=python_files=bench_*.py",
                "--override-ini=python_functions=bench_*",
                "--benchmark-enable",
                f"--benchmark-json={raw}",
                "--benchmark-columns=median,iqr",
                "--benchmark-save-data",
                "-q",
            ]
        )
        if status != 0:
            return int(status)
        results = summarize(json.loads(raw.read_text()))
    name = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    target = HERE / "results" / f"cpu-{name}.json"
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{target.relative_to(HERE.parent)}: written")
    return tables.main([])


if __name__ == "__main__":
    sys.exit(main())

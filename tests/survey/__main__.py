"""Survey the architectures of the installed transformers, and rewrite the result file and the tables in the docs.

python -m tests.survey                      all of them, in ten minutes
python -m tests.survey llama causal/bert    these again; the others keep their results
python -m tests.survey --check              write nothing; fail when the tables are not those of the file
"""

import argparse
import platform
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
import transformers

import la_aciq
from benchmarks.tables import with_tables

from . import table
from .architectures import Architecture, architectures
from .check import CONFIGS
from .isolated import isolated


def main() -> int:
    """Returns 1 when an architecture fails or, with --check, when the page is not up to date."""
    parser = argparse.ArgumentParser(prog="python -m tests.survey")
    parser.add_argument("names", nargs="*", help="model types, kinds, or kind/model_type; all of them without any")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="ways to quantize")
    parser.add_argument("--check", action="store_true", help="only compare the page with the result file")
    arguments = parser.parse_args()
    if arguments.check:
        return int(page() != table.PAGE.read_text())
    names = set(arguments.names)
    selected = [one for one in architectures() if not names or names & {one.name, one.model_type, one.kind}]
    results = {} if not names else table.read()["architectures"]

    def run(architecture: Architecture) -> tuple[Architecture, dict[str, Any]]:
        return architecture, isolated(architecture, arguments.configs)

    versions = {
        "la_aciq": la_aciq.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for running in as_completed([pool.submit(run, one) for one in selected]):
            one, result = running.result()
            seconds = result.pop("seconds", 0)
            results[one.name] = result
            table.write(results, versions)  # now: an interruption keeps what is there
            print(f"{one.name:42} {result['status']:10} {seconds:6.1f} s", flush=True)
            if result["status"] == "fails":
                print(f"    {str(result['reason'])[:400]}", flush=True)
    table.PAGE.write_text(page())
    print(dict(Counter(result["status"] for result in results.values())))
    return int(any(result["status"] == "fails" for result in results.values()))


def page() -> str:
    """docs/models.md with the tables of the result file."""
    return with_tables(table.PAGE.read_text(), table.tables(table.read()))


if __name__ == "__main__":
    sys.exit(main())

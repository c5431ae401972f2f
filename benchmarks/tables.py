"""Markdown tables made from result files, and their place in the docs.

A table stands between `<!-- name -->` and `<!-- /name -->`; a test checks that what stands there is what the committed
result file gives.
"""

import re
from pathlib import Path


def replace_table(path: Path, name: str, table: str) -> None:
    """Replace what stands between the markers of `name` in the Markdown file; ValueError when they are not there."""
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{path} has no markers <!-- {name} --> ... <!-- /{name} -->")
    path.write_text(pattern.sub(lambda found: found[1] + table + found[2], text), encoding="utf-8")


def cpu_operations(results: dict) -> str:
    """The CPU operations: time, bandwidth, share of the limit measured in the same run, and ratio to each peer."""
    ours = {row["operation"]: row["median_s"] for row in results["rows"] if row["implementation"] == "la_aciq"}
    limits = {kind: f"{rate / 1e9:.1f} GB/s" for kind, rate in results["limits_bytes_per_s"].items()}
    lines = [
        f"{results['device']}, {results['threads']} threads, torch {results['versions']['torch']}, "
        f"{results['measured'][:10]}. Limits of the same run: read {limits['read']}, write {limits['write']}, "
        f"copy {limits['copy']}.",
        "",
        "| operation | implementation | median ms | GB/s | share of limit | time relative to la_aciq |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in sorted(results["rows"], key=lambda row: (row["operation"], row["implementation"] != "la_aciq")):
        if row["operation"].startswith("limit: "):
            continue
        lines.append(
            f"| {row['operation']} | {row['implementation']} | {row['median_s'] * 1e3:.2f} "
            f"| {row['bytes_per_s'] / 1e9:.1f} | {row['share_of_limit']:.2f} of {row['limit']} "
            f"| {row['median_s'] / ours[row['operation']]:.2f} |"
        )
    return "\n".join(lines) + "\n"

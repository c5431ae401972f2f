"""The tables and plots of the README and the docs, made from committed result files.

A table stands between `<!-- name -->` and `<!-- /name -->`. `python -m benchmarks.tables` rewrites all of them; with
`--check` it changes nothing and fails when one is not what its file gives, which is how the test suite calls it.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks import cpu_tables, plots, scale, serve_tables
from la_aciq.evaluation.loss import SEGMENT, TAIL_NATS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs" / "kernels"
SERVING_PLOTS = ROOT / "docs" / "serving"
EMBEDDED = RESULTS / "evaluation-embedded.json"
DISTANT = RESULTS / "evaluation-embedded-distant.json"
EXPERIMENTS = RESULTS / "experiments-embedded.json"
VERSIONS = RESULTS / "tested-versions.json"
# The README shows these rows; docs/evaluation.md shows all.
README_ROWS = (
    "W4A16 torchao int4 hqq",
    "W4A16 nearest",
    "W4A16 feedback",
    "W4A16 feedback, centers by language",
    "W4A4 absmax per group by language",
)


def with_table(text: str, name: str, table: str) -> str:
    """Markdown with what stands between the markers of `name` replaced; ValueError when they are not there."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no markers <!-- {name} --> ... <!-- /{name} -->")
    return pattern.sub(lambda markers: markers[1] + table + markers[2], text)


def with_tables(text: str, tables: dict[str, str]) -> str:
    """`with_table` for each name."""
    for name, table in tables.items():
        text = with_table(text, name, table)
    return text


def pages() -> dict[Path, str]:
    """Every page with generated tables, as it should read."""
    readme, evaluation, kernels = ROOT / "README.md", ROOT / "docs" / "evaluation.md", ROOT / "docs" / "kernels.md"
    speed, serving = ROOT / "docs" / "speed.md", ROOT / "docs" / "serving.md"
    releasing = ROOT / "docs" / "releasing.md"
    models = sorted(RESULTS.glob("model-*.json"))
    whole = "\n".join(model_speed(json.loads(file.read_text(encoding="utf-8"))) for file in models)
    embedded = json.loads(EMBEDDED.read_text(encoding="utf-8"))
    return {
        speed: with_table(speed.read_text(encoding="utf-8"), "model-speed", whole or "Not measured yet.\n"),
        readme: with_tables(
            readme.read_text(encoding="utf-8"),
            {"findings": findings(embedded), "embedded-rows": embedded_rows(excerpt(embedded))},
        ),
        evaluation: with_tables(
            evaluation.read_text(encoding="utf-8"),
            {
                "embedded-rows": embedded_rows(embedded),
                "embedded-comparisons": embedded_comparisons(embedded),
                "embedded-best": embedded_best(embedded),
                "embedded-languages": embedded_languages(embedded),
                "embedded-distant": embedded_distant(json.loads(DISTANT.read_text(encoding="utf-8"))),
                "experiments": experiments(json.loads(EXPERIMENTS.read_text(encoding="utf-8"))),
            },
        ),
        serving: with_tables(
            serving.read_text(encoding="utf-8"),
            serve_tables.tables(serve_tables.latest(RESULTS)) | {"soak": soaks(RESULTS), "scale": scale.table()},
        ),
        releasing: with_table(
            releasing.read_text(encoding="utf-8"),
            "tested-versions",
            tested_versions(json.loads(VERSIONS.read_text(encoding="utf-8"))),
        ),
        kernels: with_tables(kernels.read_text(encoding="utf-8"), cpu_tables.cpu_tables(cpu_tables.by_date(RESULTS))),
    }


def model_speed(results: dict) -> str:
    """Tokens per second and prefill time of the whole model, by number of rows."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    counts = list(dict.fromkeys(row["rows"] for row in results["rows"]))
    by_name: dict[str, dict[int, dict]] = {}
    for row in results["rows"]:
        by_name.setdefault(row["name"], {})[row["rows"]] = row
    lines = [
        f"{results['device']}, {results['threads']} threads, {results['measured'][:10]}, {versions}; "
        f"{results['model']}, prompts of {results['prompt']} tokens.",
        "",
        "| model | nats per token |"
        + "".join(f" {count} row{'s' * (count > 1)}, tokens/s |" for count in counts)
        + "".join(f" prefill, ms, {count} |" for count in counts),
        "|---|--:|" + "--:|" * (2 * len(counts)),
    ]
    for name, rows in by_name.items():
        rates = "".join(f" {count / rows[count]['step_s']:.1f} |" for count in counts)
        prefills = "".join(f" {rows[count]['prefill_s'] * 1e3:.0f} |" for count in counts)
        lines.append(f"| {name} | {rows[counts[0]]['nats']:.3f} |{rates}{prefills}")
    return "\n".join(lines) + "\n"


def tested_versions(results: dict) -> str:
    """The versions of Python and PyTorch that tools/wheels.py has tested."""
    lines = ["| Python | PyTorch | wheel | tests passed | skipped | date |", "|---|---|---|--:|--:|---|"]
    lines += [
        f"| {one['python']} | {one['torch']} | {one['wheel']} | {one['passed']} | {one['skipped']} | "
        f"{one['measured'][:10]} |"
        for one in results["tested"]
    ]
    return "\n".join(lines) + "\n"


def soaks(folder: Path) -> str:
    """The result of the soak of each machine, from `make soak`."""
    lines = ["| machine | minutes | completed | cancelled | preempted | wrong | failed | memory | its growth |"]
    lines.append("|---|" + "--:|" * 8)
    for path in sorted(folder.glob("soak-*.json")):
        soak = json.loads(path.read_text(encoding="utf-8"))
        memory = soak["memory"]
        low, high = memory["mib_per_hour_95"]
        lines.append(
            f"| {soak['device']}, {soak['measured'][:10]} | {soak['seconds'] / 60:.0f} | {soak['completed']} | "
            f"{soak['cancelled']} | {soak['preemptions']:.0f} | {soak['wrong']} | {soak['failed']} | "
            f"{memory['median_mib']:.0f} MiB | {memory['mib_per_hour']:+.1f} MiB/h ({low:+.1f} to {high:+.1f}) |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a table or plot is out of date")
    check = parser.parse_args(argv).check
    stale = {path: text for path, text in pages().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'differs from its result file' if check else 'rewritten'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    measured = next(iter(cpu_tables.by_date(RESULTS)), None)
    served = serve_tables.latest(RESULTS)
    drawn = plots.stale(measured, PLOTS) if measured else []
    drawn += serve_tables.stale(served, SERVING_PLOTS) if served else []
    for path in drawn:
        print(f"{path.relative_to(ROOT)}: {'is of another result file' if check else 'drawn'}")
    if drawn and measured and not check:
        plots.draw(measured, PLOTS)
    if drawn and served and not check:
        serve_tables.draw(served, SERVING_PLOTS)
    return 1 if check and (stale or drawn) else 0


def excerpt(results: dict) -> dict:
    """The results with the README's rows only."""
    rows = {row["name"]: row for row in results["configurations"]}
    return results | {"configurations": [rows[name] for name in README_ROWS]}


def findings(results: dict) -> str:
    """The README's sentences on what was measured to help, and what was not."""
    rows = {row["name"]: row for row in results["configurations"]}
    pairs = {(pair["name"], pair["baseline"]): pair for pair in results["comparisons"]}

    def mean(name: str) -> str:
        return f"{rows[name]['mean']:.3f}"

    def difference(name: str, against: str, quantity: str) -> str:
        pair = pairs[name, against]
        return f"{pair[quantity]:+.4f} [{pair[f'{quantity}_low']:+.4f}, {pair[f'{quantity}_high']:+.4f}]"

    weights, nearest, activations, cache = (
        "W4A16 feedback, centers {}",
        "W4A16 nearest, centers {}",
        "W4A4 absmax per group {}",
        "KV4 static {}",
    )
    return (
        f"- **What helps.** In the mean over {len(results['settings']['languages'])} languages and at "
        f"{rows['W4A16 feedback']['bits']:.2f} bits per weight, INT4 weights rounded with error feedback cost "
        f"{mean('W4A16 feedback')} bits per byte, weights rounded to nearest {mean('W4A16 nearest')}, and torchao's "
        f"INT4 with HQQ {mean('W4A16 torchao int4 hqq')}. Centers by language reduce the cost of error feedback to "
        f"{mean(weights.format('by language'))} at {rows[weights.format('by language')]['bits']:.2f} bits per weight, "
        f"and pooled centers to {mean(weights.format('pooled'))} at {rows[weights.format('pooled')]['bits']:.2f} bits "
        f"(difference {difference(weights.format('by language'), weights.format('pooled'), 'mean')}).\n"
        "- **What does not help.** Centers by language were not seen to narrow the gap between languages, except with "
        "weights rounded to nearest: against pooled centers the gap changes by "
        f"{difference(weights.format('by language'), weights.format('pooled'), 'gap')} with INT4 weights "
        "(error feedback), by "
        f"{difference(activations.format('by language'), activations.format('pooled'), 'gap')} with INT4 weights and "
        f"activations, and by {difference(nearest.format('by language'), nearest.format('pooled'), 'gap')} with "
        "weights rounded to nearest. No difference was measured between static clips by language and pooled ones for "
        f"INT4 keys and values ({difference(cache.format('by language'), cache.format('pooled'), 'mean')}).\n"
    )


def caption(results: dict, how: str) -> str:
    """The model, the texts, the versions and the date of a table of changes."""
    settings = results["settings"]
    tags = settings["languages"]
    return (
        f"{settings['model']}, {len(tags)} languages ({', '.join(tags)}), {settings['tokens']} held-out tokens in "
        f"each; {how}. PyTorch {results['versions']['torch']}, {results['created'][:10]}."
    )


def embedded_rows(results: dict) -> str:
    """Rows of benchmarks/research/evaluation.py: mean, worst, gap, tail rate, bits per weight, tokens per second."""
    settings = results["settings"]
    timed = results.get("speed")
    lines = [
        caption(
            results,
            f"calibration reads the first {settings['calibration_tokens']} tokens of each text, and evaluation starts "
            f"after token {settings['skipped_tokens']}",
        ),
        "",
        "*bits/weight*: storage per quantized weight, with clips and tables. *mean*: change in bits per byte against "
        "the float32 model, as the mean over the languages; ± is half of its 95 % interval. *worst*: the largest "
        "change of a language. *gap*: change of the worst language minus that of the best, with its interval in "
        f"brackets. *tail*: share of segments of {SEGMENT} tokens whose loss rises by more than {TAIL_NATS} nats per "
        "token.",
    ]
    if timed:
        versions = ", ".join(f"{name} {version}" for name, version in timed["versions"].items())
        lines[-1] += (
            f" *tokens/s*: decoding speed of one sequence after a prompt of {timed['prompt']} tokens on "
            f"{timed['device']} with {timed['threads']} threads ({timed['measured'][:10]}, {versions}). –: "
            "quantization is simulated in float32, so there is no speed to report."
        )
    lines.append("")
    header = ["configuration", "bits/weight", "mean", "worst", "gap", "tail"] + ["tokens/s"] * bool(timed)
    lines += [f"| {' | '.join(header)} |", f"| ---{' | ---:' * (len(header) - 1)} |"]
    for row in results["configurations"]:
        speed = row["tokens_per_second"]
        cells = [
            shown(row["name"]),
            f"{row['bits']:.2f}",
            f"{row['mean']:+.3f} ±{row['mean_high'] - row['mean']:.3f}",
            f"{row['worst']:+.3f} {row['worst_language']}",
            f"{row['gap']:.3f} [{row['gap_low']:.3f}, {row['gap_high']:.3f}]",
            f"{row['tail_rate']:.1%}",
        ]
        if timed:
            cells.append("–" if speed is None else f"{speed:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(name: str) -> str:
    """A configuration's name in the words of the docs: what a language has in a table is an entry."""
    return name.replace("no sink row", "no sink entry").replace("a neighbour's row", "a neighbor's entry")


def embedded_comparisons(results: dict) -> str:
    """Differences of pairs of rows, with the verdict that the interval of the mean gives."""
    return compared(results["comparisons"])


def embedded_best(results: dict) -> str:
    """The best of ours against every language-blind row of the same bits."""
    return compared(results["best"], "bits")


def compared(pairs: list[dict], *first: str) -> str:
    """A table of pairs of rows; its first columns are the values of the pairs by the names in `first`."""
    header = [*first, "configuration", "against", "mean difference", "verdict", "gap difference"]
    rule = ["---"] * (len(first) + 2) + ["---:", "---", "---:"]
    rows = [
        [*(pair[name] for name in first), shown(pair["name"]), shown(pair["baseline"]), *differences(pair)]
        for pair in pairs
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def differences(pair: dict) -> list[str]:
    """The cells of a comparison: the mean's difference, its verdict, and the gap's difference, which has none."""
    mean, gap = (
        f"{pair[name]:+.4f} [{pair[f'{name}_low']:+.4f}, {pair[f'{name}_high']:+.4f}]" for name in ("mean", "gap")
    )
    verdict = "better" if pair["mean_high"] < 0 else "worse" if pair["mean_low"] > 0 else "no difference measured"
    return [mean, verdict, gap]


def experiments(results: dict) -> str:
    """The rows of benchmarks/research/experiments.py, by question, and their differences."""
    settings = results["settings"]
    how = f"calibrated on {settings['calibration_tokens']} tokens of each; groups of {settings['group_size']} values"
    lines = [
        caption(results, how),
        "",
        "*mean* and *gap* are those of the row, as in the table above. The last three columns compare the row with the "
        "one named under *against*.",
        "",
        "| configuration | mean | gap | against | mean difference | verdict | gap difference |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: |",
    ]
    question = None
    for row in results["configurations"]:
        if row["question"] != question:
            question = row["question"]
            lines.append(f"| **{question}** | | | | | | |")
        cells = (
            f"| {shown(row['name'])} | {row['mean']:+.3f} ±{row['mean_high'] - row['mean']:.3f} | {row['gap']:.3f} |"
        )
        pairs = [pair for pair in results["comparisons"] if pair["name"] == row["name"]]
        if not pairs:
            lines.append(f"{cells} | | | |")
        for pair in pairs:
            lines.append(f"{cells} {shown(pair['baseline'])} | {' | '.join(differences(pair))} |")
            cells = "| | | |"
    return "\n".join(lines) + "\n"


def embedded_distant(results: dict) -> str:
    """The rows and differences of text far from what calibration read."""
    return f"{embedded_rows(results)}\n{embedded_comparisons(results)}"


def embedded_languages(results: dict) -> str:
    """The change of each row by language."""
    tags = results["settings"]["languages"]
    lines = ["| configuration | " + " | ".join(tags) + " |", "| --- |" + " ---: |" * len(tags)]
    for row in results["configurations"]:
        results_by_language = [row["by_language"][tag] for tag in tags]
        cells = " | ".join(f"{x['change']:+.3f} ±{x['high'] - x['change']:.3f}" for x in results_by_language)
        lines.append(f"| {shown(row['name'])} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

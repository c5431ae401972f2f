"""The tables of docs/kernels.md, from the result files of the CPU operations: the latest, and a few lines of each."""

from pathlib import Path

from benchmarks import results
from benchmarks.results import Case, Results

NAMES = (
    "machine",
    "limits",
    "streaming",
    "in-use",
    "threads",
    "small-calls",
    "linear-float32",
    "linear-bfloat16",
    "machines",
)

LIMIT_OF = {"rotate": "copy", "dequantize": "write"}  # in memory in use; of all others a read
LARGE = (14336, 4096)  # of the products, the one that stands for a machine


def by_date(folder: Path) -> list[Results]:
    """The result files of all CPUs, the one measured last first."""
    files = [results.load(path) for path in folder.glob("cpu-*.json")]
    return sorted(files, key=lambda measured: measured.head["measured"], reverse=True)


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns are text, the others numbers."""
    lines = [header, ["---"] * left + ["--:"] * (len(header) - left), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def milliseconds(case: Case, name: str) -> str:
    seconds = case.seconds(name)
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def machine(measured: Results) -> str:
    head = measured.head
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    quick = " A quick run on small inputs that shows that everything works: not a measurement." if head["quick"] else ""
    return f"{head['device']} ({head['isa']}), {head['threads']} threads, {head['measured'][:10]}: {versions}.{quick}\n"


def streaming(measured: Results) -> str:
    rows = []
    for case in measured.suite("streaming"):
        limits = "; ".join(
            f"{times(case.ratio('la_aciq', results.LIMIT + limit))} x {limit}" for limit in case.limits()
        )
        share = f"{case.share('la_aciq', case.limit):.2f}"
        peers = ", ".join(f"{name} {times(case.ratio(name, 'la_aciq'))}" for name in case.peers())
        bandwidth = f"{case.bytes / case.seconds('la_aciq') / 1e9:.1f}"
        rows.append([case.operation, milliseconds(case, "la_aciq"), bandwidth, limits, share, peers or "–"])
    header = ["operation", "ms", "GB/s", "time", "share of limit", "time of peers, la_aciq = 1"]
    return table(header, rows)


def in_use(measured: Results) -> str:
    (case,) = measured.suite("in use")
    rows = [
        [name, milliseconds(case, name), f"{times(case.ratio(name, results.LIMIT + against))} x {against}"]
        for name in case.times
        if not name.startswith(results.LIMIT)
        for against in [LIMIT_OF.get(name, "read")]
    ]
    return table(["operation, output in memory in use", "ms", "time"], rows)


def threads(measured: Results) -> str:
    """All threads against one, at one size."""
    cases = measured.by_threads()
    header = [
        f"{cases[0].size}",
        *(f"GB/s, {case.threads} thread{'s' * (case.threads > 1)}" for case in cases),
        "ratio",
    ]
    rows = []
    for name in cases[0].times:
        rates = [case.bytes / case.seconds(name) / 1e9 for case in cases]
        rows.append(
            [name.replace(results.LIMIT, "limit, "), *(f"{rate:.1f}" for rate in rates), f"{rates[-1] / rates[0]:.2f}"]
        )
    return table(header, rows)


def small_calls(measured: Results) -> str:
    (case,) = measured.suite("small call")
    rows = [[f"`{name}`", f"{case.seconds(name) * 1e6:.1f}"] for name in case.times]
    return table(["call on 16 elements", "µs"], rows)


def linear(measured: Results, dtype: str) -> str:
    cases = [case for case in measured.suite("linear") if case.dtype == dtype]
    peers = list(dict.fromkeys(name for case in cases for name in case.peers()))
    # A peer that rounds activations to 8 bits is held against ours that does.
    against = {name: "la_aciq A8" if "int8" in name or "llama" in name else "la_aciq A16" for name in peers}
    header = ["N x K", "rows", "A16 ms", "A8 ms", "A4 ms", "share of limit: A16", "A8", "A4", "mixed languages"]
    header += [f"{name} / {against[name].removeprefix('la_aciq ')}" for name in peers]
    rows = []
    for case in cases:
        names = ["la_aciq A16", "la_aciq A8", "la_aciq A4"]
        rows.append(
            [
                f"{case.shape[0]} x {case.shape[1]}",
                str(case.rows),
                *(milliseconds(case, name) for name in names),
                *(f"{case.product_share(name):.2f}" for name in names),
                f"{case.ratio('la_aciq A4, mixed languages', 'la_aciq A4'):.2f}",
                *(times(case.ratio(name, against[name])) if name in case.times else "–" for name in peers),
            ]
        )
    return table(header, rows)


def limits(measured: Results) -> str:
    """The rates of the loops of roofline.cpp, over all cases."""
    rates: dict[str, list[float]] = {}
    for case in measured.suite("streaming"):
        for limit in case.limits():
            moved = case.buffer * (2 if "copy" in limit else 1)
            rates.setdefault(f"{limit}, GB/s", []).append(moved / case.seconds(results.LIMIT + limit) / 1e9)
    for case in measured.suite("linear"):
        for limit, factor in case.limit_calls.items():
            rate = case.multiply_adds / factor / case.seconds(limit) / 1e9
            rates.setdefault(f"{limit.removeprefix(results.LIMIT)}, billion multiply-adds/s", []).append(rate)
    rows = [[name, f"{min(values):.1f}", f"{max(values):.1f}"] for name, values in rates.items()]
    return table(["limit", "lowest", "highest"], rows)


def machines(files: list[Results]) -> str:
    """The main operations, and linear with one large matrix, of every result file."""
    rows: dict[str, list[str]] = {"measured": [measured.head["measured"][:10] for measured in files]}

    def add(name: str, case: Case, one: str, other: str) -> None:
        known = {one, other} <= case.times.keys()
        rows.setdefault(name, []).append(times(case.ratio(one, other)) if known else "–")

    for measured in files:
        for case in measured.suite("streaming"):
            if case.operation in ("moments", "moments with histogram"):
                add(f"{case.operation}, x read", case, "la_aciq", f"{results.LIMIT}read")
        for case in measured.suite("in use"):
            for name in case.times:
                if not name.startswith(results.LIMIT):
                    against = LIMIT_OF.get(name, "read")
                    add(f"{name}, x {against}", case, name, results.LIMIT + against)
        for case in measured.suite("linear"):
            if tuple(case.shape) != LARGE:
                continue
            name = f"linear, {case.rows} row{'s' * (case.rows > 1)} of {case.dtype}"
            if case.rows <= 4 and case.dtype == "bfloat16":
                for kind in ("A16", "A8"):
                    rows.setdefault(f"{name}, {kind}, share of limit", []).append(
                        f"{case.product_share(f'la_aciq {kind}'):.2f}"
                    )
                add(f"{name}, torch int4 / A16", case, "torch int4", "la_aciq A16")
            if case.rows == 128:
                for peer in (f"torch {case.dtype}", "torch int8 dynamic", "torchao int8 dynamic"):
                    if peer in case.times:
                        add(f"{name}, {peer} / A8", case, peer, "la_aciq A8")
    header = ["", *(f"{measured.head['device']} ({measured.head['isa']})" for measured in files)]
    return table(header, [[name, *values] for name, values in rows.items() if len(values) == len(files)])


def cpu_tables(files: list[Results]) -> dict[str, str]:
    """The text between the markers of docs/kernels.md, by their name."""
    measured = files[0] if files else None
    if measured is None:
        return {f"cpu-{name}": "Not measured yet. Run `make bench` on a quiet machine.\n" for name in NAMES}

    def plot(title: str, name: str) -> str:
        return f"![{title}](kernels/{name}.png)\n"

    texts = (
        machine(measured),
        limits(measured),
        f"{streaming(measured)}\n{plot('Share of the limit by operation', 'limits')}\n"
        + plot("Time of the peers relative to la_aciq", "peers"),
        in_use(measured),
        f"{plot('Bandwidth by size of the input', 'sizes')}\n{threads(measured)}\n"
        + plot("Bandwidth by threads", "scaling"),
        small_calls(measured),
        f"{plot('Share of the limit by shape, rows and bits of the activations', 'linear')}\n"
        + linear(measured, "float32"),
        linear(measured, "bfloat16"),
        machines(files),
    )
    return {f"cpu-{name}": text for name, text in zip(NAMES, texts, strict=True)}


def measured_so_far(measured: Results) -> str:
    """Every case with its times, for reading on a terminal."""
    lines = []
    for case in measured.cases:
        skipped = ("times_s", "suite", "relative_errors", "limit_calls", "buffer", "bytes", "multiply_adds", "limit")
        lines.append(" ".join(str(value) for key, value in case.values.items() if key not in skipped))
        lines += [f"  {case.seconds(name) * 1e3:10.4g} ms  {name}" for name in case.times]
    return "\n".join(lines)

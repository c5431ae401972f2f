"""The plots of docs/kernels.md, drawn from a result file of the CPU operations.

A PNG carries the digest of what it was drawn from, so that it can be told from one that is out of date.
"""

import hashlib
import json
from pathlib import Path

from benchmarks.results import LIMIT, Results

BITS = {"la_aciq A16": "C0", "la_aciq A8": "C1", "la_aciq A4": "C2"}


def limits(measured: Results):
    """Share of the limit, an operation a bar; the line through it spans the middle half of the rounds."""
    import matplotlib.pyplot as plt
    import numpy as np

    cases = measured.suite("streaming")
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(cases) + 1.2))
    for i, case in enumerate(cases):
        shares = np.quantile(case.ratios(LIMIT + case.limit, "la_aciq"), [0.25, 0.5, 0.75])
        axes.barh(i, shares[1], color="C0" if case.limit == "read" else "C4", height=0.62)
        axes.plot(shares[[0, 2]], [i, i], color="black", linewidth=1)
        axes.text(0.01, i, f"{shares[1]:.2f} of {case.limit}", va="center", color="white", fontsize=8)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(cases)), [case.operation for case in cases])
    axes.set_xlim(0, 1.3)
    axes.invert_yaxis()
    axes.set_xlabel("share of the limit: time of the limit / time of the operation")
    return figure


def peers(measured: Results):
    """Time of each peer relative to ours."""
    import matplotlib.pyplot as plt

    cases = [case for case in measured.suite("streaming") if case.peers()]
    names = list(dict.fromkeys(name for case in cases for name in case.peers()))
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(cases) + 1.6))
    for i, case in enumerate(cases):
        axes.axhline(i, color="0.9", linewidth=1, zorder=0)
        for name in case.peers():
            axes.plot(case.ratio(name, "la_aciq"), i, "o", color=f"C{names.index(name)}", markersize=8)
    handles = [axes.plot([], [], "o", color=f"C{i}", label=name)[0] for i, name in enumerate(names)]
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [case.operation for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("time relative to la_aciq (right of 1: la_aciq is faster)")
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(names), 6), frameon=False, fontsize=8)
    return figure


def sizes(measured: Results):
    """Bandwidth by the size of the input, a panel for each number of threads."""
    import matplotlib.pyplot as plt

    cases = measured.suite("size")
    counts = sorted({case.threads for case in cases if case.size == cases[0].size})
    figure, panels = plt.subplots(1, len(counts), figsize=(4.6 * len(counts), 4.2), sharey=True, squeeze=False)
    names = [name for name in cases[0].times if not name.startswith(LIMIT)]
    for axes, count in zip(panels[0], counts, strict=True):
        panel_cases = sorted((case for case in cases if case.threads == count), key=lambda case: case.bytes)
        for name in [f"{LIMIT}read", *names]:
            style = (
                {"color": "black", "linestyle": "--"} if name.startswith(LIMIT) else {"marker": "o", "markersize": 4}
            )
            rates = [case.bytes / case.seconds(name) / 1e9 for case in panel_cases]
            axes.plot([case.bytes for case in panel_cases], rates, label=name.replace(LIMIT, "limit, "), **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(
            [case.bytes for case in panel_cases],
            [case.size for case in panel_cases],
            rotation=45,
            ha="right",
            fontsize=8,
        )
        axes.set_title(f"{count} thread{'s' * (count > 1)}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("GB/s of float32 input")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def scaling(measured: Results):
    """All threads against one, at one size."""
    import matplotlib.pyplot as plt

    cases = measured.by_threads()
    figure, axes = plt.subplots(figsize=(6, 3.8))
    for name in cases[0].times:
        style = {"color": "black", "linestyle": "--"} if name.startswith(LIMIT) else {"marker": "o"}
        rates = [case.bytes / case.seconds(name) / 1e9 for case in cases]
        axes.plot([case.threads for case in cases], rates, label=name.replace(LIMIT, "limit, "), **style)
    axes.set_xticks([case.threads for case in cases])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"threads, {cases[0].size}")
    axes.set_ylabel("GB/s of float32 input")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def linear(measured: Results):
    """`linear`: share of the limit, and time of the peers relative to ours, by rows; a panel for each shape."""
    import matplotlib.pyplot as plt

    cases = measured.suite("linear")
    shapes = list(dict.fromkeys(tuple(case.shape) for case in cases))
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    figure, panels = plt.subplots(
        len(dtypes), len(shapes), figsize=(2.1 * len(shapes) + 0.6, 2.2 * len(dtypes) + 1.2), sharex=True, sharey=True
    )
    for index, (row, dtype) in enumerate(zip(panels, dtypes, strict=True)):
        for axes, shape in zip(row, shapes, strict=True):
            panel_cases = [case for case in cases if tuple(case.shape) == shape and case.dtype == dtype]
            for name, color in BITS.items():
                shares = [case.product_share(name) for case in panel_cases]
                axes.plot([case.rows for case in panel_cases], shares, "o-", color=color, markersize=3, label=name)
            for name, style in {f"torch {dtype}": ":", "torch int4": "--"}.items():
                shown = [case for case in panel_cases if name in case.times]
                shares = [case.product_share("la_aciq A16") * case.ratio("la_aciq A16", name) for case in shown]
                label = "torch, dtype of x" if style == ":" else name
                axes.plot([case.rows for case in shown], shares, style, color="0.4", linewidth=1.2, label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks([case.rows for case in panel_cases], [str(case.rows) for case in panel_cases], fontsize=7)
            axes.set_ylim(0, 1.05)
            axes.grid(alpha=0.3)
            if index == 0:
                axes.set_title(f"{shape[0]} x {shape[1]}", fontsize=9)
        row[0].set_ylabel(f"{dtype}: share of the limit", fontsize=8)
    figure.supxlabel("rows", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return figure


PLOTS = {"limits": limits, "peers": peers, "sizes": sizes, "scaling": scaling, "linear": linear}


def digest(measured: Results) -> str:
    content = json.dumps([measured.head, [case.values for case in measured.cases]]) + Path(__file__).read_text("utf-8")
    return hashlib.sha256(content.encode()).hexdigest()


def stale(measured: Results, folder: Path) -> list[Path]:
    """Plots that are missing or were drawn from something else."""
    expected = digest(measured).encode()
    paths = [folder / f"{name}.png" for name in PLOTS]
    return [path for path in paths if not path.exists() or expected not in path.read_bytes()]


def draw(measured: Results, folder: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    folder.mkdir(exist_ok=True)
    for name, function in PLOTS.items():
        with plt.rc_context(
            {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
        ):
            figure = function(measured)
            figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Comment": digest(measured)})
            plt.close(figure)

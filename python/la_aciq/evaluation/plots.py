"""The plots of a report: one PNG each, drawn from report.json alone.

Colors are Okabe and Ito's, which any color vision tells apart; most languages are grey, and the ones that a plot is
about are in color, with their names beside them.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .report import Configuration, Layers, Report

BLUE, VERMILION, GREY, INK = "#0072B2", "#D55E00", "#B8B8B8", "#333333"
_STYLE = {"color": INK, "fontsize": 9}


def draw(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the plots that a report has data for.

    changes.png has the change in bits per byte by language with intervals, a panel for each configuration. clips.png
    has the quantization error against the clip by language, at one layer of each kind. layers.png has alpha* / rms and
    kurtosis across the layers by language.

    Args:
        report: the report.
        folder: an existing folder.

    Returns:
        The paths of the plots.
    """
    figures = {"changes.png": draw_changes(report)}
    if report.curves:
        figures["clips.png"] = draw_clips(report)
    if report.clips is not None and report.kurtosis is not None:
        figures["layers.png"] = draw_layers(report.clips, report.kurtosis)
    paths = []
    for name, figure in figures.items():
        paths.append(Path(folder) / name)
        figure.savefig(paths[-1], dpi=150)
    return paths


def draw_changes(report: Report) -> Figure:
    """A panel per configuration, with the same languages and scale; values off the scale are written at its edge."""
    configurations = report.configurations
    limit = _common_limit(configurations)
    shown = [c for c in configurations if c.worst <= limit] or configurations
    order = sorted(report.texts, key=lambda tag: sum(c.by_language[tag].change for c in shown))
    columns = min(4, len(configurations))
    lines = math.ceil(len(configurations) / columns)
    figure = _figure(2.6 * columns + 0.8, (0.19 * len(order) + 0.75) * lines + 0.9)
    grid: Any = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    lowest = min(0.0, *(r.low for c in shown for r in c.by_language.values()))
    for place, axes in enumerate(grid.flat):
        if place >= len(configurations):
            axes.set_visible(False)
            continue
        c = configurations[place]
        _plain(axes)
        axes.axvline(0, color=GREY, linewidth=0.8)
        if c.mean <= limit:
            axes.axvline(c.mean, color=BLUE, linewidth=0.8, linestyle=(0, (2, 2)))
        for y, tag in enumerate(order):
            result = c.by_language[tag]
            if result.change > limit:
                axes.text(limit, y, f"{result.change:.2f} →", ha="right", va="center", color=VERMILION, fontsize=8)
                continue
            color = VERMILION if tag == c.worst_language else BLUE
            axes.plot([result.low, min(result.high, limit)], [y, y], color=color, linewidth=1.6, alpha=0.55)
            axes.plot([result.change], [y], "o", color=color, markersize=4)
        axes.set_title(f"{c.name}\nmean {c.mean:+.3f}, gap {c.gap:.3f}", loc="left", **_STYLE)
        axes.set_yticks(range(len(order)), order)
        axes.set_xlim(lowest - 0.03 * limit, 1.03 * limit)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="x", labelbottom=place + columns >= len(configurations))
    figure.supxlabel(
        f"change in bits per {report.unit} against {report.reference}, 95 % interval (dashed: mean, orange: worst)",
        **_STYLE,
    )
    return figure


def draw_clips(report: Report) -> Figure:
    """A panel per site: normalized error against the clip; languages with the least and the largest error in color."""
    columns = min(3, len(report.curves))
    lines = math.ceil(len(report.curves) / columns)
    figure = _figure(3.1 * columns, 2.5 * lines + 0.4)
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(report.curves):
            axes.set_visible(False)
            continue
        curve = report.curves[place]
        _plain(axes)
        by_error = sorted(curve.optimum, key=lambda tag: curve.optimum[tag][1])
        best = curve.optimum[by_error[0]][1]
        worst = curve.optimum[by_error[-1]][1]
        for tag in by_error[1:-1] + by_error[:1] + by_error[-1:]:
            color = BLUE if tag == by_error[0] else VERMILION if tag == by_error[-1] else GREY
            axes.plot(curve.ratio, curve.mse[tag], color=color, linewidth=1.4 if color != GREY else 0.8)
        for tag in by_error:
            color = BLUE if tag == by_error[0] else VERMILION if tag == by_error[-1] else "#808080"
            axes.plot(*curve.optimum[tag], "o", color=color, markersize=4 if color != "#808080" else 2.5)
        # Between the branches of the curves nothing else is drawn.
        for tag, color, y in [(by_error[-1], VERMILION, 0.93), (by_error[0], BLUE, 0.84)][: len(by_error)]:
            axes.text(
                curve.optimum[tag][0],
                y,
                f"{tag} {curve.optimum[tag][0]:.2f}",
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="center",
                color=color,
                fontsize=8,
            )
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
        axes.minorticks_off()
        axes.set_ylim(0.55 * best, max(2.6 * worst, 3.2 * best))
        axes.set_title(_short(curve.site), loc="left", **_STYLE)
    figure.supxlabel(
        "clip / rms (dots and numbers: a language's optimum; blue and orange: the least and the largest error)",
        **_STYLE,
    )
    figure.supylabel("quantization error / power", **_STYLE)
    return figure


def draw_layers(clips: Layers, kurtosis: Layers) -> Figure:
    """alpha* / rms above, excess kurtosis below: across the layers of each kind, and for the whole model."""
    kinds: dict[str, list[int]] = {}
    for index, site in enumerate(clips.sites):
        kinds.setdefault(site.rpartition(".")[2], []).append(index)
    names = list(kinds)[:6]
    known = [tag for tag, value in kurtosis.model.items() if value is not None]
    order = sorted(known, key=lambda tag: kurtosis.model[tag] or 0.0)
    figure = _figure(1.9 * len(names) + 2.2, 5.0 + 0.08 * max(0, len(order) - 14))
    grid: Any = figure.subplots(2, len(names) + 1, squeeze=False, sharey="row", width_ratios=[1.0] * len(names) + [1.1])
    rows = [("alpha* / rms", clips), ("excess kurtosis", kurtosis)]
    for (label, layers), panels in zip(rows, grid, strict=True):
        for name, axes in zip(names, panels, strict=False):
            _plain(axes)
            for tag in order[1:-1] + order[:1] + order[-1:]:
                values = [layers.by_language[tag][index] for index in kinds[name]]
                color = _color(tag, order)
                axes.plot(
                    range(len(values)), [math.nan if v is None else v for v in values], color=color,
                    linewidth=0.7 if color == GREY else 1.3,
                )  # fmt: skip
            if layers is clips:
                axes.set_title(name, loc="left", **_STYLE)
            else:
                axes.set_xlabel("layer", **_STYLE)
        panels[0].set_ylabel(label, **_STYLE)
        _whole_model(panels[-1], layers, order)
    grid[0, -1].set_title("whole model", loc="left", **_STYLE)
    largest = max((v for values in kurtosis.by_language.values() for v in values if v is not None), default=0.0)
    if largest > 20:
        grid[1, 0].set_yscale("symlog", linthresh=1)
        grid[1, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def _whole_model(axes: Axes, layers: Layers, order: Sequence[str]) -> None:
    """One dot per language, in the order of effective kurtosis, the extremes with their numbers."""
    _plain(axes)
    axes.set_xticks(range(len(order)), order, rotation=90)
    axes.set_xlim(-0.7, len(order) - 0.3)
    for place, tag in enumerate(order):
        value = layers.model[tag]
        if value is None:
            continue
        color = _color(tag, order)
        axes.plot([place], [value], "o", color="#808080" if color == GREY else color, markersize=4)
        if color != GREY:
            side = "left" if place == 0 else "right"
            axes.annotate(
                f"{value:.3g}", (place, value), (0, 6), textcoords="offset points", ha=side, color=color, fontsize=8
            )


def _color(tag: str, order: Sequence[str]) -> str:
    return BLUE if tag == order[0] else VERMILION if tag == order[-1] else GREY


def _common_limit(configurations: Sequence[Configuration]) -> float:
    """The right end of a scale that shows all but configurations far worse than the others."""
    worst = sorted(c.worst for c in configurations)
    middle = max(worst[len(worst) // 2], 1e-4)
    fit = [c for c in configurations if c.worst <= 4 * middle]
    return max(1.02 * max(result.high for c in fit for result in c.by_language.values()), 1e-3)


def _short(site: str) -> str:
    """ "model.layers.15.self_attn.o_proj" -> "layer 15, o_proj input"; "cache.15.key" -> "layer 15, key"."""
    parts = site.split(".")
    number = next((part for part in parts if part.isdigit()), None)
    name = parts[-1] + ("" if parts[0] == "cache" else " input")
    return name if number is None else f"layer {number}, {name}"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=8, color=GREY, labelcolor=INK, length=2.5)

"""The plots of the theory page: PNG files in docs/theory."""

from typing import Any

import numpy as np

from la_aciq.clipping import Gaussian, GeneralizedGaussian, Laplace, StudentT, kurtosis_rule, mse, optimal
from la_aciq.clipping.kurtosis import reference_laws

from .files import FOLDER
from .laws import model

BLUE, ORANGE, GREEN, GREY, RED = "#0072B2", "#E69F00", "#009E73", "#777777", "#D55E00"
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
    "axes.axisbelow": True, "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "figure.dpi": 150, "savefig.bbox": "tight", "legend.frameon": False,
}  # fmt: skip


def draw(numbers: dict[str, Any]) -> None:
    """Write the PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, plot in PLOTS.items():
        with plt.rc_context(STYLE):
            figure = plot(numbers)
            figure.savefig(FOLDER / f"{name}.png")
            plt.close(figure)


def errors(numbers: dict[str, Any]) -> Any:
    """The exact error and the convex model against the clip."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    a = np.linspace(0.8, 7, 400)
    for ax, bits in zip(axes, (2, 4), strict=True):
        for name, law, color in (("Gaussian", Gaussian(), BLUE), ("t, nu = 5", StudentT(5), GREEN),
                                 ("Laplace", Laplace(), ORANGE)):  # fmt: skip
            best = optimal(law, bits)
            ax.plot(a, mse(law, a, bits), color=color, lw=2, label=f"{name}: {float(best.alpha):.2f}")
            ax.plot(a, model(law, a, bits), color=color, lw=1, ls=":")
            ax.plot([best.alpha], [best.mse], "o", color=color, ms=7, mec="white", mew=1.5)
        ax.set(yscale="log", xlabel="clip alpha / sigma", title=f"{bits} bits")
        ax.legend(title="best clip", loc="upper right" if bits == 4 else "lower right")
    axes[0].set_ylabel("MSE / sigma²")
    axes[0].text(0.02, 0.03, "solid: exact (midrise)   dotted: convex model", transform=axes[1].transAxes, color=GREY)
    return figure


def kurtosis(numbers: dict[str, Any]) -> Any:
    """Best clips against the kurtosis, and the rules."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.2, 4.4))
    kappas = np.concatenate([np.linspace(-1.2, 0, 9), np.geomspace(0.05, 22, 24)])
    pairs = [(k, law) for k in kappas for law in reference_laws(float(k))]
    for kind, color, label in (
        (GeneralizedGaussian, ORANGE, "generalized Gaussian"),
        (StudentT, GREEN, "Student t"),
    ):
        x = [(k, float(optimal(law, objective="aciq").alpha)) for k, law in pairs if isinstance(law, kind)]
        ax.plot(*zip(*x, strict=True), color=color, lw=2.5, label=label)
    clips = [clip for _, clip in numbers["mixture_clips"]]
    ax.plot([3, 3], [min(clips), max(clips)], color=RED, lw=5, alpha=0.45, solid_capstyle="butt",
            label="Gaussian scale mixtures with kappa = 3")  # fmt: skip
    line = np.linspace(-1.2, 22.2, 200)
    for kind, dash, color in (("published", ":", GREY), ("fitted", "--", BLUE), ("spline", "-", BLUE)):
        ax.plot(
            line,
            kurtosis_rule(line, 4, kind, objective="aciq"),
            ls=dash,
            color=color,
            lw=1.2,
            label=f"rule, {kind}",
        )
    ax.set(xlabel="excess kurtosis kappa", ylabel="alpha* / sigma, 4 bits, convex model",
           title="The best clip is not a function of the kurtosis")  # fmt: skip
    ax.legend(loc="lower right", fontsize=9)
    return figure


def limits(numbers: dict[str, Any]) -> Any:
    """Errors in dB above Shannon's bound, by bits."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    rows = np.asarray(numbers["limit_bits"])
    for ax, name, start in zip(axes, ("Gaussian", "Laplace"), (1, 5), strict=True):
        bits = rows[:, 0]
        scaled = [10 * np.log10(rows[:, start + i] / rows[:, start]) for i in (1, 2, 3)]
        for y, color, label in zip(scaled, (GREY, GREEN, BLUE),
                                   ("sigma² 4^-B", "Lloyd-Max", "clipped uniform"), strict=True):  # fmt: skip
            ax.plot(bits, y, "o-", color=color, lw=2, ms=5, label=label)
        ax.set(title=name, xlabel="bits")
    axes[0].set_ylabel("dB above Shannon's lower bound")
    axes[0].legend(loc="upper left")
    return figure


def sharing(numbers: dict[str, Any]) -> Any:
    """Two languages with one clip, and the Pareto front."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    pair, a = [Gaussian(1), Gaussian(2)], np.linspace(2, 6.5, 300)
    errors = [model(law, a) / law.power for law in pair]
    front = np.asarray(numbers["pareto"])
    for y, color, label in zip(errors, (BLUE, ORANGE), ("N(0, 1)", "N(0, 4)"), strict=True):
        axes[0].plot(a, y, color=color, lw=2, label=label)
    axes[0].plot(a, np.mean(errors, axis=0), color=GREY, lw=1.5, label="mean")
    axes[0].plot(a, np.max(errors, axis=0), color=RED, lw=1.5, ls="--", label="worst")
    axes[0].axvspan(front[0, 0], front[-1, 0], color="#dddddd", alpha=0.6, lw=0)
    axes[0].set(xlabel="shared clip", ylabel="MSE / sigma² of the language", ylim=(0, 0.06),
                title="Two languages, one clip")  # fmt: skip
    axes[0].legend()
    axes[1].plot(front[:, 1], front[:, 2], color=BLUE, lw=2.5)
    axes[1].margins(0.12)
    axes[1].locator_params(axis="x", nbins=5)
    for i, label, align in ((0, "mean", "left"), (-1, "minimax", "right")):
        axes[1].plot(front[i, 1], front[i, 2], "o", color=BLUE, ms=7)
        place = (10, -3) if i == 0 else (-4, -16)
        axes[1].annotate(f"{label}: alpha = {front[i, 0]:.2f}", front[i, 1:], xytext=place,
                         textcoords="offset points", ha=align)  # fmt: skip
    axes[1].set(xlabel="mean of the normalized errors", ylabel="worst normalized error", title="Pareto front")
    figure.tight_layout()
    return figure


PLOTS = {"mse": errors, "kurtosis": kurtosis, "limits": limits, "sharing": sharing}

"""The tables of the theory page, as Markdown; each takes all numbers of the page."""

from collections.abc import Callable
from typing import Any


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(x: float) -> str:
    if abs(x) < 1e-5:
        return "< 0.001 %"
    return f"{100 * x:.2g} %" if abs(x) < 0.1 else f"{100 * x:.0f} %"


def banner(n: dict[str, Any]) -> str:
    rows = [[str(b), f"{pg:.2f}", f"{g:.4f}", f"{pl:.2f}", f"{x:.4f}"] for b, pg, g, pl, x in n["banner"]]
    return table(["bits", "Gauss, printed", "computed", "Laplace / b, printed", "computed"], rows)


def max_steps(n: dict[str, Any]) -> str:
    rows = [[str(k), "" if p is None else f"{p:.4g}", f"{s:.5f}", f"{e:.4g}"] for k, p, s, e in n["max"]]
    return table(["levels", "step, printed by Max", "step", "error"], rows)


def optima(n: dict[str, Any]) -> str:
    rows = [
        [str(r[0]), *(f"{r[i]:.3f}" if i in (1, 2, 4, 6, 7, 9) else f"{r[i]:.4g}" for i in range(1, 11))]
        for r in n["optima"]
    ]
    names = [f"{law} {quantity}" for law in ("Gauss", "Laplace") for quantity in
             ("model", "midrise", "MSE", "midtread", "MSE")]  # fmt: skip
    return table(["bits", *names], rows)


def octav(n: dict[str, Any]) -> str:
    rows = [[name, str(b), str(s), f"{a:.4f}", percent(d), percent(e)] for name, b, s, a, d, e in n["octav"]]
    return table(["law", "bits", "steps", "clip / sigma", "clip off by", "excess error"], rows)


def rule(n: dict[str, Any]) -> str:
    rows = [
        [r[0], f"{r[1]:.2f}", f"{r[2]:.3f}", *(f"{r[i]:.2f}, {percent(r[i + 1])}" for i in (3, 5, 7))]
        for r in n["rule"]
    ]
    return table(["law", "kappa", "alpha* / sigma", "published, excess", "fitted, excess", "spline, excess"], rows)


def fits(n: dict[str, Any]) -> str:
    rows = [
        [f"{k}, {b}", f"{c:.3f}", f"{d:.3f}", percent(w), percent(s), percent(f)]
        for k, b, c, d, w, s, f in n["coefficients"]
    ]
    return table(["error, bits", "c", "d", "worst, kappa >= 0", "spline, worst", "any function of kappa"], rows)


def samples(n: dict[str, Any]) -> str:
    rows = [[r[0], *(f"{x:,.0f}" for x in r[1:])] for r in n["samples"]]
    widths = [f"{b} bits, +-{w} %" for b in (4, 8) for w in (10, 5, 1)]
    return table(["law", *widths], rows)


def coverage(n: dict[str, Any]) -> str:
    # By law and bits the cell of the fewest samples at which more than half of the samples had an interval.
    first = {}
    for r in sorted(n["coverage"], key=lambda r: -r["n"]):
        if r["intervals"] > r["samples"] / 2:
            first[r["law"], r["bits"]] = f"{r['n']:,}: {100 * r['coverage']:.1f} % (+-{percent(r['half_width'])})"
    laws, bits = (list(dict.fromkeys(r[key] for r in n["coverage"])) for key in ("law", "bits"))
    return table(
        ["law", *(f"{b} bits" for b in bits)], [[law, *(first.get((law, b), "–") for b in bits)] for law in laws]
    )


def sharing(n: dict[str, Any]) -> str:
    rows = [[f"{r[0]}", *(f"{percent(r[i])} / {percent(r[i + 1])}" for i in (1, 3, 5))] for r in n["sharing"]]
    return table(["sigma ratio", "pooled law's clip", "mean of normalized errors", "minimax"], rows)


def limits(n: dict[str, Any]) -> str:
    rows = [
        [
            r[0],
            f"{r[1]:.3f}",
            f"{r[2]:.2f}",
            f"{r[3]:.5f}",
            f"{(curve[1] + curve[2]) / 2:.5f}",
            *(f"{x:.5f}" for x in r[4:7]),
            f"{max(r[7], 0):.2f} dB",
            f"{r[8]:.2f} dB",
        ]
        for r, curve in zip(n["limits"], n["rate_distortion"], strict=True)
    ]
    names = ["law", "entropy power", "Panter-Dite", "Shannon bound", "D(4)", "sigma^2 4^-4", "Lloyd-Max", "ours",
             "over Lloyd-Max", "over Shannon"]  # fmt: skip
    return table(names, rows)


def kurtosis_bounds(n: dict[str, Any]) -> str:
    rows = [[r[0], f"{r[1]:.2f}", f"{r[2]:.5f}", f"{r[3]:.4f}", f"{r[3] / r[2]:.1f}"] for r in n["kurtosis_bounds"]]
    return table(["law", "kappa", "MSE*, model", "bound (c)", "ratio"], rows)


def cost(n: dict[str, Any]) -> str:
    rows = [
        [row["case"], f"{row['cpu_median_s']:.2f}", f"{result['device']}, {result['cores']} core"]
        for result in n["clip_table"]
        for row in result["rows"]
    ]
    return table(["200 layers x 100 languages", "seconds", "device"], rows)


def profile(n: dict[str, Any]) -> str:
    p = n["profile"]
    if p is None:
        return "No profile has been summarized yet: `python -m tools.theory --profile DIR` does it."
    rows = [
        [tag, f"{x['kurtosis_eff']:.1f}", " / ".join(f"{k:.1f}" for k in x["kurtosis_layers"]), f"{x['shape']:.3f}",
         f"{x['shannon']:.5f}", f"{x['lloyd_max']:.5f}", f"{x['quantizer']:.5f}", f"{x['shared']:.5f}"]
        for tag, x in p["languages"].items()
    ]  # fmt: skip
    first = table(
        ["language", "kappa_eff", "layers: least / median / most", "alpha* / rms, median", "Shannon bound",
         "Lloyd-Max",
         "own clip", "shared clip, pooled power"],
        rows,
    )  # fmt: skip
    gaps = [
        ("shared clip", p["shared_gap"], "total variation", p["total_variation"]),
        ("shared clip", p["shared_gap"], "bins (cells)", p["cells"]),
        ("shared clip", p["shared_gap"], "Wasserstein", p["wasserstein_shared"]),
        ("own clips", p["own_gap"], "Wasserstein, unit power", p["wasserstein_own"]),
    ]
    second = table(
        ["gap of", "max - min", "bound", "value", "bound / gap"],
        [[a, f"{g:.5f}", b, f"{v:.4g}", f"{v / g:.1f}"] for a, g, b, v in gaps],
    )
    state = "with" if p["rotation"] else "without"
    return (
        f"{p['model']}, {state} rotation, {p['layer_inputs']} layer inputs, {len(p['languages'])} languages, INT4 "
        f"midrise, one clip per layer and language:\n\n{first}\n\n{second}"
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "banner": banner,
    "max": max_steps,
    "optima": optima,
    "octav": octav,
    "rule": rule,
    "fits": fits,
    "samples": samples,
    "coverage": coverage,
    "sharing": sharing,
    "limits": limits,
    "kurtosis_bounds": kurtosis_bounds,
    "cost": cost,
    "profile": profile,
}

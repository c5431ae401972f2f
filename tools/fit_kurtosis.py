"""Refits the kurtosis rules and rewrites python/la_aciq/clipping/kurtosis_coefficients.py (minutes: run it when a
rule's form changes).

    python tools/fit_kurtosis.py
"""

import argparse
from pathlib import Path

from la_aciq.clipping import kurtosis

TARGET = Path(__file__).parents[1] / "python" / "la_aciq" / "clipping" / "kurtosis_coefficients.py"
KINDS = {"midrise": ("midrise", "exact"), "midtread": ("midtread", "exact"), "aciq": ("midrise", "aciq")}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = [
        '"""Written by tools/fit_kurtosis.py; keys are (codebook, or `aciq` for the convex model; bits)."""',
        "",
        "# c, d, worst-case excess error on 0 <= kappa <= 22.2.",
        "LINEAR = {",
    ]
    fits = {}
    for kind, (codebook, objective) in KINDS.items():
        for bits in range(2, 9):
            fits[kind, bits] = kurtosis.fit_kurtosis_rule(bits, codebook, objective)
            print(kind, bits, flush=True)
    for (kind, bits), fit in fits.items():
        c, d = fit.linear
        lines.append(f'    ("{kind}", {bits}): ({c:.4f}, {d:.4f}, {fit.linear_excess:.4f}),')
    lines += ["}", "", "# alpha* / sigma at the knots in kappa.", "# fmt: off", "SPLINE = {"]
    for (kind, bits), fit in fits.items():
        values = [f"{a:.4f}" for a in fit.spline]
        half = len(values) // 2
        lines += [
            f'    ("{kind}", {bits}): (',
            f"        {', '.join(values[:half])},",
            f"        {', '.join(values[half:])},",
            "    ),",
        ]
    lines += [
        "}",
        "# fmt: on",
        "",
        "# Worst-case excess error of the spline, and of the best function of kappa, on -1.2 <= kappa <= 22.2.",
    ]
    lines.append("SPLINE_EXCESS = {")
    for (kind, bits), fit in fits.items():
        lines.append(f'    ("{kind}", {bits}): ({fit.spline_excess:.4f}, {fit.floor:.4f}),')
    lines.append("}")
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The demo: what INT4 costs a real model in twelve languages, with clips that know the language and without."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import choices
from ._files import kept_when_interrupted, new_folder
from .calibration import calibrate, tokenize
from .evaluation import Report, evaluate_configurations
from .evaluation.measure import check_texts
from .evaluation.plots import draw  # here, so that a missing matplotlib is found before the work
from .nn import QuantConfig

# Twelve languages in eight scripts; the embedded texts have 38.
LANGUAGES = ("en", "de", "fr", "tr", "sw", "ru", "ar", "he", "hi", "th", "zh", "ko")


@dataclass(frozen=True)
class Size:
    """How much text is read: tokens per language for calibration and for evaluation, in windows of seqlen."""

    languages: tuple[str, ...]
    seqlen: int
    calibration_tokens: int
    evaluation_tokens: int


FULL = Size(LANGUAGES, seqlen=512, calibration_tokens=1024, evaluation_tokens=1024)
QUICK = Size(("en", "sw", "th"), seqlen=128, calibration_tokens=256, evaluation_tokens=256)


def configurations(
    group_size: int = choices.GROUP_SIZE, codebook: str = choices.CODEBOOK, kv: bool = True, **language_objective: Any
) -> dict[str, QuantConfig]:
    """The usual configurations by name: bits first, then whose centers and clips are used.

    Args:
        group_size: of all of them.
        codebook: of all of them.
        kv: also an INT4 key and value cache, for a profile that has keys and values.
        language_objective: `language_objective`, `language_weights` and `language_penalty` of `QuantConfig`, for all
            of them.
    """
    common: dict[str, Any] = {"group_size": group_size, "codebook": codebook, **language_objective}
    four: dict[str, Any] = {"weights": 4, "activations": 4, **common}
    chosen = {
        "W4A16 to nearest, no centers": QuantConfig(activations=16, rounding="nearest", center=False, **common),
        "W4A16 pooled": QuantConfig(activations=16, sharing="pooled", **common),
        "W4A16 per language": QuantConfig(activations=16, **common),
        "W4A8 per language": QuantConfig(activations=8, **common),
        "W4A4 pooled": QuantConfig(sharing="pooled", **four),
        "W4A4 per language": QuantConfig(**four),
        "W4A4 static, pooled": QuantConfig(clip="static", sharing="pooled", **four),
        "W4A4 static, per language": QuantConfig(clip="static", **four),
        "W4A4 absmax per token, per language": QuantConfig(granularity="token", **four),
    }
    if kv:
        chosen["KV4"] = QuantConfig(weights=16, activations=16, kv=4, **common)
    return chosen


def write_report(report: Report, folder: Path) -> list[Path]:
    """report.json, report.md and the plots, into an existing folder; returns the plots' paths."""
    report.save(folder / "report.json")
    return illustrate(report, folder)


def illustrate(report: Report, folder: Path) -> list[Path]:
    """What is made from report.json: report.md and the plots, into an existing folder; returns the plots' paths."""
    (folder / "report.md").write_text(report.markdown(), "utf-8", errors="backslashreplace")
    return draw(report, folder)


def run(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, str],
    folder: Path,
    *,
    size: Size = FULL,
    force: bool = False,
    **language_objective: Any,
) -> None:
    """Calibrate with and without rotation, evaluate every configuration, print the report and write it to `folder`.

    An interrupted run's calibrations are kept beside `folder`, and the next one goes on from there. language_objective:
    as for `configurations`.
    """
    # Before the calibration, which takes minutes: whether there is text for what comes after it.
    tokenized = tokenize(texts, tokenizer)
    check_texts(model, tokenized, seqlen=size.seqlen, tokens=size.evaluation_tokens, skip=size.calibration_tokens)
    start = time.monotonic()
    kv = any(name.endswith("k_proj") for name, _ in model.named_modules())
    chosen = configurations(kv=kv, **language_objective)
    chosen["W4A4 per language, no rotation"] = QuantConfig(rotate=False, **language_objective)
    with (
        kept_when_interrupted(folder, ".partial", ".unrotated.partial") as (partial, unrotated_partial),
        new_folder(folder, "report.json", force) as temporary,
    ):
        print(f"1/3  Calibrating on {size.calibration_tokens} tokens in each of {len(texts)} languages", flush=True)
        settings: dict[str, Any] = {"seqlen": size.seqlen, "tokens": size.calibration_tokens}
        profile = calibrate(model, tokenized, resume=partial, **settings)
        unrotated = calibrate(model, tokenized, rotate=False, resume=unrotated_partial, **settings)
        profile.save(temporary / "profile")

        print(
            f"2/3  Evaluating {len(chosen)} configurations on the next {size.evaluation_tokens} tokens of each",
            flush=True,
        )
        report = evaluate_configurations(
            model,
            [profile, unrotated],
            chosen,
            texts=tokenized,
            seqlen=size.seqlen,
            tokens=size.evaluation_tokens,
        )
        print("3/3  Drawing the plots", flush=True)
        plots = write_report(report, temporary)
    print(f"\n{report.terminal()}\n")
    minutes = (time.monotonic() - start) / 60
    print(f"Done in {minutes:.1f} minutes.")
    print(f"Profile  {folder / 'profile'}")
    print(f"Report   {folder / 'report.json'} and {folder / 'report.md'}")
    print("Plots    " + "\n         ".join(str(folder / plot.name) for plot in plots))

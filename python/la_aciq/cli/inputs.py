"""What several commands read: models, texts, and reports."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import LaAciqError
from .arguments import EMBEDDED, UDHR


def load_model(arguments: argparse.Namespace, *, causal: bool = True) -> tuple[Any, Any]:
    """The model of --model and its tokenizer."""
    from .. import embedded, models

    if arguments.model == EMBEDDED:
        return embedded.load_model(arguments.device, arguments.dtype)
    return models.load_model(arguments.model, device=arguments.device, dtype=arguments.dtype, causal=causal)


def load_texts(arguments: argparse.Namespace, languages: Sequence[str] | None = None) -> dict[str, str]:
    """The texts of --texts, by canonical tag.

    Args:
        arguments: with `texts` and `languages`.
        languages: which of the texts to take without --languages: those in these languages if there are any; None or
            no such text means all.
    """
    from .. import embedded, udhr
    from ..calibration import load_texts
    from ..tags import canonical

    wanted = None if arguments.languages is None else [canonical(tag) for tag in arguments.languages]
    if wanted == []:
        raise LaAciqError("--languages: expected BCP-47 tags separated by commas, such as en,sw, got none")
    if arguments.texts == EMBEDDED:
        return embedded.load_texts(wanted if wanted is not None else languages)
    if arguments.texts == UDHR or udhr.is_package(arguments.texts):
        source = None if arguments.texts == UDHR else arguments.texts
        return udhr.load_texts(wanted if wanted is not None else languages, source)
    texts = load_texts(arguments.texts)
    if wanted is None:
        wanted = [tag for tag in languages or () if tag in texts] or list(texts)
    for tag in wanted:
        if tag not in texts:
            raise LaAciqError(f"--languages names {tag!r}, and {arguments.texts!r} has only {', '.join(texts)}")
    return {tag: texts[tag] for tag in wanted}


def check_enough_text(arguments: argparse.Namespace) -> None:
    """Before the model is loaded: that --nsamples and --seqlen ask for enough text for an interval."""
    from ..evaluation.loss import SEGMENT

    # The first token of a sample is not predicted.
    if arguments.nsamples == 1 and arguments.seqlen - 1 <= SEGMENT:
        raise LaAciqError(
            f"--nsamples 1 --seqlen {arguments.seqlen}: an interval needs at least two segments of up to {SEGMENT} "
            f"predicted tokens in each language; give --nsamples 2 or --seqlen {SEGMENT + 2}, or more"
        )


def report_file(path: str) -> Path:
    """The report.json of a folder, or the file itself."""
    return Path(path) / "report.json" if Path(path).is_dir() else Path(path)


def print_paths(report: Path, plots: Sequence[Path]) -> None:
    """Say where a report and its plots are."""
    print(f"\nReport   {report} and {report.with_name('report.md')}")
    print("Plots    " + "\n         ".join(str(report.with_name(plot.name)) for plot in plots))

"""`la-aciq evaluate`: what quantization costs each language, on text that was not calibrated on."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from .. import choices
from .._files import check_output, new_folder
from ..errors import LaAciqError
from .arguments import (
    SCHEMES,
    Commands,
    add_language_objective,
    add_model,
    add_output,
    add_texts,
    add_windows,
    language_objective,
    natural,
)
from .inputs import check_enough_text, load_model, load_texts, print_paths


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "evaluate",
        run,
        "report what quantization costs each language, on held-out text",
        "The report gives the change in bits per byte against the unquantized model, with intervals. Give a profile to "
        "compare the usual configurations, or a quantized model.",
    )
    add_model(parser)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--profile", help="profile folder: compare the usual configurations")
    subject.add_argument("--quantized", help="folder that quantize wrote: evaluate this model alone")
    parser.add_argument(
        "--scheme", choices=(*SCHEMES, "KV4"), help="with --profile: only the configurations of these bits"
    )
    parser.add_argument(
        "--codebook",
        choices=choices.CODEBOOKS,
        help=f"with --profile: 16 levels; midtread has a zero (without this option: {choices.CODEBOOK})",
    )
    add_language_objective(parser)
    add_texts(parser)
    add_windows(parser)
    parser.add_argument(
        "--skip",
        type=natural,
        help="tokens to leave out at the start of each text (without it: as many as the clips were chosen on, because "
        "the text may be the same); 0 for a text that calibration did not read",
    )
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the report, and write its folder."""
    from ..demo import configurations, write_report
    from ..evaluation import evaluate, evaluate_configurations
    from ..profile import Profile

    output = Path(arguments.output_dir)
    check_output(output, "report.json", arguments.force)
    check_enough_text(arguments)
    of_profile = ("scheme", "codebook", "language_objective", "language_weights", "language_penalty")
    if arguments.quantized is not None and any(getattr(arguments, name) is not None for name in of_profile):
        raise LaAciqError(
            "--scheme, --codebook and the options --language_* of a shared clip go with --profile; the model of "
            "--quantized has its settings already"
        )
    settings: dict[str, Any] = {
        "seqlen": arguments.seqlen,
        "tokens": arguments.seqlen * arguments.nsamples,
        "skip": arguments.skip,
        "seed": arguments.seed,
    }
    if arguments.quantized is not None:
        from ..checkpoint import load_quantized
        from ..models import fingerprint

        texts = load_texts(arguments)
        quantized: Any = load_quantized(arguments.quantized)
        model, tokenizer = load_model(arguments)
        if quantized.la_aciq.fingerprint != fingerprint(model):
            raise LaAciqError(
                f"--model {arguments.model!r} is not the model that {arguments.quantized!r} was quantized from"
            )
        report = evaluate(
            quantized.to(next(model.parameters()).device),
            model,
            texts=texts,
            tokenizer=tokenizer,
            name=Path(arguments.quantized).name,
            **settings,
        )
    else:
        profile = Profile.load(arguments.profile)
        texts = load_texts(arguments, profile.languages)
        model, tokenizer = load_model(arguments)
        usual = configurations(
            profile.metadata["group_size"],
            arguments.codebook or choices.CODEBOOK,
            any(site.kind == "key" for site in profile.sites.values()),
            **language_objective(arguments),
        )
        chosen = {
            name: config if profile.metadata["rotation"]["enabled"] else dataclasses.replace(config, rotate=False)
            for name, config in usual.items()
            if arguments.scheme is None or name.partition(" ")[0] == arguments.scheme
        }
        if not chosen:
            raise LaAciqError(
                f"--scheme {arguments.scheme}: the profile has no keys and values; expected W4A16, W4A8 or W4A4"
            )
        report = evaluate_configurations(model, profile, chosen, texts=texts, tokenizer=tokenizer, **settings)
    with new_folder(output, "report.json", arguments.force) as temporary:
        drawn = write_report(report, temporary)
    print(report.terminal())
    print_paths(output / "report.json", drawn)

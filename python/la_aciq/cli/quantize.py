"""`la-aciq quantize`: from a model and a profile to a quantized model."""

import argparse
from pathlib import Path
from typing import Any

from .. import choices
from .._files import check_output
from ..errors import LaAciqError
from ..nn.config import QuantConfig
from .arguments import (
    SCHEMES,
    Commands,
    add_language_objective,
    add_model,
    add_output,
    language_objective,
    strings,
)
from .inputs import load_model, report_file

_EXPORT_OPTIONS = "use --scheme W4A16 --codebook midtread --kv_bits 16"


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "quantize",
        run,
        "quantize a model with the statistics of a profile, and save it",
        "The folder can be loaded with la_aciq.load_quantized or transformers, evaluated, and served.",
    )
    add_model(parser)
    parser.add_argument("--profile", required=True, help="folder with this model's profile")
    parser.add_argument("--scheme", choices=SCHEMES, default="W4A4", help="bits of weights (W) and of activations (A)")
    parser.add_argument(
        "--kv_bits", type=int, choices=choices.KV_BITS, default=QuantConfig.kv, help="bits of keys and values"
    )
    parser.add_argument(
        "--clip",
        choices=choices.ACTIVATION_CLIPS,
        default=QuantConfig.clip,
        help="clips of activations: static, fixed from the profile, or a factor times the rms or the absmax that is "
        "measured while the model runs",
    )
    parser.add_argument(
        "--sharing",
        choices=choices.SHARINGS,
        default=QuantConfig.sharing,
        help="language: each language has its own clips and centers; pooled: all languages share them",
    )
    parser.add_argument(
        "--granularity",
        choices=choices.GRANULARITIES,
        default=QuantConfig.granularity,
        help="which inputs share a static clip: a group, a layer, or the model. With rms and absmax, token means one "
        "clip for all inputs of a token, and the others one clip for each group of a token",
    )
    parser.add_argument(
        "--codebook",
        choices=choices.CODEBOOKS,
        default=QuantConfig.codebook,
        help="16 levels: midrise is symmetric, midtread has a zero",
    )
    parser.add_argument(
        "--objective",
        choices=choices.OBJECTIVES,
        default=QuantConfig.objective,
        help="error that a clip minimizes: exact, or the approximations in_range and aciq (docs/theory.md)",
    )
    add_language_objective(parser)
    parser.add_argument(
        "--rounding",
        choices=choices.ROUNDINGS,
        default=QuantConfig.rounding,
        help="how weights are rounded: auto is feedback when the profile has second moments, else nearest",
    )
    parser.add_argument(
        "--ignore",
        type=strings,
        help="layers to leave alone: names or patterns, separated by commas (without this option: the profile's)",
    )
    parser.add_argument(
        "--format",
        choices=("la_aciq", "compressed-tensors"),
        default="la_aciq",
        help="format of the folder; transformers and vLLM load compressed-tensors without LA-ACIQ; it needs "
        "--scheme W4A16 --codebook midtread and a profile without rotation",
    )
    parser.add_argument(
        "--report", help="folder with a report.json of this model and configuration, for the model card"
    )
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    """Quantize, and write the model's folder."""
    from ..checkpoint import save_quantized
    from ..checkpoint.folder import ARCHITECTURE
    from ..evaluation import Report
    from ..nn import bits_per_weight, quantize_model
    from ..profile import Profile

    output = Path(arguments.output_dir)
    check_output(output, ARCHITECTURE, arguments.force)
    profile = Profile.load(arguments.profile)
    report = None if arguments.report is None else Report.load(report_file(arguments.report))
    exported = arguments.format == "compressed-tensors"
    if exported and profile.metadata["rotation"]["enabled"]:
        raise LaAciqError("--format compressed-tensors needs a profile without rotation; calibrate with --no_rotate")
    if exported and report is not None:
        raise LaAciqError("--report is for the model card, which --format compressed-tensors does not write")
    config = _configuration(arguments, profile, exported)
    if exported:  # before the model is loaded
        from ..integrations.compressed_tensors import check_configuration, export_compressed_tensors

        try:
            check_configuration(config)
        except LaAciqError as error:
            raise LaAciqError(f"{error}: {_EXPORT_OPTIONS}") from error
    model, tokenizer = load_model(arguments, causal=False)
    quantized = quantize_model(model, profile, config, inplace=True)
    if exported:
        from ..clipping import table

        clips = table(
            profile,
            codebook=config.codebook,
            objective=config.objective,
            sharing=config.sharing,
            language_objective=config.language_objective,
            language_weights=config.language_weights,
            penalty=config.language_penalty,
        )
        export_compressed_tensors(quantized, output, tokenizer, table=clips, force=arguments.force)
    else:
        save_quantized(quantized, output, tokenizer, report=report, force=arguments.force)
    print(f"Quantized model ({arguments.scheme}, {bits_per_weight(quantized):.2f} bits per weight): {output}")


def _configuration(arguments: argparse.Namespace, profile: Any, exported: bool) -> QuantConfig:
    return QuantConfig(
        weights=4,
        activations=SCHEMES[arguments.scheme],
        kv=arguments.kv_bits,
        group_size=profile.metadata["group_size"],
        codebook=arguments.codebook,
        clip=arguments.clip,
        sharing=arguments.sharing,
        granularity=arguments.granularity,
        objective=arguments.objective,
        **language_objective(arguments),
        rounding=arguments.rounding,
        rotate=profile.metadata["rotation"]["enabled"],
        center=False if exported else None,  # stock kernels have no bias by language
        ignore=tuple(profile.metadata["ignore"] if arguments.ignore is None else arguments.ignore),
    )

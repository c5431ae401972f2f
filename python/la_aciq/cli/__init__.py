"""The command line, `la-aciq`: a module for each command, its options beside what it does.

Exit status: 0 the command succeeded, 2 the request cannot be carried out as given (one sentence on stderr says why),
130 the user interrupted it, 141 the reader of the output stopped reading.
Options have the names of auto-round and llm-compressor where these have the option; `--group-size` is `--group_size`.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import LaAciqError
from . import bench, calibrate, compare, demo, evaluate, info, quantize, report, serve
from .arguments import Commands, Parser, with_underscores

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None means those of the process.

    Returns:
        The exit status.
    """
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        # What follows -- of `serve` and `bench serve` is for vLLM.
        serves = "serve" in words[:2] and "--" in words
        end = words.index("--") if serves else len(words)
        arguments = parser().parse_args(with_underscores(words[:end]), argparse.Namespace(vllm=words[end + 1 :]))
        _prepare_process()
        if arguments.runs_operations:
            _check_backend()
        arguments.run(arguments)
        sys.stdout.flush()
    except LaAciqError as error:
        return _fail(str(error))
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "la_aciq":
            raise
        return _fail(f"this needs the package {error.name}; run: pip install 'la-aciq[demo]'")
    except BrokenPipeError:
        # The status of a program that SIGPIPE ends. What is still to be written goes nowhere: Python would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        return _fail(f"{error.strerror}: {error.filename}" if error.filename is not None else str(error.strerror))
    except KeyboardInterrupt as interrupt:
        print(f"\nla-aciq: interrupted{''.join(f'; {note}' for note in interrupt.args)}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return _fail(
            "there is not enough memory for this model; choose a smaller --seqlen or another --device or --dtype"
        )
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. What it returns has `run`, a function of the parsed arguments."""
    program = Parser(
        prog="la-aciq",
        description="Quantize multilingual models to INT4, with clips and centers for the language of each request.",
        epilog="The usual order is calibrate, quantize, evaluate, serve. la-aciq COMMAND --help explains a command.",
    )
    program.add_argument("--version", action="version", version=f"la-aciq {__version__}")
    commands = Commands(program.add_subparsers(title="commands", required=True, metavar="COMMAND"))
    for module in (calibrate, quantize, evaluate, compare, report, bench, demo, serve, info):
        module.add_to(commands)
    return program


def _fail(message: str) -> int:
    print(f"la-aciq: error: {message}", file=sys.stderr)
    return 2


def _prepare_process() -> None:
    # Hints of other libraries to their own users would drown what a user of this command needs to see.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A path or a sign that the terminal's encoding does not have must not end hours of work.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _check_backend() -> None:
    """Before any work: that LA_ACIQ_BACKEND, where it is set, names a backend that runs here."""
    if os.environ.get("LA_ACIQ_BACKEND"):
        from ..ops.backends import forced_by_environment

        forced_by_environment()

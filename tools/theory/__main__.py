"""`python -m tools.theory`: recompute the numbers and plots of docs/theory.md, and write the page."""

import argparse
import json
import sys

from . import __doc__ as description
from .files import NUMBERS, PAGE, SUMMARY
from .measured import measured, summarize_profile
from .numbers import numbers
from .page import page
from .plots import draw


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.theory", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", metavar="DIR", help="a folder that la-aciq calibrate wrote")
    parser.add_argument("--check", action="store_true", help="only compare the page with numbers.json")
    arguments = parser.parse_args(argv)
    if arguments.check:
        stored = json.loads(NUMBERS.read_text(encoding="utf-8")) | measured()
        if PAGE.read_text(encoding="utf-8") != page(stored):
            print("docs/theory.md differs from docs/theory/page.md and numbers.json: run python -m tools.theory")
            return 1
        return 0
    if arguments.profile:
        SUMMARY.write_text(json.dumps(summarize_profile(arguments.profile), indent=1) + "\n", encoding="utf-8")
    computed = numbers()
    NUMBERS.write_text(json.dumps(computed, indent=1) + "\n", encoding="utf-8")
    draw(computed)
    PAGE.write_text(page(json.loads(NUMBERS.read_text(encoding="utf-8")) | measured()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

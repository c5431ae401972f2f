"""`la-aciq report`: a report again."""

import argparse

from .arguments import Commands
from .inputs import print_paths, report_file


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "report",
        run,
        "print a report, and write report.md and the plots beside its report.json",
        runs_operations=False,
    )
    parser.add_argument("report", help="folder with a report.json, or the file")


def run(arguments: argparse.Namespace) -> None:
    """Print the report, and write what is made from it."""
    from ..demo import illustrate
    from ..evaluation import Report

    file = report_file(arguments.report)
    report = Report.load(file)
    print(report.terminal())
    print_paths(file, illustrate(report, file.parent))

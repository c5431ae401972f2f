"""The files that the theory page is made from, and those that it is made of."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "theory"  # the template, the numbers, and the plots
TEMPLATE, NUMBERS, PAGE = FOLDER / "page.md", FOLDER / "numbers.json", ROOT / "docs" / "theory.md"
SUMMARY = FOLDER / "profile_summary.json"
RESULTS = ROOT / "benchmarks" / "results"

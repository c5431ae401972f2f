"""Parameters of a test by pairs: any two values of two parameters meet in at least one case.

A kernel's code depends on one or two settings at a time (a type and a width, a codebook and an instruction set), so
pairs find what the product of all settings finds, in a fraction of the cases; tools/mutation.py shows it.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest
from allpairspy import AllPairs

ALL_CASES = os.environ.get("LA_ACIQ_ALL_CASES") == "1"


def pairwise(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """`parametrize` with cases such that any two values of two parameters meet; `isa` is the fixture of that name.

    With LA_ACIQ_ALL_CASES=1 in the environment, every combination.
    """
    choices = [list(choices) for choices in values.values()]
    every = ALL_CASES or len(choices) < 2
    cases = [tuple(case) for case in (itertools.product(*choices) if every else AllPairs(choices))]
    return pytest.mark.parametrize(",".join(values), cases, indirect=["isa"] if "isa" in values else [])

"""Architectures of the installed transformers hold, or are refused in a sentence; docs/models.md says which do not.

The result of each is committed (`python -m tests.survey`). Each runs in a process of its own, so that a crash or a hang
is a failure of that one.
"""

import pytest
import transformers

from benchmarks.tables import with_tables

from . import table
from .architectures import Architecture, architectures
from .isolated import isolated

RESULTS = table.read()["architectures"]
SURVEYED = architectures()
# Of different kinds: grouped-query attention with sliding windows, a mixture of experts, convolutions over tokens, an
# encoder, an encoder-decoder, an encoder of features.
SAMPLE = (
    "causal/gemma3_text",
    "causal/qwen3_moe",
    "causal/lfm2",
    "masked/bert",
    "encoder-decoder/mbart",
    "speech/whisper",
)
MOST_REFUSED = 0.15
INSTALLED = transformers.__version__ == table.read()["versions"]["transformers"]


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    (architecture,) = (one for one in SURVEYED if one.name == name)
    check(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SURVEYED, ids=lambda one: one.name)
def test_architecture(architecture: Architecture) -> None:
    check(architecture)


def check(architecture: Architecture) -> None:
    """Survey one, and compare with what is committed; an architecture that is new must only not fail."""
    result = isolated(architecture)
    assert result["status"] != "fails", result["reason"]
    if result["status"] == "refused":
        assert result["passes"] <= 1, "it is refused after the calibration has read texts"
    expected = RESULTS.get(architecture.name)
    if expected is not None and INSTALLED:
        keys = ("status", "layers", "left alone")
        assert {key: result.get(key) for key in keys} == {key: expected.get(key) for key in keys}


@pytest.mark.skipif(not INSTALLED, reason="the results are of another version of transformers")
def test_results_hold_or_are_refused() -> None:
    assert set(RESULTS) <= {one.name for one in SURVEYED}
    assert {name for name, result in RESULTS.items() if result["status"] == "fails"} == set()
    surveyed = [result for result in RESULTS.values() if result["status"] in ("holds", "refused")]
    refused = [result for result in surveyed if result["status"] == "refused"]
    assert len(surveyed) > 180
    assert len(refused) < MOST_REFUSED * len(surveyed)


def test_the_page_has_the_results() -> None:
    page = table.PAGE.read_text()
    assert with_tables(page, table.tables(table.read())) == page, "run: python -m tests.survey --check"

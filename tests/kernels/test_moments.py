"""moments on Triton against the float64 reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from la_aciq.ops import reference

from .cases import DEVICE, DTYPES, Case, cases, kernel

TOLERANCE = {torch.float64: 1e-12}


def check(
    x: torch.Tensor, language_ids: torch.Tensor | None, num_entries: int, histogram: bool = True, repeat: bool = True
) -> None:
    state, counts = kernel("moments")(x, language_ids, num_entries, histogram)
    expected, expected_counts = reference.moments(x, language_ids, num_entries, histogram)
    assert state.shape == expected.shape
    assert torch.equal(counts, expected_counts)
    exact = [0, 5, 6, 7]
    assert torch.equal(state[:, exact], expected[:, exact])
    # Powers of the deviations are summed in float32: errors are relative to the sums of their absolute values, which
    # M2 and M4 bound: |sum d| <= sqrt(n M2), sum |d|^3 <= sqrt(M2 M4).
    count, m2, m4 = expected[:, 0], expected[:, 2], expected[:, 4]
    spreads = torch.stack([(m2 / count.clamp(min=1)).sqrt(), m2, (m2 * m4).sqrt(), m4], dim=-1)
    error = (state[:, 1:5] - expected[:, 1:5]).abs()
    relative = TOLERANCE.get(x.dtype, 4e-6)
    assert (error <= relative * spreads + 1e-15 * expected[:, 1:5].abs() + 1e-300).all(), (state, expected)
    if repeat:
        again, _ = kernel("moments")(x, language_ids, num_entries, histogram)
        assert torch.equal(again, state), "another result the second time"


@settings(deadline=None, max_examples=25)
@given(case=cases(rotation=False), double=st.booleans(), offset=st.sampled_from([0.0, 3.0, -1000.0]))
def test_moments(case, double, offset):
    x = case.x() + offset
    check(x.double() if double else x, case.language_ids(), case.num_entries)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_many_pieces_in_one_language(dtype):
    x = torch.randn(3, 12001, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).to(DEVICE)
    check(x, None, 1)
    check(x, None, 3)
    check(x, torch.tensor([2, 0, 2], dtype=torch.int32, device=DEVICE), 3)


@pytest.mark.gpu
def test_a_row_per_language_and_1024_languages():
    """Per-group statistics are asked for like this: rows of one group each, an id per row."""
    case = Case(lead=(1500,), k=16, num_entries=1024, ids_shape=(1500,))
    check(case.x(), case.language_ids(), 1024, repeat=False)


@pytest.mark.gpu
def test_more_states_than_one_merge_takes():
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ids = (torch.arange(4000, dtype=torch.int32, device=DEVICE) // 1500).contiguous()
    check(x, ids, 3, histogram=False)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e15, 1e37])
def test_magnitudes_from_subnormal_to_the_largest(scale):
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(3)).to(DEVICE) * scale
    check(x, None, 1)


@pytest.mark.gpu
def test_a_mean_far_from_zero_does_not_cancel():
    x = 1e4 + torch.randn(4, 5000, generator=torch.Generator().manual_seed(4)).to(DEVICE) * 1e-2
    check(x, None, 1)


@pytest.mark.gpu
def test_constant_data_has_no_variance():
    state, _ = kernel("moments")(torch.full((3, 1000), 0.1, device=DEVICE))
    assert state[0, 2:5].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.gpu
def test_nan_and_infinities_are_counted_and_left_out():
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    x[0, 3], x[0, 7], x[1, 0] = math.nan, math.inf, -math.inf
    ids = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    check(x, ids, 2)
    check(torch.full((2, 5), math.nan, device=DEVICE), ids, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_elements(shape):
    ids = None if len(shape) == 1 else torch.zeros(shape[0], dtype=torch.int32, device=DEVICE)
    check(torch.zeros(shape, device=DEVICE), ids, 2)


@pytest.mark.gpu
def test_a_scalar():
    check(torch.tensor(2.5, device=DEVICE), None, 1)

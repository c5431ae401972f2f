"""quantize, quantize_dynamic, dequantize and rotate on Triton against the float64 reference."""

import math

import pytest
import torch
from hypothesis import example, given, settings

from la_aciq.ops import reference

from .cases import CODEBOOKS, DEVICE, DTYPES, NAMED, Case, assert_codes, cases, kernel, rotated64


def check_quantize(case: Case) -> None:
    x, clips, language_ids = case.x(), case.table(), case.language_ids()
    options = (case.group_size, case.codebook, case.signs(), case.block_size)
    codes, tail = kernel("quantize")(x, clips, language_ids, *options, True)
    assert_codes(case, codes, reference.clip_per_group(clips, language_ids, x.shape[:-1]))
    expected = reference.quantize(x, clips, language_ids, *options, True)[1]
    assert tail.shape == expected.shape
    # Rotation rounds: an element on either side of the clip moves a count by one and a sum by |x|.
    slack = 2 if case.rotated else 0
    torch.testing.assert_close(tail[..., 1], expected[..., 1], rtol=0, atol=slack)
    torch.testing.assert_close(tail[..., 2], expected[..., 2], rtol=1e-6, atol=20.0 * slack)
    torch.testing.assert_close(tail[..., [0, 3]], expected[..., [0, 3]], rtol=0, atol=0)
    again, no_tail = kernel("quantize")(x, clips, language_ids, *options)
    assert torch.equal(again, codes)
    assert no_tail.shape == (0, case.groups, 4)


def check_quantize_dynamic(case: Case, statistic: str) -> None:
    x, factors, language_ids = case.x(), case.table(), case.language_ids()
    options = (case.group_size, statistic, case.codebook, case.signs(), case.block_size)
    codes, row_clips = kernel("quantize_dynamic")(x, factors, language_ids, *options)
    expected = reference.quantize_dynamic(x, factors, language_ids, *options)[1]
    assert row_clips.shape == expected.shape
    # What a rotation rounds is relative to its row: a group of small values has it, too.
    rounding = 2.0**-20 * rotated64(case).abs().amax(-1, keepdim=True) * factors.double().amax() if case.rotated else 0
    error = (row_clips.double() - expected.double()).abs()
    assert (error <= 2e-6 * expected.double().abs() + rounding).all()
    assert_codes(case, codes, row_clips.to(torch.float64))


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_quantize(case):
    check_quantize(case)


@settings(deadline=None, max_examples=20)
@given(case=cases())
def test_quantize_dynamic_rms(case):
    check_quantize_dynamic(case, "rms")


@settings(deadline=None, max_examples=20)
@given(case=cases())
@example(case=Case(lead=(1,), k=192, group_size=2, num_entries=1, rotated=True, block_size=8, seed=186))
def test_quantize_dynamic_absmax(case):
    check_quantize_dynamic(case, "absmax")


@pytest.mark.gpu
@pytest.mark.parametrize("case", NAMED, ids=str)
def test_sizes_that_choose_other_tiles(case):
    check_quantize(case)
    check_quantize_dynamic(case, "rms")


@settings(deadline=None, max_examples=25)
@given(case=cases(rotation=False))
def test_dequantize(case):
    packed, _ = reference.quantize(case.x(), case.table(), case.language_ids(), case.group_size, case.codebook)
    layouts = {"every second": lambda t: torch.stack([t, t ^ 255], dim=-1)[..., 0]}
    codes = layouts.get(case.layout, lambda t: t)(packed)
    clips = reference.clip_per_group(case.table(), case.language_ids(), case.lead).to(torch.float32)
    options = {"k": case.k, "group_size": case.group_size, "codebook": case.codebook, "dtype": case.dtype}
    from_table = kernel("dequantize")(codes, case.table(), case.language_ids(), **options)
    from_scales = kernel("dequantize")(codes, clips, **options, per_row=True)
    expected = reference.dequantize(codes, clips, **options, per_row=True)
    assert from_table.dtype == case.dtype
    # Two roundings to float32 before the one to the output.
    tolerance = {"rtol": max(2e-7, torch.finfo(case.dtype).eps), "atol": 0}
    torch.testing.assert_close(from_table, expected, **tolerance)
    assert torch.equal(from_scales, from_table)


def check_rotate(case: Case) -> None:
    y = kernel("rotate")(case.x(), case.signs(), case.block_size)
    assert y.dtype == case.dtype
    assert y.is_contiguous()
    expected = rotated64(case)
    tolerance = max(2.0**-20, torch.finfo(case.dtype).eps)
    assert ((y.double() - expected).abs() <= tolerance * (expected.abs() + expected.abs().amax(-1, keepdim=True))).all()


@settings(deadline=None, max_examples=20)
@given(case=cases())
def test_rotate(case):
    check_rotate(Case(**{**case.__dict__, "rotated": True}))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [4096, 28672, 32768, 65536 * 3])
def test_rotate_long_rows(k):
    check_rotate(Case(lead=(2,), k=k, rotated=True))


@pytest.mark.gpu
def test_float32_signs():
    case = Case(k=96, rotated=True)
    y = kernel("rotate")(case.x(), case.signs().to(torch.float32))
    assert torch.equal(y, kernel("rotate")(case.x(), case.signs()))


@pytest.mark.gpu
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities(codebook, dtype):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 0.5], [math.nan] * 4], dtype=dtype, device=DEVICE)
    clips = torch.ones(1, 1, device=DEVICE)
    codes, tail = kernel("quantize")(x, clips, None, 0, codebook, None, 0, True)
    assert reference.unpack(codes, 4)[:, :3].tolist() == [[8, 15, 0], [8, 8, 8]]
    assert tail.tolist() == [[[1.0, 0.0, 0.0, 7.0]]]
    codes, row_clips = kernel("quantize_dynamic")(x, clips, None, 0, "rms", codebook)
    assert row_clips.flatten().tolist() == [0.5, 0.0]
    assert reference.unpack(codes, 4)[:, :3].tolist() == [[8, 15, 0], [8, 8, 8]]


@pytest.mark.gpu
@pytest.mark.parametrize("statistic", ["rms", "absmax"])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_rows_of_zeros_dequantize_to_zeros(statistic, codebook):
    x = torch.zeros(3, 40, device=DEVICE)
    codes, row_clips = kernel("quantize_dynamic")(x, torch.ones(1, 3, device=DEVICE), None, 16, statistic, codebook)
    out = kernel("dequantize")(codes, row_clips, k=40, group_size=16, codebook=codebook, per_row=True)
    assert (out == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_that_is_not_finite_and_positive_gives_zeros(clip, codebook):
    table = torch.tensor([[clip]], device=DEVICE)
    x = torch.tensor([[1.0, -2.0, math.inf, 0.0]], device=DEVICE)
    codes, _ = kernel("quantize")(x, table, None, 0, codebook)
    assert (reference.unpack(codes, 4) == 8).all()
    assert (kernel("dequantize")(codes, table, k=4, codebook=codebook) == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e37])
def test_extreme_magnitudes_do_not_overflow_the_statistic(scale):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE) * scale
    _, row_clips = kernel("quantize_dynamic")(x, torch.ones(1, 1, device=DEVICE))
    torch.testing.assert_close(row_clips.double(), x.double().square().mean(-1, keepdim=True).sqrt(), rtol=2e-6, atol=0)


@pytest.mark.gpu
def test_codebook_is_exact_on_its_own_values():
    """Round trip: the values of all codes return their codes, in every group."""
    packed = torch.arange(256, dtype=torch.uint8).reshape(2, 128).to(DEVICE)
    clips = torch.tensor([[7.5, 15.0, 0.9375, 1.0]], device=DEVICE)
    values = kernel("dequantize")(packed, clips, k=256, group_size=64)
    assert torch.equal(kernel("quantize")(values, clips, None, 64)[0], packed)


@pytest.mark.gpu
@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
def test_no_rows(lead):
    x = torch.zeros(*lead, 70, device=DEVICE)
    clips = torch.ones(2, 5, device=DEVICE)
    signs = torch.ones(70, device=DEVICE)
    codes, tail = kernel("quantize")(x, clips, None, 16, "midrise", signs, 0, True)
    assert codes.shape == (*lead, 35)
    assert torch.equal(tail, torch.zeros(2, 5, 4, dtype=torch.float64, device=DEVICE))
    codes, row_clips = kernel("quantize_dynamic")(x, clips, None, 16)
    assert (codes.shape, row_clips.shape) == ((*lead, 35), (*lead, 5))
    assert kernel("dequantize")(codes, clips, k=70, group_size=16).shape == x.shape
    assert kernel("rotate")(x, signs).shape == x.shape


@pytest.mark.gpu
def test_a_table_of_one_clip_per_language_is_read_without_expansion():
    """Stride 0 along the groups, as the Python wrappers make it of a [num_entries] tensor."""
    case = Case(lead=(4,), k=64, group_size=16, ids_shape=(4,))
    expanded = case.table()[:, :1].expand(-1, case.groups)
    codes, _ = kernel("quantize")(case.x(), expanded, case.language_ids(), case.group_size)
    assert_codes(case, codes, reference.clip_per_group(expanded, case.language_ids(), (4,)))

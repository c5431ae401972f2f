"""Every CUDA operation against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from small_calls import small_calls

from la_aciq.ops import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
ANY_SHAPE = settings(deadline=None, max_examples=25, derandomize=True)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def clips(num_entries: int, groups: int, seed: int = 1) -> torch.Tensor:
    return 1.5 + 1.5 * torch.rand(num_entries, groups, generator=torch.Generator().manual_seed(seed))


def random_signs(k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2 * torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(2)) - 1).to(dtype)


def assert_codes(codes, x, clip, codebook="midrise", doubt=4e-6):
    """codes are those of x under the clip of each element, but for elements so near a boundary that float32 may err."""
    k = x.shape[-1]
    assert codes.dtype == torch.uint8
    assert codes.shape == (*x.shape[:-1], (k + 1) // 2)
    if k % 2:
        assert (codes[..., -1] >> 4 == 0).all()
    x, clip = x.double(), clip.double().expand(x.shape)
    nearby = [
        reference.to_codes(x * (1 + sign * doubt) + sign * doubt * clip * 1e-3, clip, 4, codebook) for sign in (-1, 1)
    ]
    got = reference.unpack(codes, k).double()
    wrong = (got < torch.minimum(*nearby)) | (got > torch.maximum(*nearby))
    assert not wrong.any(), f"{int(wrong.sum())} of {got.numel()} codes"


def clip_per_element(table, language_ids, x, group_size):
    per_group = reference.clip_per_group(table, language_ids, x.shape[:-1])
    return reference.per_element(per_group, x.shape[-1], group_size)


# --- quantize ---


@pairwise(
    shape=[
        (64, 0),
        (128, 64),
        (4096, 64),
        (576, 64),
        (100, 24),
        (1, 0),
        (7, 2),
        (33, 6),
        (1000, 1024),
        (3000, 0),
        (14336, 128),
    ],
    dtype=FLOATS,
    codebook=["midrise", "midtread"],
)
def test_quantize(ops, shape, dtype, codebook):
    k, group_size = shape
    x = normal(5, k, dtype=dtype)
    table = clips(3, reference.group_count(k, group_size))
    language_ids = torch.tensor([2, 0, 1, 2, 1], dtype=torch.int32)
    codes, tail = ops.quantize(x, table, language_ids, group_size, codebook)
    assert tail.shape == (0, table.shape[1], 4)
    assert_codes(codes, x, clip_per_element(table, language_ids, x, group_size), codebook)


@pytest.mark.parametrize("rows", [1, 2, 255, 1000])
def test_quantize_many_rows(ops, rows):
    x = normal(rows, 64)
    table = clips(7, 1)
    language_ids = torch.arange(rows, dtype=torch.int32) % 7
    codes, _ = ops.quantize(x, table, language_ids)
    assert_codes(codes, x, clip_per_element(table, language_ids, x, 0))


LANGUAGE_SHAPES = [(4,), (4, 1), (1, 3), (4, 3), (1, 1), (4, 3, 2), (4, 1, 2), (1, 3, 1), (1, 1, 2)]


@pytest.mark.parametrize("shape", LANGUAGE_SHAPES, ids=str)
def test_language_shapes(ops, shape):
    x = normal(4, 3, 2, 40)
    table = clips(5, 5)
    language_ids = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    codes, tail = ops.quantize(x, table, language_ids, 8, tail_sums=True)
    assert_codes(codes, x, clip_per_element(table, language_ids, x, 8))
    expected = reference.quantize(x, table, language_ids, 8, tail_sums=True)[1]
    torch.testing.assert_close(tail, expected, rtol=1e-6, atol=0)
    codes, row_clips = ops.quantize_dynamic(x, table, language_ids, 8)
    torch.testing.assert_close(row_clips, reference.quantize_dynamic(x, table, language_ids, 8)[1], rtol=2e-6, atol=0)
    state, _ = ops.moments(x, language_ids, 5)
    assert_moments(state, reference.moments(x, language_ids, 5)[0])


def test_ids_out_of_range_read_the_first_row(ops):
    x = normal(4, 64)
    table = clips(3, 1)
    wild = torch.tensor([-1, 3, 2**31 - 1, 1], dtype=torch.int32)
    tame = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    for tail_sums in (False, True):
        got, expected = (ops.quantize(x, table, ids, tail_sums=tail_sums) for ids in (wild, tame))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    assert torch.equal(ops.moments(x, wild, 3)[0], ops.moments(x, tame, 3)[0])
    assert torch.equal(ops.quantize_dynamic(x, table, wild)[1], ops.quantize_dynamic(x, table, tame)[1])
    codes = ops.quantize(x, table, tame)[0]
    options = {"k": 64, "dtype": torch.float32}
    assert torch.equal(ops.dequantize(codes, table, wild, **options), ops.dequantize(codes, table, tame, **options))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "group_size"), [(256, 64), (40, 6), (9, 2), (64, 0), (1100, 0)])
def test_tail_sums(ops, dtype, k, group_size):
    x = normal(200, k, dtype=dtype) * 2
    x[3, 1], x[4, 0], x[150, k // 2] = torch.nan, torch.inf, -torch.inf
    table = clips(4, reference.group_count(k, group_size))
    language_ids = (torch.arange(200) * 7 % 5).to(torch.int32)  # one in five is out of range
    codes, tail = ops.quantize(x, table, language_ids, group_size, tail_sums=True)
    plain, _ = ops.quantize(x, table, language_ids, group_size)
    assert torch.equal(codes, plain)
    torch.testing.assert_close(
        tail, reference.quantize(x, table, language_ids, group_size, tail_sums=True)[1], rtol=1e-6, atol=0
    )


# --- values ---


@pairwise(group_size=[0, 8, 6], dtype=FLOATS, codebook=["midrise", "midtread"])
def test_nonfinite_values_and_useless_clips(ops, dtype, codebook, group_size):
    x = normal(9, 24, dtype=dtype)
    x[0, 0], x[0, 9], x[0, 23] = torch.nan, torch.inf, -torch.inf
    x[1] = 0
    x[2] = torch.finfo(dtype).max
    groups = reference.group_count(24, group_size)
    table = (
        torch.tensor([1.5, 0.0, -1.0, torch.nan, torch.inf, 1e-45, 3e38]).unsqueeze(1).expand(-1, groups).contiguous()
    )
    language_ids = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    codes, _ = ops.quantize(x, table, language_ids, group_size, codebook)
    got = reference.unpack(codes, 24)
    assert got[0, 0] == 8
    assert got[0, 9] == 15
    assert got[0, 23] == 0
    assert (got[1] == 8).all()
    assert (got[2] == 15).all()
    assert (got[3:7] == 8).all()
    values = ops.dequantize(
        codes, table, language_ids, k=24, group_size=group_size, codebook=codebook, dtype=torch.float32
    )
    assert (values[3:7] == 0).all()
    assert values[:3].isfinite().all()


@pairwise(
    shape=[(128, 0), (4096, 64), (100, 24), (33, 6), (7, 2), (1, 0)],
    dtype=FLOATS,
    codebook=["midrise", "midtread"],
)
def test_dequantize(ops, shape, dtype, codebook):
    k, group_size = shape
    codes = torch.randint(0, 256, (6, (k + 1) // 2), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    language_ids = torch.tensor([0, 2, 1, 0, 2, 1], dtype=torch.int32)
    table = clips(3, reference.group_count(k, group_size))
    options = {"k": k, "group_size": group_size, "codebook": codebook}
    expected = reference.dequantize(codes, table, language_ids, **options, dtype=torch.float64)
    got = ops.dequantize(codes, table, language_ids, **options, dtype=dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=3 * EPSILON[dtype], atol=0)

    row_clips = clips(6, table.shape[1])
    expected = reference.dequantize(codes, row_clips, None, **options, per_row=True, dtype=torch.float64)
    got = ops.dequantize(codes, row_clips, None, **options, per_row=True, dtype=dtype)
    torch.testing.assert_close(got.double(), expected, rtol=3 * EPSILON[dtype], atol=0)


def test_ends_of_the_midrise_codebook_are_the_clip(ops):
    codes = torch.tensor([[0xF0]], dtype=torch.uint8)
    for clip in (2.5, 0.1, 1e-30, 3e38):
        values = ops.dequantize(codes, torch.tensor([[clip]]), None, k=2, dtype=torch.float32)
        assert values.tolist() == [[-torch.tensor(clip).item(), torch.tensor(clip).item()]]


# --- rotation ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("k", "block"),
    [
        (64, 0),
        (128, 32),
        (1, 0),
        (6, 2),
        (33, 1),
        (100, 4),
        (256, 8),
        (576, 64),
        (512, 0),
        (1024, 0),
        (2048, 0),
        (4096, 0),
        (11008, 0),
        (8192, 0),
        (14336, 0),
        (28672, 0),
        (8192, 256),
        (32768, 0),
    ],
)
def test_rotate(ops, dtype, k, block):
    x = normal(3, k, dtype=dtype)
    for signs in (random_signs(k), random_signs(k, torch.int8)):
        got = ops.rotate(x, signs, block)
        assert got.dtype == dtype
        expected = reference.rotate(x.double(), signs, block)
        bound = 4 * EPSILON[dtype] * expected.abs() + 1e-6 * expected.abs().max()
        assert ((got.double() - expected).abs() <= bound).all()


# --- quantize_dynamic ---


DYNAMIC = [
    *[(64, 0), (128, 0), (40, 0), (96, 0), (256, 0), (576, 64), (4096, 64), (4096, 0), (2048, 256), (1024, 512)],
    *[(100, 24), (33, 6), (7, 2), (1, 0), (200, 16), (1000, 128), (14336, 0), (28672, 64), (28672, 0), (11008, 48)],
]


@pairwise(shape=DYNAMIC, rotated=[False, True], statistic=["rms", "absmax"])
def test_quantize_dynamic(ops, shape, rotated, statistic):
    k, group_size = shape
    for dtype in FLOATS if k <= 256 else [torch.bfloat16]:
        x = normal(5, k, dtype=dtype)
        factors = clips(3, reference.group_count(k, group_size))
        language_ids = torch.tensor([2, 0, 1, 2, 1], dtype=torch.int32)
        signs = random_signs(k) if rotated else None
        codes, row_clips = ops.quantize_dynamic(x, factors, language_ids, group_size, statistic, "midrise", signs)
        y = reference.rotate(x.double(), signs) if rotated else x.double()
        expected = reference.dynamic_clip(
            y, reference.clip_per_group(factors, language_ids, x.shape[:-1]), group_size, statistic
        )
        torch.testing.assert_close(row_clips, expected, rtol=5e-6 if rotated else 2e-6, atol=0)
        doubt = 2e-4 if rotated else 4e-6
        assert_codes(codes, y, reference.per_element(row_clips, k, group_size), doubt=doubt)


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize(("k", "group_size"), [(64, 0), (4096, 64), (4096, 0), (100, 24), (576, 128), (9, 2)])
def test_quantize_rotated(ops, k, group_size, codebook):
    x = normal(5, k)
    table = clips(3, reference.group_count(k, group_size))
    language_ids = torch.tensor([2, 0, 1, 2, 1], dtype=torch.int32)
    signs = random_signs(k)
    y = reference.rotate(x.double(), signs)
    clip = clip_per_element(table, language_ids, x, group_size)
    codes, _ = ops.quantize(x, table, language_ids, group_size, codebook, signs)
    assert_codes(codes, y, clip, codebook, doubt=2e-4)
    codes, tail = ops.quantize(x, table, language_ids, group_size, codebook, signs, tail_sums=True)
    assert_codes(codes, y, clip, codebook, doubt=2e-4)
    expected = reference.quantize(x, table, language_ids, group_size, codebook, signs, tail_sums=True)[1]
    torch.testing.assert_close(tail, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("statistic", ["rms", "absmax"])
@pytest.mark.parametrize(("k", "group_size"), [(64, 0), (64, 32), (4096, 0), (4096, 64), (100, 24), (30000, 0)])
def test_dynamic_clips_of_extreme_rows(ops, k, group_size, statistic):
    x = normal(7, k)
    x[0] = 0
    x[1] *= 1e25
    x[2] *= 1e-25
    x[3, 0], x[3, 7], x[3, k // 2] = torch.nan, torch.inf, -torch.inf
    x[4] = torch.nan
    x[5] *= 1e-42
    factors = clips(1, reference.group_count(k, group_size))
    codes, row_clips = ops.quantize_dynamic(x, factors, None, group_size, statistic)
    expected = reference.quantize_dynamic(x, factors, None, group_size, statistic)[1]
    torch.testing.assert_close(row_clips, expected, rtol=3e-6, atol=1e-44)
    assert (row_clips[0] == 0).all()
    assert (row_clips[4] == 0).all()
    values = ops.dequantize(codes, row_clips, None, k=k, group_size=group_size, per_row=True, dtype=torch.float32)
    assert values.isfinite().all()


# --- moments ---


def assert_moments(state, expected, rtol=1e-6):
    """States agree relative to the scale each power has: n sigma^p."""
    state, expected = state.double(), expected.double()
    count = expected[..., 0]
    assert torch.equal(state[..., 0], count)
    assert torch.equal(state[..., 5:], expected[..., 5:])
    sigma = (expected[..., 2] / count.clamp(min=1)).sqrt()
    assert ((state[..., 1] - expected[..., 1]).abs() <= rtol * sigma + 1e-15 * expected[..., 1].abs()).all()
    for power in (2, 3, 4):
        scale = torch.maximum(expected[..., power].abs(), count * sigma**power)
        assert ((state[..., power] - expected[..., power]).abs() <= rtol * scale).all(), power


@pairwise(
    case=[
        ((7, 64), 3),
        ((300, 64), 12),
        ((40, 4096), 5),
        ((3, 9000), 2),
        ((50, 33), 4),
        ((20, 1), 3),
        ((2, 30000), 700),
    ],
    dtype=[*FLOATS, torch.float64],
    histogram=[False, True],
)
def test_moments_by_language(ops, case, dtype, histogram):
    shape, num_entries = case
    x = normal(*shape, dtype=dtype) + 0.5
    language_ids = (torch.arange(shape[0]) * 5 % (num_entries + 1)).to(torch.int32)  # the last is out of range
    state, counts = ops.moments(x, language_ids, num_entries, histogram)
    expected, expected_counts = reference.moments(x, language_ids, num_entries, histogram)
    assert_moments(state, expected)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (70000,), (3, 50, 8), (1, 28672)], ids=str)
def test_moments_of_all(ops, shape):
    x = normal(*shape)
    for num_entries in (1, 4):
        state, _ = ops.moments(x, None, num_entries)
        assert_moments(state, reference.moments(x, None, num_entries)[0])


def test_moments_of_groups(ops):
    """An entry per row and group, as calibration asks for."""
    x = normal(96, 8, 64, dtype=torch.bfloat16)
    language_ids = (torch.arange(96).unsqueeze(1) % 3 * 8 + torch.arange(8)).to(torch.int32)
    state, counts = ops.moments(x, language_ids, 24, True)
    expected, expected_counts = reference.moments(x, language_ids, 24, True)
    assert_moments(state, expected)
    assert torch.equal(counts, expected_counts)


def test_moments_of_hard_data(ops):
    offset = normal(16, 512) + 1e4
    outlier = normal(16, 512)
    outlier[0, 0] = 1e3
    nonfinite = normal(16, 512)
    nonfinite[2, 5], nonfinite[3, 100], nonfinite[0, 0] = torch.nan, torch.inf, -torch.inf
    constant = torch.full((16, 512), 3.25)
    large, small = normal(16, 512) * 1e30, normal(16, 512) * 1e-30
    for x in (offset, outlier, nonfinite, constant, torch.zeros(16, 512), large, small):
        assert_moments(ops.moments(x)[0], reference.moments(x)[0])
    nothing = torch.full((4, 512), torch.nan)
    assert torch.equal(ops.moments(nothing)[0], reference.moments(nothing)[0])


def test_histogram_of_extremes(ops):
    x = torch.tensor([0.0, -0.0, 2.0**-16, 2.0**-17, 65536.0, -65535.0, 1e-45, 3e38, torch.nan, torch.inf, 1.0, 1.1])
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(ops.moments(x.to(dtype), None, 1, True)[1], reference.moments(x.to(dtype), None, 1, True)[1])


# --- linear ---


@pairwise(
    shape=[
        (1, 40, 256, 64),
        (1, 16, 4096, 64),
        (3, 100, 576, 64),
        (5, 33, 512, 128),
        (8, 70, 384, 0),
        (9, 20, 96, 32),
        (16, 48, 1024, 256),
        (2, 1, 32, 0),
        (16, 64, 64, 64),
    ],
    dtype=[torch.bfloat16, torch.float16],
    codebook=["midrise", "midtread"],
)
def test_linear(ops, shape, dtype, codebook):
    rows, n, k, group_size = shape
    weight = torch.randint(0, 256, (n, k // 2), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    weight_clips = clips(n, reference.group_count(k, group_size)) / k**0.5
    x, bias = normal(rows, k, dtype=dtype), normal(n, seed=6, dtype=dtype)
    options = {"group_size": group_size, "weight_codebook": codebook}
    for offset in (None, bias):
        expected = reference.linear(x.double(), weight, weight_clips, offset, **options)
        got = ops.linear(x, weight, weight_clips, offset, **options)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected.double(), rtol=3 * EPSILON[dtype], atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "rows", "k", "group_size"),
    [(torch.float32, 3, 128, 64), (torch.bfloat16, 17, 128, 64), (torch.float16, 2, 40, 6), (torch.bfloat16, 2, 33, 8)],
)
def test_linear_composed(ops, dtype, rows, k, group_size):
    """float32, many rows, and shapes the tensor-core kernel does not take."""
    weight = torch.randint(0, 256, (20, (k + 1) // 2), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    weight_clips = clips(20, reference.group_count(k, group_size)) / k**0.5
    x = normal(rows, k, dtype=dtype)
    expected = reference.linear(x.double(), weight, weight_clips, group_size=group_size)
    got = ops.linear(x, weight, weight_clips, group_size=group_size)
    torch.testing.assert_close(got.double(), expected, rtol=8 * EPSILON[dtype], atol=8 * EPSILON[dtype])


@pairwise(bits=[8, 4], clip=["static", "rms", "absmax"], rotated=[False, True])
def test_linear_with_rounded_activations(ops, bits, clip, rotated):
    k, group_size = 128, 32
    weight = torch.randint(0, 256, (24, k // 2), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    weight_clips = clips(24, 2) / k**0.5
    x = normal(2, 3, k)
    options = {
        "group_size": 64,
        "signs": random_signs(k) if rotated else None,
        "activation_bits": bits,
        "activation_clip": clip,
        "clips": clips(3, k // group_size),
        "language_ids": torch.tensor([2, 1], dtype=torch.int32),
        "activation_group_size": group_size,
        "activation_codebook": "midtread",
    }
    expected = reference.linear(x.double(), weight, weight_clips, **options)
    got = ops.linear(x, weight, weight_clips, **options)
    assert got.shape == (2, 3, 24)
    # One code that differs where x / Delta is at a boundary would show as an error of a step times a weight.
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


# --- every kernel, small: what compute-sanitizer runs ---


@pytest.mark.parametrize("name", small_calls())
def test_small_call(ops, name):
    call = small_calls()[name]
    for got, wanted in zip(call(ops), call(reference), strict=True):
        assert got.shape == wanted.shape
        if got.dtype == torch.uint8:  # codes of pairs: decisions at boundaries
            assert (got != wanted).double().mean() < 0.01
        elif name.startswith("moments") and got.dtype == torch.float64:
            assert_moments(got, wanted)
        else:
            bound = 2e-2 if got.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(got.double(), wanted.double(), rtol=bound, atol=bound)


# --- calling conventions ---


def views(x):
    """x in memory that is not contiguous, not aligned, or shared."""
    k = x.shape[-1]
    yield "contiguous", x
    wide = torch.full((*x.shape[:-1], k + 8), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 8:] = x
    yield "columns", wide[..., 8:]
    shifted = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype, device=x.device)
    shifted[1:] = x.flatten()
    yield "shifted", shifted[1:].view(x.shape)
    yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "columns transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    every_other = torch.full((*x.shape[:-1], 2 * k), torch.nan, dtype=x.dtype, device=x.device)
    every_other[..., ::2] = x
    yield "every other", every_other[..., ::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [64, 22])
def test_any_strides(ops, dtype, k):
    x = normal(4, 6, k, dtype=dtype)
    if ops.name == "cuda":
        x = x.cuda()  # so that what arrives there is the view itself
    table, signs = clips(3, 1), random_signs(k)
    language_ids = torch.tensor([0, 2, 1, 0], dtype=torch.int32)
    codes = torch.randint(0, 256, (5, k // 2), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    weight, weight_clips = codes, clips(5, 1)
    calls = {
        "moments": lambda v: ops.moments(v, language_ids, 3),
        "moments of all": lambda v: ops.moments(v),
        "quantize": lambda v: ops.quantize(v, table, language_ids, tail_sums=True),
        "quantize_dynamic": lambda v: ops.quantize_dynamic(v, table, language_ids, 0, "rms", "midrise", signs),
        "rotate": lambda v: (ops.rotate(v, signs),),
        "linear": lambda v: (ops.linear(v[0], weight, weight_clips),),
    }
    for name, call in calls.items():
        expected = call(x)
        # Paths for other alignments add in another order; that of linear has weights rounded to the dtype of x, by
        # 2^-9 of each of the k products, of which none is larger than a clip times the largest |x|.
        bound = 1e-5 if dtype == torch.float32 or name not in ("rotate", "linear") else 3e-2
        if name == "linear" and dtype != torch.float32:
            bound = EPSILON[dtype] * k * float(weight_clips.max() * x.abs().max())
        for kind, view in views(x):
            assert torch.equal(view, x)
            for got, wanted in zip(call(view), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=bound, atol=bound, msg=f"{name}, {kind}")


def test_zero_rows(ops):
    x = torch.zeros(0, 3, 64)
    table, language_ids = clips(2, 1), torch.zeros(0, 1, dtype=torch.int32)
    codes, tail = ops.quantize(x, table, language_ids, tail_sums=True)
    assert codes.shape == (0, 3, 32)
    assert torch.equal(tail, torch.zeros(2, 1, 4, dtype=torch.float64))
    codes, row_clips = ops.quantize_dynamic(x, table, language_ids)
    assert row_clips.shape == (0, 3, 1)
    assert ops.dequantize(codes, table, language_ids, k=64, dtype=torch.float32).shape == (0, 3, 64)
    assert ops.rotate(x, torch.ones(64)).shape == (0, 3, 64)
    state, counts = ops.moments(x, language_ids, 2, True)
    expected = reference.moments(x, language_ids, 2, True)
    assert torch.equal(state, expected[0])
    assert torch.equal(counts, expected[1])
    assert ops.moments(torch.zeros(3, 0))[0][0, 0] == 0
    weight, weight_clips = torch.zeros(5, 32, dtype=torch.uint8), clips(5, 1)
    assert ops.linear(x, weight, weight_clips).shape == (0, 3, 5)


@pytest.mark.parametrize("operation", ["quantize", "quantize_dynamic", "moments"])
def test_errors_name_the_argument(ops, operation):
    call = getattr(ops, operation)
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16"):
        call(torch.zeros(2, 4, dtype=torch.int64), *([] if operation == "moments" else [clips(1, 1)]))
    x = torch.zeros(2, 4)
    if operation == "moments":
        with pytest.raises(ValueError, match="language_ids: expected a shape"):
            call(x, torch.zeros(3, dtype=torch.int32), 1)
    else:
        with pytest.raises(ValueError, match=r"expected shape \[num_entries, 2\]"):
            call(x, clips(1, 1), None, 2)


@given(rows=st.integers(1, 20), k=st.integers(1, 300), half_group=st.integers(0, 40), seed=st.integers(0, 1000))
@ANY_SHAPE
def check_any_shape(ops, rows, k, half_group, seed):
    group_size = 2 * half_group
    x = normal(rows, k, seed=seed)
    groups = reference.group_count(k, group_size)
    table = clips(4, groups, seed)
    language_ids = torch.randint(0, 4, (rows,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    codes, tail = ops.quantize(x, table, language_ids, group_size, tail_sums=True)
    assert_codes(codes, x, clip_per_element(table, language_ids, x, group_size))
    expected = reference.quantize(x, table, language_ids, group_size, tail_sums=True)[1]
    torch.testing.assert_close(tail, expected, rtol=1e-6, atol=0)
    codes, row_clips = ops.quantize_dynamic(x, table, language_ids, group_size)
    torch.testing.assert_close(
        row_clips, reference.quantize_dynamic(x, table, language_ids, group_size)[1], rtol=3e-6, atol=1e-9
    )
    assert_codes(codes, x, reference.per_element(row_clips, k, group_size))
    values = ops.dequantize(codes, row_clips, None, k=k, group_size=group_size, per_row=True, dtype=torch.float32)
    options = {"k": k, "group_size": group_size, "per_row": True}
    torch.testing.assert_close(values, reference.dequantize(codes, row_clips, **options), rtol=1e-6, atol=0)
    state, counts = ops.moments(x, language_ids, 4, True)
    expected, expected_counts = reference.moments(x, language_ids, 4, True)
    assert_moments(state, expected)
    assert torch.equal(counts, expected_counts)


def test_any_shape(ops):
    check_any_shape(ops)

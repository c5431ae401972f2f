"""Every operation and instruction set against the float64 reference."""

import re
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import _C, CODEBOOKS, DTYPES, assert_codes_match, available_isas, on_reference
from pairwise import pairwise

import la_aciq
from la_aciq import ops
from la_aciq.ops import reference
from la_aciq.ops.streaming import histogram_edges, histogram_sums

ISAS = available_isas()
KS = [1, 2, 17, 31, 64, 97, 576]
GROUP_SIZES = [None, 2, 32, 64, 128]
# Largest relative error of rounding to the type.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def group_count(k, group_size):
    return -(-k // group_size) if group_size else 1


def make_signs(k, generator):
    return torch.randint(0, 2, (k,), generator=generator).float() * 2 - 1


def make_x(lead, k, dtype, generator, bad=True):
    """Heavy-tailed values, with NaN, infinities, zeros and denormals among them."""
    x = torch.randn(*lead, k, generator=generator) / torch.rand(*lead, k, generator=generator).clamp(min=0.02)
    if bad and x.numel() >= 8:
        flat = x.view(-1)
        places = torch.randperm(flat.numel(), generator=generator)[:7]
        flat[places] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-41, -3e38])
    return x.to(dtype)


def per_element(table, language_ids, lead, k, group_size):
    clip = reference.clip_per_group(table, language_ids, torch.Size(lead))
    return reference.per_element(clip, k, group_size or 0)


LANGUAGES = {
    "none": None,
    "scalar": torch.tensor(1, dtype=torch.int32),
    "batch": torch.tensor([2, 0, 1], dtype=torch.int32),
    "batch, one": torch.tensor([[2], [0], [1]], dtype=torch.int32),
    "tokens": torch.tensor([[0, 1, 2, 1, 0]], dtype=torch.int32),
    "every row": torch.arange(15, dtype=torch.int32).reshape(3, 5) % 3,
    "transposed": (torch.arange(15, dtype=torch.int32).reshape(5, 3) % 3).T,
    "int64": torch.tensor([2, 0, 1]),
}


class TestQuantize:
    @pairwise(isa=ISAS, k=KS, dtype=DTYPES, codebook=CODEBOOKS)
    def test_codes_and_tail_sums(self, isa, k, dtype, codebook, generator):
        x = make_x((3, 5), k, dtype, generator)
        language_ids = LANGUAGES["batch"]
        for group_size in GROUP_SIZES:
            clips = torch.rand(3, group_count(k, group_size), generator=generator) * 3 + 0.5
            codes, tail = la_aciq.quantize(
                x, clips, language_ids, group_size=group_size, codebook=codebook, tail_sums=True
            )
            clip = per_element(clips, language_ids, (3, 5), k, group_size)
            assert_codes_match(codes, x.double(), clip, codebook)
            _, expected = on_reference(
                la_aciq.quantize, x, clips, language_ids, group_size=group_size, codebook=codebook, tail_sums=True
            )
            torch.testing.assert_close(tail, expected, rtol=1e-13, atol=0)

    @pytest.mark.parametrize("codebook", CODEBOOKS)
    def test_boundaries_are_exact(self, isa, codebook):
        """With Delta = 1 every product is exact: ties, both sides of every boundary, and saturation."""
        x = torch.cat([torch.arange(-12, 12, 0.5), torch.nextafter(torch.arange(-9.0, 9), torch.tensor(99.0))])
        x = torch.cat(
            [x, torch.nextafter(torch.arange(-9.0, 9), torch.tensor(-99.0)), torch.tensor([1e38, -1e38, 1e-45])]
        )
        codes = la_aciq.quantize(x, 7.5, codebook=codebook)
        assert_codes_match(codes, x.double(), torch.tensor(7.5).double(), codebook, tolerance=0.0)

    @pytest.mark.parametrize("codebook", CODEBOOKS)
    def test_values_that_are_not_numbers(self, isa, codebook):
        x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
        assert reference.unpack(la_aciq.quantize(x, 1.0, codebook=codebook), 4).tolist() == [8, 15, 0, 8]
        for clip in (0.0, -1.0, float("nan"), float("inf")):
            codes, tail = la_aciq.quantize(x.expand(2, 4), torch.full((1, 1), clip), codebook=codebook, tail_sums=True)
            assert codes.tolist() == [[0x88, 0x88]] * 2
            values = la_aciq.dequantize(codes, torch.full((1, 1), clip), k=4, codebook=codebook)
            assert torch.equal(values, torch.zeros(2, 4))
            assert tail[0, 0, 3] == 6
            assert tail[0, 0, 0] == 2
            assert tail[0, 0, 1] == (2 if clip < 0 else 0)  # |0| is beyond -1

    @pytest.mark.parametrize("name", list(LANGUAGES))
    def test_language_patterns(self, isa, name, generator):
        x = make_x((3, 5), 96, torch.float32, generator)
        clips = torch.rand(3, 3, generator=generator) + 0.5
        codes, tail = la_aciq.quantize(x, clips, LANGUAGES[name], group_size=32, tail_sums=True)
        assert_codes_match(codes, x.double(), per_element(clips, LANGUAGES[name], (3, 5), 96, 32), "midrise")
        _, expected = on_reference(la_aciq.quantize, x, clips, LANGUAGES[name], group_size=32, tail_sums=True)
        torch.testing.assert_close(tail, expected, rtol=1e-13, atol=0)

    def test_forms_of_the_table(self, generator):
        x = torch.randn(4, 64, generator=generator)
        language_ids = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
        full = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        expected = la_aciq.quantize(x, full, language_ids, group_size=32)
        assert torch.equal(la_aciq.quantize(x, full[:, 0], language_ids, group_size=32), expected)
        assert torch.equal(la_aciq.quantize(x, full.double(), language_ids, group_size=32), expected)
        assert torch.equal(la_aciq.quantize(x, full.T.contiguous().T, language_ids, group_size=32), expected)
        for number in (1.0, np.float32(1), torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)):
            assert torch.equal(la_aciq.quantize(x, number, group_size=32)[0], expected[0])

    @pairwise(
        isa=ISAS,
        shape=[(1, None), (12, None), (64, None), (96, 16), (576, None), (4096, None)],
        dtype=DTYPES,
    )
    def test_with_rotation(self, isa, shape, dtype, generator):
        k, block = shape
        x = make_x((6,), k, dtype, generator, bad=False)
        signs = make_signs(k, generator)
        rotated = reference.rotate(x.double(), signs, block or 0)
        clips = rotated.std().float().reshape(1, 1) * 2 + 0.1
        codes = la_aciq.quantize(x, clips, signs=signs, block_size=block)
        # Additions in float32: an error relative to the largest element of the row.
        tolerance = 8 * 2.0**-23 * max(float((rotated / clips).abs().max()) * 7.5, 1.0)
        assert_codes_match(codes, rotated, clips.double(), "midrise", tolerance)
        assert torch.equal(codes, la_aciq.quantize(x, clips, signs=signs.to(torch.int8), block_size=block))

    @settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        lead=st.lists(st.integers(0, 4), max_size=3),
        k=st.integers(1, 300),
        group=st.integers(0, 80).map(lambda n: 2 * n or None),
        codebook=st.sampled_from(CODEBOOKS),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**31),
    )
    def test_any_shape(self, lead, k, group, codebook, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        x = make_x(lead, k, dtype, generator)
        depth = int(torch.randint(0, len(lead) + 1, (1,), generator=generator))
        shape = [n if int(torch.randint(0, 3, (1,), generator=generator)) else 1 for n in lead[:depth]]
        language_ids = torch.randint(0, 4, shape, generator=generator, dtype=torch.int32)
        clips = torch.rand(4, group_count(k, group), generator=generator) * 2 + 0.2
        codes, tail = la_aciq.quantize(x, clips, language_ids, group_size=group, codebook=codebook, tail_sums=True)
        clip = per_element(clips, language_ids, lead, k, group)
        assert_codes_match(codes, x.double(), clip, codebook)
        values = la_aciq.dequantize(codes, clips, language_ids, k=k, group_size=group, codebook=codebook)
        expected = reference.to_values(reference.unpack(codes, k), clip, 4, codebook)
        torch.testing.assert_close(values.double(), expected, rtol=2.0**-22, atol=0)
        _, expected_tail = on_reference(
            la_aciq.quantize, x, clips, language_ids, group_size=group, codebook=codebook, tail_sums=True
        )
        torch.testing.assert_close(tail, expected_tail, rtol=1e-13, atol=0)
        state, histogram = ops.moments_state(x, language_ids, 4, histogram=True)
        expected_state, expected_histogram = reference.moments(x, language_ids, 4, True)
        assert torch.equal(histogram, expected_histogram)
        assert torch.equal(state[:, [0, 5, 6, 7]], expected_state[:, [0, 5, 6, 7]])


class TestQuantizeDynamic:
    @pairwise(isa=ISAS, k=KS, dtype=DTYPES, statistic=["rms", "absmax"])
    def test_scales_and_codes(self, isa, k, dtype, statistic, generator):
        x = make_x((3, 5), k, dtype, generator)
        language_ids = LANGUAGES["every row"]
        for group_size in GROUP_SIZES:
            for codebook in CODEBOOKS:
                clip_factor = torch.rand(3, group_count(k, group_size), generator=generator) + 0.5
                options = {"group_size": group_size, "statistic": statistic, "codebook": codebook}
                codes, row_clips = la_aciq.quantize_dynamic(x, clip_factor, language_ids, **options)
                _, expected = on_reference(la_aciq.quantize_dynamic, x, clip_factor, language_ids, **options)
                torch.testing.assert_close(row_clips, expected, rtol=2.0**-22, atol=0)
                clip = reference.per_element(row_clips.double(), k, group_size or 0)
                assert_codes_match(codes, x.double(), clip, codebook)

    def test_huge_tiny_and_zero_groups(self, isa):
        x = torch.tensor([[3e38, -3e38, 0.0, 0.0, 1e-40, 0.0, 1e-30, -1e-30]])
        codes, row_clips = la_aciq.quantize_dynamic(x, 1.0, group_size=2)
        torch.testing.assert_close(row_clips[0, :3], torch.tensor([3e38, 0.0, 1e-40 / 2**0.5]), rtol=1e-5, atol=1e-44)
        values = la_aciq.dequantize(codes, row_clips=row_clips, k=8, group_size=2)
        assert torch.equal(values[0, :4], torch.tensor([3e38, -3e38, 0.0, 0.0]))
        assert torch.isfinite(values).all()

    @pytest.mark.parametrize("statistic", ["rms", "absmax"])
    def test_with_rotation(self, isa, statistic, generator):
        x = make_x((7,), 576, torch.bfloat16, generator, bad=False)
        signs = make_signs(576, generator)
        rotated = reference.rotate(x.double(), signs)
        codes, row_clips = la_aciq.quantize_dynamic(x, 2.5, group_size=64, statistic=statistic, signs=signs)
        _, expected = reference.quantize_dynamic(x, torch.full((1, 9), 2.5), None, 64, statistic, signs=signs)
        torch.testing.assert_close(row_clips, expected, rtol=1e-5, atol=0)
        clip = reference.per_element(row_clips.double(), 576, 64)
        assert_codes_match(codes, rotated, clip, "midrise", tolerance=1e-4)


class TestDequantize:
    @pairwise(isa=ISAS, k=KS, dtype=DTYPES, codebook=CODEBOOKS)
    def test_values(self, isa, k, dtype, codebook, generator):
        codes = torch.randint(0, 256, (3, 5, (k + 1) // 2), generator=generator, dtype=torch.uint8)
        for group_size in GROUP_SIZES:
            groups = group_count(k, group_size)
            options = {"k": k, "group_size": group_size, "codebook": codebook, "dtype": dtype}
            clips = torch.rand(3, groups, generator=generator) * 100
            row_clips = torch.rand(3, 5, groups, generator=generator) * 1e-6
            for arguments in ({"clips": clips, "language_ids": LANGUAGES["batch"]}, {"row_clips": row_clips}):
                values = la_aciq.dequantize(codes, **arguments, **options)
                expected = on_reference(la_aciq.dequantize, codes, **arguments, **{**options, "dtype": torch.float32})
                assert values.dtype == dtype
                torch.testing.assert_close(values.float(), expected, rtol=2.0**-22 + ROUNDING[dtype], atol=2.0**-25)

    def test_ends_of_midrise_are_the_clip(self, isa):
        clips = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 9 + 1e-3
        codes = torch.tensor([[0xF0]], dtype=torch.uint8).expand(1000, 1)
        values = la_aciq.dequantize(codes, row_clips=clips.unsqueeze(1), k=2)
        assert torch.equal(values, torch.stack([-clips, clips], dim=1))

    def test_zero_of_midtread_is_zero(self, isa):
        codes = torch.tensor([[0x88]], dtype=torch.uint8)
        assert torch.equal(la_aciq.dequantize(codes, 3.7, k=2, codebook="midtread"), torch.zeros(1, 2))


class TestRotate:
    @pairwise(
        isa=ISAS,
        shape=[(1, None), (2, None), (12, 4), (48, None), (64, 8), (576, None), (1024, 32), (4096, None), (4096, 2048)],
        dtype=DTYPES,
    )
    def test_rotation(self, isa, shape, dtype, generator):
        k, block = shape
        x = make_x((3, 2), k, dtype, generator, bad=False)
        signs = make_signs(k, generator)
        expected = reference.rotate(x.double(), signs, block or 0)
        scale = expected.abs().max()
        y = la_aciq.rotate(x, signs, block)
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.double() / scale, expected / scale, rtol=0, atol=8 * ROUNDING[torch.float32] + ROUNDING[dtype]
        )
        if dtype == torch.float32:
            again = signs * la_aciq.rotate(y, torch.ones(k), block)
            torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4 * float(scale))

    def test_nan_stays_in_its_block(self, isa):
        x = torch.ones(2, 64)
        x[0, 5] = float("nan")
        x[1, 40] = float("inf")
        y = la_aciq.rotate(x.bfloat16(), torch.ones(64), 32)
        assert y[0, :32].isnan().all()
        assert y[0, 32:].isfinite().all()
        assert y[1, :32].isfinite().all()
        assert not y[1, 32:].isfinite().any()


class TestMoments:
    @pairwise(isa=ISAS, name=list(LANGUAGES), dtype=[*DTYPES, torch.float64])
    def test_states_and_histograms(self, isa, name, dtype, generator):
        x = make_x((3, 5), 700, torch.float32, generator).to(dtype) + 3
        state, histogram = ops.moments_state(x, LANGUAGES[name], 3, histogram=True)
        expected, expected_histogram = reference.moments(x, LANGUAGES[name], 3, True)
        assert torch.equal(histogram, expected_histogram)
        torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_groups_as_languages(self, isa, dtype, generator):
        """Statistics per row id and group, the way calibration asks for them."""
        x = torch.randn(200, 9, 64, generator=generator).to(dtype)
        row = torch.randint(0, 5, (200, 1), generator=generator)
        language_ids = (row * 9 + torch.arange(9)).int()
        state, histogram = ops.moments_state(x, language_ids, 45, histogram=True)
        expected, expected_histogram = reference.moments(x, language_ids, 45, True)
        torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(histogram, expected_histogram)

    def test_blocks_with_nothing_but_nan(self, isa):
        x = torch.full((5000,), float("nan"))
        x[3000:3003] = torch.tensor([1.0, 2.0, 4.0])
        state, _ = ops.moments_state(x)
        assert state[0, [0, 5, 6, 7]].tolist() == [3, 1, 4, 4997]
        assert state[0, 1].item() == pytest.approx(7 / 3)


class TestLinear:
    @pairwise(isa=ISAS, rows=[1, 2, 3, 7, 16, 40], dtype=DTYPES)
    def test_weights_alone(self, isa, rows, dtype, generator):
        for k, n, group_size in [(64, 5, None), (100, 7, 32), (97, 1, 64), (576, 96, 64), (7, 3, 2)]:
            for codebook in CODEBOOKS:
                x = torch.randn(rows, k, generator=generator).to(dtype)
                weight = torch.randint(0, 256, (n, (k + 1) // 2), generator=generator, dtype=torch.uint8)
                weight_clip = torch.rand(n, group_count(k, group_size), generator=generator)
                bias = torch.randn(n, generator=generator).to(dtype) if k % 2 else None
                options = {"group_size": group_size, "weight_codebook": codebook}
                y = la_aciq.linear(x, weight, weight_clip, bias, **options)
                dense = reference.dequantize(
                    weight,
                    weight_clip,
                    k=k,
                    group_size=group_size or 0,
                    codebook=codebook,
                    per_row=True,
                    dtype=torch.float64,
                )
                expected = torch.nn.functional.linear(x.double(), dense, None if bias is None else bias.double())
                bound = (x.double().abs() @ dense.abs().T) * 2.0**-22 + expected.abs() * ROUNDING[dtype] + 1e-30
                assert y.dtype == dtype
                assert ((y.double() - expected).abs() <= bound).all()

    @pairwise(isa=ISAS, rotated=[False, True], clip_kind=["static", "rms", "absmax"], bits=[8, 4], rows=[3, 40])
    def test_quantized_activations(self, isa, rotated, clip_kind, bits, rows, generator):
        for k, group_size, codebook in [(64, None, "midrise"), (96, 32, "midtread"), (576, 64, "midrise")]:
            x = torch.randn(2, rows, k, generator=generator)
            language_ids = torch.tensor([1, 0], dtype=torch.int32)
            signs = make_signs(k, generator) if rotated else None
            weight = torch.randint(0, 256, (11, k // 2), generator=generator, dtype=torch.uint8)
            weight_clip = torch.rand(11, group_count(k, 32), generator=generator)
            clip = torch.rand(2, group_count(k, group_size), generator=generator) + 1.5
            y = la_aciq.linear(
                x,
                weight,
                weight_clip,
                group_size=32,
                signs=signs,
                activation_bits=bits,
                activation_clip=clip_kind,
                clips=clip,
                language_ids=language_ids,
                activation_group_size=group_size,
                activation_codebook=codebook,
            )
            y_reference = reference.linear(
                x,
                weight,
                weight_clip,
                group_size=32,
                signs=signs,
                activation_bits=bits,
                activation_clip=clip_kind,
                clips=clip,
                language_ids=language_ids,
                activation_group_size=group_size or 0,
                activation_codebook=codebook,
            )
            # An activation on a boundary may take the neighbouring level, a step times a weight; few are on one.
            step = 2 * float(clip.max()) * float(x.abs().max() if clip_kind != "static" else 1) / (2**bits - 1)
            difference = (y - y_reference).abs()
            assert float(difference.max()) <= 1.1 * step + 1e-3
            assert float((difference > 2e-4).float().mean()) <= 0.05

    def test_activations_equal_dequantized_codes(self, isa, generator):
        """The rounding inside linear is that of quantize and dequantize, bit for bit."""
        k = 200
        x = torch.randn(5, k, generator=generator)
        clip = torch.rand(1, 4, generator=generator) + 1
        identity = torch.full((k, k), 8, dtype=torch.uint8)
        identity.fill_diagonal_(15)
        weight = reference.pack(identity)  # mid-tread: 0 off the diagonal, 7 Delta = 1 on it
        for codebook in CODEBOOKS:
            y = la_aciq.linear(
                x,
                weight,
                torch.full((k, 1), 15 / 14),
                weight_codebook="midtread",
                activation_bits=4,
                clips=clip,
                activation_group_size=64,
                activation_codebook=codebook,
            )
            codes = la_aciq.quantize(x, clip, group_size=64, codebook=codebook)
            values = la_aciq.dequantize(codes, clip, k=k, group_size=64, codebook=codebook)
            torch.testing.assert_close(y, values, rtol=2.0**-22, atol=0)


@pairwise(isa=ISAS, layout=["transposed", "sliced", "expanded", "offset", "permuted", "step"], dtype=DTYPES)
def test_strides_and_offsets(isa, layout, dtype, generator):
    base = torch.randn(6, 9, 66, generator=generator).to(dtype)
    x = {
        "transposed": lambda: torch.randn(66, 9, generator=generator).to(dtype).T,
        "sliced": lambda: base[1:5, ::2, 1:65],
        "expanded": lambda: base[:1, :, :64].expand(5, 9, 64),
        "offset": lambda: torch.randn(1 + 9 * 64, generator=generator).to(dtype)[1:].view(9, 64),
        "permuted": lambda: base.permute(1, 0, 2),
        "step": lambda: base[..., ::3],
    }[layout]()
    k = x.shape[-1]
    flat = x.contiguous().clone()
    signs = make_signs(k, generator)
    weight = torch.randint(0, 256, (5, (k + 1) // 2 + 1), generator=generator, dtype=torch.uint8)[:, 1:]
    for function in (
        lambda t: la_aciq.quantize(t, 1.5, group_size=32, tail_sums=True),
        lambda t: la_aciq.quantize_dynamic(t, 1.5, group_size=32),
        lambda t: (la_aciq.rotate(t, signs),),
        lambda t: ops.moments_state(t, histogram=True),
        lambda t: (la_aciq.linear(t, weight, torch.ones(1, 5).T),),
    ):
        for got, expected in zip(function(x), function(flat), strict=True):
            assert torch.equal(got, expected)
    codes = la_aciq.quantize(flat, 1.5)
    padded = torch.zeros(*codes.shape[:-1], codes.shape[-1] + 3, dtype=torch.uint8)
    padded[..., 1:-2] = codes
    assert torch.equal(
        la_aciq.dequantize(padded[..., 1:-2], 1.5, k=k, dtype=dtype), la_aciq.dequantize(codes, 1.5, k=k, dtype=dtype)
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("place", [0, 7, 99])
def test_signs_are_signs(backend, dtype, place):
    """A sign is kept as a bit: what is neither 1 nor -1 must be an error and not a guess."""
    if (reason := la_aciq.ops.backends.why_unavailable(backend)) is not None:
        pytest.skip(reason)
    signs = torch.ones(100, dtype=dtype)
    for other in (0, 2, -3, 126, -128, *((0.5, float("nan"), float("inf")) if dtype == torch.float32 else ())):
        signs[place] = other
        for call in (la_aciq.rotate, lambda x, signs: la_aciq.quantize(x, 1.0, signs=signs)):
            message = f"signs: expected nothing but 1 and -1, got .* at {place}"
            with la_aciq.use_backend(backend), pytest.raises(ValueError, match=message):
                call(torch.ones(2, 100), signs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element(isa, dtype):
    x = torch.tensor([[-0.75]], dtype=dtype)
    codes, tail = la_aciq.quantize(x, 0.5, tail_sums=True)
    assert codes.tolist() == [[0]]
    assert tail.tolist() == [[[1.0, 1.0, 0.75, 0.0]]]
    codes, row_clips = la_aciq.quantize_dynamic(x, 2.0)
    assert row_clips.tolist() == [[1.5]]
    assert codes.tolist() == [[4]]  # floor(-0.75 / 0.2) + 8
    torch.testing.assert_close(
        la_aciq.dequantize(codes, row_clips=row_clips, k=1, dtype=dtype), torch.tensor([[-0.7]], dtype=dtype)
    )
    assert torch.equal(la_aciq.rotate(x, -torch.ones(1)), -x)
    m = la_aciq.moments(x, histogram=True)
    assert (m.count, m.mean, m.variance, m.min, m.max) == (1, -0.75, 0.0, -0.75, -0.75)
    assert m.histogram[:, 0].sum() == 1


def test_negative_and_zero_strides(isa):
    """Strides that NumPy arrays have and tensors take over or have to copy."""
    base = np.random.default_rng(0).normal(size=(90, 70)).astype(np.float32)
    for view in (
        base[::-1, ::-1],
        base[:, ::-3],
        np.broadcast_to(base[:1], (50, 70)),
        np.broadcast_to(base[:, :1], (90, 33)),
    ):
        m, expected = la_aciq.moments(view), view.astype(np.longdouble)
        assert m.count == view.size
        np.testing.assert_allclose([m.mean, m.variance], [expected.mean(), expected.var()], rtol=1e-12)
        assert (m.min, m.max) == (view.min(), view.max())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_whatever_element_comes_first(isa, offset, dtype):
    """Powers are summed about the first element of a block; one far from all others must not cost digits."""
    x = (torch.randn(3 * 4096 + 77, generator=torch.Generator().manual_seed(1)) + offset).to(dtype)
    x[0], x[4096], x[8191] = -30000.0, 60000.0, 60000.0
    m, exact = la_aciq.moments(x), x.double().numpy().astype(np.longdouble)
    d = exact - exact.mean()
    assert m.mean == pytest.approx(float(exact.mean()), rel=1e-12)
    assert m.variance == pytest.approx(float((d**2).mean()), rel=1e-12)
    assert m.kurtosis == pytest.approx(float((d**4).mean() / (d**2).mean() ** 2 - 3), rel=1e-9)
    x[0], x[4096], x[8191] = x[1], x[2], float("nan")
    assert la_aciq.moments(x).nonfinite == 1


@pytest.mark.parametrize("num_entries", [1, 3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_histograms_of_many_elements(isa, dtype, num_entries, generator):
    """Enough elements to fill the counters before a histogram, and too many entries to have such counters."""
    x = torch.randn(150, 4099, generator=generator)
    x[:, ::7] = 1.5  # one bin
    x[3, :50], x[4, 7], x[5, 8] = float("nan"), float("inf"), 1e-30
    x, language_ids = x.to(dtype), (torch.arange(150) % num_entries).int()
    state, histogram = ops.moments_state(x, language_ids, num_entries, histogram=True)
    for row in range(min(num_entries, 3)):
        values = x[language_ids == row].double()
        magnitude = values[values.isfinite()].abs().numpy()
        counts, _ = np.histogram(magnitude, bins=histogram_edges())
        assert np.array_equal(histogram[row, :, 0].numpy(), counts)
        assert state[row, 0] == magnitude.size
        index = np.searchsorted(histogram_edges(), magnitude, side="right") - 1
        sums = np.bincount(index, weights=magnitude.astype(np.float32), minlength=258)
        np.testing.assert_allclose(histogram_sums(histogram[row].numpy())[1:-1], sums[1:-1], rtol=1e-6)


def test_denormals_are_not_slow(generator):
    """Within twenty times; where denormals are handled by microcode, all-denormal input costs a hundred times."""
    normal = torch.randn(64, 4096, generator=generator)
    denormal = normal * 1e-40
    signs, codes = torch.ones(4096), la_aciq.quantize(normal, 2.0)

    def seconds(operation, x):
        times = []
        for _ in range(15):
            start = time.perf_counter()
            operation(x)
            times.append(time.perf_counter() - start)
        return min(times)

    for operation in (
        lambda x: ops.moments_state(x, histogram=True),
        lambda x: la_aciq.quantize(x, float(x.abs().max()), tail_sums=True),
        lambda x: la_aciq.quantize_dynamic(x, 2.0, group_size=64),
        lambda x: la_aciq.rotate(x, signs),
        lambda x: la_aciq.dequantize(codes, float(x.abs().max()), k=4096),
    ):
        assert seconds(operation, denormal) < 20 * seconds(operation, normal)


def test_large_outputs_are_whole():
    """Beyond the size from which memory is asked for in huge pages, and not a multiple of one."""
    x = torch.randn(2100, 4097, generator=torch.Generator().manual_seed(2))
    codes, row_clips = la_aciq.quantize_dynamic(x, 2.5, group_size=64)
    values = la_aciq.dequantize(codes, row_clips=row_clips, k=4097, group_size=64)
    for rows in (slice(0, 3), slice(1040, 1060), slice(2097, 2100)):
        part_codes, part_clips = la_aciq.quantize_dynamic(x[rows].clone(), 2.5, group_size=64)
        assert torch.equal(codes[rows], part_codes)
        assert torch.equal(values[rows], la_aciq.dequantize(part_codes, row_clips=part_clips, k=4097, group_size=64))


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_no_rows(isa, lead):
    x = torch.zeros(*lead, 10)
    language_ids = torch.zeros(lead, dtype=torch.int32)
    codes, tail = la_aciq.quantize(x, 1.0, language_ids, group_size=4, tail_sums=True)
    assert codes.shape == (*lead, 5)
    assert torch.equal(tail, torch.zeros(1, 3, 4, dtype=torch.float64))
    codes, row_clips = la_aciq.quantize_dynamic(x, 1.0, language_ids, group_size=4)
    assert row_clips.shape == (*lead, 3)
    assert la_aciq.dequantize(codes, row_clips=row_clips, k=10, group_size=4).shape == (*lead, 10)
    assert la_aciq.rotate(x, torch.ones(10)).shape == x.shape
    weight = torch.zeros(3, 5, dtype=torch.uint8)
    assert la_aciq.linear(x, weight, torch.ones(3, 1), activation_bits=4, clips=1.0).shape == (*lead, 3)
    assert la_aciq.linear(torch.ones(2, 10), weight[:0], torch.ones(0, 1)).shape == (2, 0)
    assert la_aciq.moments(x, language_ids, 1).count.tolist() == [0]
    assert la_aciq.moments(torch.zeros(3, 0), histogram=True).histogram.sum() == 0


def test_ids_out_of_range(generator):
    x = torch.randn(3, 8, generator=generator)
    clips = torch.tensor([[1.0], [2.0]])
    for bad, shown in (([0, 2, 1], "2"), ([0, -1, 1], "-1")):
        ids = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(ValueError, match=f"language_ids: expected ids from 0 to 1, got {shown}"):
            la_aciq.quantize(x, clips, ids)
        with pytest.raises(ValueError, match=f"language_ids: expected ids from 0 to 1, got {shown}"):
            la_aciq.moments(x, ids, 2)
    ids = torch.tensor([5, -7, 1], dtype=torch.int32)
    safe = torch.tensor([0, 0, 1], dtype=torch.int32)
    for function in (torch.ops.la_aciq.quantize, reference.quantize):
        assert torch.equal(function(x, clips, ids)[0], la_aciq.quantize(x, clips, safe))
    for function in (torch.ops.la_aciq.moments, reference.moments):
        torch.testing.assert_close(function(x, ids, 2)[0], ops.moments_state(x, safe, 2)[0])


WEIGHT = torch.zeros(3, 4, dtype=torch.uint8)
SCALE = torch.ones(3, 1)
SIGNS = torch.ones(8)
ONES = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: la_aciq.quantize(torch.ones(2, 0), 1.0), ValueError, r"x: expected shape \[..., K\] with K >= 1"),
        (lambda: la_aciq.quantize(torch.tensor(1.0), 1.0), ValueError, r"x: expected shape"),
        (
            lambda: la_aciq.quantize(ONES.double(), 1.0),
            TypeError,
            "x: expected float32, bfloat16 or float16, got float64",
        ),
        (lambda: la_aciq.quantize(ONES, 1.0, group_size=3), ValueError, "group_size: expected an even number .* got 3"),
        (lambda: la_aciq.quantize(ONES, 1.0, group_size=-2), ValueError, "group_size: .* got -2"),
        (
            lambda: la_aciq.linear(ONES, WEIGHT, torch.ones(1, 1), activation_group_size=3),
            ValueError,
            "^activation_group_size: expected an even number .* got 3",
        ),
        (lambda: la_aciq.quantize(ONES, 1.0, codebook="nf4"), ValueError, "codebook: expected 'midrise' or 'midtread'"),
        (lambda: la_aciq.quantize(ONES, torch.ones(2, 3), group_size=4), ValueError, r"clips: .* \[num_entries, 2\]"),
        (lambda: la_aciq.quantize(ONES, torch.ones(2, dtype=torch.int32)), TypeError, "clips: expected a float32"),
        (
            lambda: la_aciq.quantize(ONES, 1.0, torch.ones(2)),
            TypeError,
            "language_ids: expected int32 or int64, got float32",
        ),
        (
            lambda: la_aciq.quantize(ONES, 1.0, torch.zeros(3, dtype=torch.int32)),
            ValueError,
            r"language_ids: .*\[2\].*\[3\]",
        ),
        (
            lambda: la_aciq.quantize(ONES, 1.0, signs=torch.ones(7)),
            ValueError,
            r"signs: expected shape \[8\], got \[7\]",
        ),
        (lambda: la_aciq.quantize(ONES, 1.0, block_size=4), ValueError, "block_size: has no meaning without signs"),
        (lambda: la_aciq.rotate(ONES, torch.ones(8), 3), ValueError, "block_size: .* divides K=8, got 3"),
        (lambda: la_aciq.rotate(ONES, torch.ones(8), 16), ValueError, "block_size: .* divides K=8, got 16"),
        (lambda: la_aciq.rotate(ONES, torch.ones(8).double()), TypeError, "signs: expected float32 or int8"),
        (lambda: la_aciq.quantize_dynamic(ONES, 1.0, statistic="std"), ValueError, "statistic: expected 'rms' or"),
        (lambda: la_aciq.dequantize(WEIGHT, 1.0, k=9), ValueError, r"codes: expected shape \[..., 5\] for k=9"),
        (lambda: la_aciq.dequantize(WEIGHT, k=8), ValueError, "clips, row_clips: expected exactly one"),
        (lambda: la_aciq.dequantize(WEIGHT.int(), 1.0, k=8), TypeError, "codes: expected uint8, got int32"),
        (lambda: la_aciq.dequantize(WEIGHT, 1.0, k=8, dtype=torch.float64), TypeError, "dtype: expected float32"),
        (
            lambda: la_aciq.dequantize(WEIGHT, row_clips=torch.ones(3, 2), k=8),
            ValueError,
            r"row_clips: expected shape \[3, 1\]",
        ),
        (lambda: la_aciq.linear(ONES, WEIGHT[:, 1:], torch.ones(3, 1)), ValueError, r"weight: expected shape \[N, 4\]"),
        (lambda: la_aciq.linear(ONES, WEIGHT, torch.ones(3)), ValueError, r"weight_clip: expected shape \[3, 1\]"),
        (
            lambda: la_aciq.linear(ONES, WEIGHT, torch.ones(3, 1), torch.ones(4)),
            ValueError,
            r"bias: expected shape \[3\]",
        ),
        (
            lambda: la_aciq.linear(ONES, WEIGHT, torch.ones(3, 1), activation_bits=5),
            ValueError,
            "activation_bits: .* 5",
        ),
        (lambda: la_aciq.linear(ONES, WEIGHT, torch.ones(3, 1), activation_bits=4), ValueError, "clips: .* got None"),
        (lambda: la_aciq.linear(ONES, WEIGHT, torch.ones(3, 1), activation_clip="max"), ValueError, "activation_clip:"),
        (lambda: la_aciq.quantize(ONES, torch.ones(1, 1, device="meta")), ValueError, "clips: expected on cpu like x"),
        (
            lambda: la_aciq.dequantize(WEIGHT, torch.ones(1, 1, device="meta"), k=8),
            ValueError,
            "clips: expected on cpu like codes",
        ),
        (
            lambda: la_aciq.dequantize(WEIGHT, row_clips=torch.ones(3, 1, device="meta"), k=8),
            ValueError,
            "row_clips: expected on cpu like codes",
        ),
        (
            lambda: la_aciq.dequantize(WEIGHT, 1.0, torch.zeros(4, dtype=torch.int32), k=8),
            ValueError,
            r"language_ids: .* dimensions \[3\] of codes .* got \[4\]",
        ),
        (
            lambda: la_aciq.linear(ONES, WEIGHT, SCALE, clips=1.0),
            ValueError,
            "clips: has no meaning with activation_bits=16",
        ),
        (
            lambda: la_aciq.linear(ONES, WEIGHT, SCALE, language_ids=torch.zeros(2, dtype=torch.int32)),
            ValueError,
            "language_ids: has no meaning with activation_bits=16",
        ),
        (
            lambda: la_aciq.moments([[1.0], [2.0, 3.0]]),
            TypeError,
            "x: expected a tensor or an array of real numbers: .* inhomogeneous",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: la_aciq.quantize(ONES.numpy(), 1.0), "x: expected a tensor, got numpy.ndarray"),
        (lambda: la_aciq.quantize(None, 1.0), "x: expected a tensor, got None"),
        (lambda: la_aciq.rotate([1.0], SIGNS), "x: expected a tensor, got list"),
        (lambda: la_aciq.linear("x", WEIGHT, SCALE), "x: expected a tensor, got 'x'"),
        (lambda: la_aciq.quantize_dynamic(1.5, 1.0), "x: expected a tensor, got 1.5"),
        (lambda: la_aciq.quantize(ONES, None), "clips: expected a tensor or a number, got None"),
        (lambda: la_aciq.quantize(ONES, [1.0]), "clips: expected a tensor or a number, got list"),
        (lambda: la_aciq.quantize(ONES, "1"), "clips: expected a tensor or a number, got '1'"),
        (lambda: la_aciq.quantize(ONES, np.ones((2, 1))), "clips: expected a tensor or a number, got numpy.ndarray"),
        (lambda: la_aciq.quantize_dynamic(ONES, None), "clip_factor: expected a tensor or a number, got None"),
        (
            lambda: la_aciq.quantize(ONES, 1.0, np.zeros(2, int)),
            "language_ids: expected a tensor or None, got numpy.nd",
        ),
        (lambda: la_aciq.quantize(ONES, 1.0, group_size=8.0), "group_size: expected an int or None, got 8.0"),
        (lambda: la_aciq.quantize(ONES, 1.0, group_size="8"), "group_size: expected an int or None, got '8'"),
        (lambda: la_aciq.quantize(ONES, 1.0, signs=[1] * 8), "signs: expected a tensor or None, got list"),
        (lambda: la_aciq.rotate(ONES, None), "signs: expected a tensor, got None"),
        (lambda: la_aciq.rotate(ONES, SIGNS, 4.0), "block_size: expected an int or None, got 4.0"),
        (lambda: la_aciq.dequantize(WEIGHT.numpy(), 1.0, k=8), "codes: expected a tensor, got numpy.ndarray"),
        (lambda: la_aciq.dequantize(WEIGHT, [1.0], k=8), "clips: expected a tensor or a number or None, got list"),
        (
            lambda: la_aciq.dequantize(WEIGHT, row_clips=np.ones((3, 1), np.float32), k=8),
            "row_clips: expected a tensor or None, got numpy.ndarray",
        ),
        (lambda: la_aciq.dequantize(WEIGHT, 1.0, k=None), "k: expected an int, got None"),
        (lambda: la_aciq.dequantize(WEIGHT, 1.0, k=8.0), "k: expected an int, got 8.0"),
        (
            lambda: la_aciq.dequantize(WEIGHT, 1.0, k=8, dtype="float32"),
            "dtype: expected a torch.dtype, got 'float32'",
        ),
        (lambda: la_aciq.linear(ONES, WEIGHT.numpy(), SCALE), "weight: expected a tensor, got numpy.ndarray"),
        (lambda: la_aciq.linear(ONES, WEIGHT, SCALE.numpy()), "weight_clip: expected a tensor, got numpy.ndarray"),
        (lambda: la_aciq.linear(ONES, WEIGHT, SCALE, [0.0] * 3), "bias: expected a tensor or None, got list"),
        (
            lambda: la_aciq.linear(ONES, WEIGHT, SCALE, activation_bits="8", clips=1.0),
            "activation_bits: expected an int, got '8'",
        ),
        (
            lambda: la_aciq.linear(ONES, WEIGHT, SCALE, activation_bits=8, clips=[1.0]),
            "clips: expected a tensor or a number or None, got list",
        ),
        (
            lambda: la_aciq.moments(ONES.numpy(), [0, 0], 2),
            "language_ids: expected a tensor or an array or None, got list",
        ),
        (
            lambda: la_aciq.moments(ONES, torch.zeros(2, dtype=torch.int32), 2.0),
            "num_entries: expected an int or None, got 2.0",
        ),
        (lambda: la_aciq.moments(ONES, None, "2"), "num_entries: expected an int or None, got '2'"),
        (lambda: la_aciq.repack_weight(None), "weight: expected a tensor, got None"),
        (lambda: la_aciq.restore_weight(la_aciq.repack_weight(WEIGHT), None, 8), "n: expected an int, got None"),
    ],
)
def test_errors_name_the_argument_of_another_type(call, message, backend):
    if (reason := la_aciq.ops.backends.why_unavailable(backend)) is not None:
        pytest.skip(reason)
    with la_aciq.use_backend(backend), pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        call()


@pytest.mark.skipif(_C is None, reason="the reference takes any number of bits")
def test_what_the_operator_refuses_is_named_as_well():
    with pytest.raises(TypeError, match=r"^activation_bits: expected an int, got 8\.0$"):
        la_aciq.linear(ONES, WEIGHT, SCALE, activation_bits=8.0, clips=1.0)


def test_other_errors_are_not_blamed_on_numbers_of_numpy():
    with pytest.raises(ValueError, match=r"group_size: expected an even number .* got 3"):
        la_aciq.quantize(ONES, np.float32(1), group_size=np.int64(3))
    with pytest.raises(ValueError, match="signs: expected shape"):
        la_aciq.quantize(ONES, np.float64(1), group_size=np.int32(4), signs=SIGNS[:2])


@pytest.mark.parametrize("clip", [float("nan"), float("inf"), 0.0, -1.0, 1e39, 1e-46])
def test_a_number_for_a_table_is_finite_and_positive_in_float32(clip):
    calls = {
        "clips": [
            lambda: la_aciq.quantize(ONES, clip),
            lambda: la_aciq.dequantize(WEIGHT, clip, k=8),
            lambda: la_aciq.linear(ONES, WEIGHT, torch.ones(3, 1), activation_bits=4, clips=clip),
        ],
        "clip_factor": [lambda: la_aciq.quantize_dynamic(ONES, clip)],
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(ValueError, match=f"{name}: expected a finite and positive number"):
                function()


@pytest.mark.skipif(_C is None, reason="needs the compiled core")
def test_the_operator_itself_checks_a_weight_without_dimensions():
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, 4\] for K=8, got \[\]"):
        torch.ops.la_aciq.linear(ONES, torch.tensor(3, dtype=torch.uint8), torch.ones(1, 1))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    x = torch.zeros(2**20 + 1, 2**11, dtype=torch.bfloat16)
    x[-1] = 3.0
    codes = la_aciq.quantize(x, 1.0)
    assert torch.equal(codes[-1], torch.full((1024,), 0xFF, dtype=torch.uint8))
    assert torch.equal(codes[-2], torch.full((1024,), 0x88, dtype=torch.uint8))
    m = la_aciq.moments(x, histogram=True)
    assert m.count == x.numel()
    assert m.max == 3.0
    assert m.histogram[:, 0].sum() == x.numel()
    del x
    assert torch.equal(la_aciq.dequantize(codes, 1.0, k=2048, dtype=torch.bfloat16)[-1], torch.ones(2048).bfloat16())

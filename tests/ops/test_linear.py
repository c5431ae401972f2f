"""INT4 linear layers: codes are multiplied as integers, exactly, and what is left to floats is as good as PyTorch's."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from op_helpers import _C, CODEBOOKS, DTYPES, available_isas
from pairwise import pairwise

import la_aciq
from la_aciq.ops import reference

ISAS = available_isas()
LAYOUTS = ["portable", "repacked"]
MATRICES = [
    (layout, k, n, group_size)
    for layout in LAYOUTS
    for k, n, group_size in [(100, 7, 32), (576, 70, 64), (1030, 17, None), (97, 33, 8), (96, 33, 2)]
    if layout == "portable" or group_size != 2
]


def groups_of(k, size):
    return 1 if size is None else -(-k // size)


def in_layout(layout, weight):
    return la_aciq.repack_weight(weight) if layout == "repacked" else weight


def error_of_float32_sums(x, weight):
    """How far float32 sums of the products of x [M, K] and weight [N, K] may be from the exact ones, float64 [M, N].

    K roundings of 2^-24 add up to no more than lambda sqrt(K) 2^-24 of the sum of magnitudes, in any order, but for a
    chance of 2 exp(-lambda^2 / 2) (Higham and Mary 2019), 3e-8 here. Four more roundings are those of the clips.
    """
    return 6 * (x.shape[1] + 4) ** 0.5 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)


def whole_eights(k, *group_sizes):
    """Whether repacked weights can have these groups."""
    return all(size is None or size >= k or size % 8 == 0 for size in group_sizes)


def powers_per_member(powers, k, size):
    """int64 [..., k] of powers of two [..., groups]."""
    return np.repeat(powers, size or k, axis=-1)[..., :k]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 13, 200]),
    k=st.one_of(st.integers(1, 40), st.sampled_from([97, 100, 128, 130, 256, 300, 576])),
    n=st.one_of(st.integers(1, 9), st.sampled_from([16, 63, 64, 65, 130])),
    weight_group=st.sampled_from([None, 2, 8, 24, 32, 64, 96]),
    activation_group=st.sampled_from([None, 2, 16, 40, 64]),
    bits=st.sampled_from([4, 8]),
    weight_codebook=st.sampled_from(CODEBOOKS),
    activation_codebook=st.sampled_from(CODEBOOKS),
    with_bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**32 - 1),
)
def test_integers_are_exact(
    isa, rows, k, n, weight_group, activation_group, bits, weight_codebook, activation_codebook, with_bias, layout, seed
):
    """x and the weights lie on their levels, which are integers times powers of two, so the result is an integer that
    int64 arithmetic knows; rounding the result undoes the few float32 roundings of the clips."""
    assume(layout == "portable" or whole_eights(k, weight_group, activation_group))
    rng = np.random.default_rng(seed)
    levels = 2**bits
    zero = levels - (activation_codebook == "midrise")
    num_entries = 3
    clip_powers = 2 ** rng.integers(0, 2, (num_entries, groups_of(k, activation_group)))
    weight_powers = 2 ** rng.integers(0, 2, (n, groups_of(k, weight_group)))
    language_ids = rng.integers(0, num_entries, rows).astype(np.int32)
    x = (2 * rng.integers(0, levels, (rows, k)) - zero) * powers_per_member(clip_powers, k, activation_group)[
        language_ids
    ]
    codes = rng.integers(0, 16, (n, k))
    weight = (2 * codes - (15 if weight_codebook == "midrise" else 16)) * powers_per_member(
        weight_powers, k, weight_group
    )
    bias = rng.integers(-100, 100, n) if with_bias else np.zeros(n, dtype=np.int64)
    expected = x @ weight.T + bias

    y = la_aciq.linear(
        torch.from_numpy(x).float(),
        in_layout(layout, reference.pack(torch.from_numpy(codes))),
        torch.from_numpy(15.0 * weight_powers).float(),
        torch.from_numpy(bias).float() if with_bias else None,
        group_size=weight_group,
        weight_codebook=weight_codebook,
        activation_bits=bits,
        clips=torch.from_numpy((levels - 1.0) * clip_powers).float(),
        language_ids=torch.from_numpy(language_ids),
        activation_group_size=activation_group,
        activation_codebook=activation_codebook,
    )
    assert np.array_equal(np.rint(y.double().numpy()), expected)


@pairwise(isa=ISAS, rows=[1, 4, 6, 33], matrix=MATRICES)
def test_floats_are_as_good_as_float32_sums(isa, rows, matrix, generator):
    layout, k, n, group_size = matrix
    x = torch.randn(rows, k, generator=generator)
    weight = torch.randint(0, 256, (n, (k + 1) // 2), generator=generator, dtype=torch.uint8)
    weight_clip = torch.rand(n, groups_of(k, group_size), generator=generator)
    dense = reference.dequantize(
        weight, weight_clip, k=k, group_size=group_size or 0, per_row=True, dtype=torch.float64
    )
    y = la_aciq.linear(x, in_layout(layout, weight), weight_clip, group_size=group_size)
    assert ((y.double() - x.double() @ dense.T).abs() <= error_of_float32_sums(x, dense)).all()


@pairwise(isa=ISAS, rows=[1, 2, 4, 5, 33], matrix=MATRICES, codebook=CODEBOOKS)
def test_bfloat16_is_a_float32_sum_rounded_once(isa, rows, matrix, codebook, generator):
    """An element is the bfloat16 nearest to a number that is as near to the exact one as float32 sums are."""
    layout, k, n, group_size = matrix
    x = torch.randn(rows, k, generator=generator).bfloat16()
    weight = torch.randint(0, 256, (n, (k + 1) // 2), generator=generator, dtype=torch.uint8)
    weight_clip = torch.rand(n, groups_of(k, group_size), generator=generator)
    options = {"k": k, "group_size": group_size or 0, "codebook": codebook, "per_row": True}
    dense = reference.dequantize(weight, weight_clip, dtype=torch.float64, **options)
    exact = x.double() @ dense.T
    allowed = error_of_float32_sums(x, dense)
    y = la_aciq.linear(x, in_layout(layout, weight), weight_clip, group_size=group_size, weight_codebook=codebook)
    assert y.dtype == torch.bfloat16
    assert ((exact - allowed).bfloat16() <= y).all()
    assert (y <= (exact + allowed).bfloat16()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [3, 20])
def test_bfloat16_that_is_not_finite_stays_in_its_row(isa, rows, layout, generator):
    x = torch.randn(rows, 192, generator=generator).bfloat16()
    x[0, 5], x[1, 100] = float("nan"), float("inf")
    weight = in_layout(layout, torch.randint(0, 256, (21, 96), generator=generator, dtype=torch.uint8))
    y = la_aciq.linear(x, weight, torch.rand(21, 3, generator=generator) + 0.5, group_size=64)
    assert y[0].isnan().all()
    assert y[1].isinf().all()
    assert y[2:].isfinite().all()


@pairwise(
    isa=ISAS,
    narrow=[(torch.float16, 16), *((dtype, bits) for dtype in DTYPES[1:] for bits in (4, 8))],
    rows=[3, 20],
    layout=LAYOUTS,
)
def test_narrow_types_are_rounded_once(isa, narrow, rows, layout, generator):
    dtype, bits = narrow
    x = torch.randn(rows, 200, generator=generator).to(dtype)
    weight = in_layout(layout, torch.randint(0, 256, (21, 100), generator=generator, dtype=torch.uint8))
    options = {"group_size": 64, "activation_bits": bits, "clips": 2.5 if bits < 16 else None}
    weight_clip = torch.rand(21, 4, generator=generator)
    y = la_aciq.linear(x, weight, weight_clip, **options)
    assert torch.equal(y, la_aciq.linear(x.float(), weight, weight_clip, **options).to(dtype))


@pairwise(isa=ISAS, bits=[8, 16], rows=[2, 20], layout=LAYOUTS)
def test_groups_without_a_clip_are_zero(isa, bits, rows, layout, generator):
    x = torch.randn(rows, 128, generator=generator)
    weight = in_layout(layout, torch.randint(0, 256, (5, 64), generator=generator, dtype=torch.uint8))
    weight_clip = torch.tensor([0.0, -1.0, float("nan"), float("inf"), 1.0]).unsqueeze(1).repeat(1, 2)
    y = la_aciq.linear(x, weight, weight_clip, group_size=64, activation_bits=bits, clips=2.0 if bits < 16 else None)
    assert (y[:, :4] == 0).all()
    assert (y[:, 4] != 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1024, 333])
def test_threads_and_neighbours_change_nothing(isa, layout, k, generator):
    """To the last bit, whichever kernel takes so many rows."""
    x = torch.randn(230, k, generator=generator)
    weight = torch.randint(0, 256, (333, (k + 1) // 2), generator=generator, dtype=torch.uint8)
    own, weight_clip = in_layout(layout, weight), torch.rand(333, groups_of(k, 24), generator=generator)
    before = torch.get_num_threads()
    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"activation_bits": 8, "clips": 3.0, "activation_group_size": 64}),
    ):
        rows, options = x.to(dtype), {"group_size": 24, **options}
        expected = la_aciq.linear(rows, weight, weight_clip, **options)
        try:
            for threads, count in itertools.product((1, 2, 3), (1, 2, 3, 4, 5, 7, 16, 230)):
                torch.set_num_threads(threads)
                assert torch.equal(la_aciq.linear(rows[:count], own, weight_clip, **options), expected[:count])
        finally:
            torch.set_num_threads(before)


@pytest.mark.skipif(la_aciq.ops.backends.WHY_NO_CORE is not None, reason="the schema is the compiled core's")
def test_defaults_that_are_not_handed_over_are_the_operators():
    schema = torch.ops.la_aciq.linear.default._schema
    defaults = {
        argument.name: argument.default_value for argument in schema.arguments if argument.type.kind() != "OptionalType"
    }
    defaults = {name: value for name, value in defaults.items() if value is not None}
    assert len(defaults) == 7
    assert la_aciq.ops.linear_options(**defaults) == {}
    changed = dict.fromkeys(defaults, 2)
    assert la_aciq.ops.linear_options(**changed) == changed


@given(n=st.integers(0, 70), k=st.integers(1, 90), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_repacked_codes_are_where_they_are_said_to_be(n, k, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (n, k))
    weight = reference.pack(torch.from_numpy(codes))
    repacked = la_aciq.repack_weight(weight)
    panels, eights = -(-n // 16), -(-k // 8)
    assert repacked.dtype == torch.int32
    assert repacked.is_contiguous()
    assert repacked.shape == (panels, eights, 16)
    lanes = repacked.numpy().view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
    padded = np.zeros((16 * panels, 8 * eights), dtype=np.uint32)
    padded[:n, :k] = codes
    assert np.array_equal(lanes.transpose(0, 2, 1, 3).reshape(padded.shape), padded)
    assert torch.equal(la_aciq.restore_weight(repacked, n, k), weight)


@pairwise(bits=[16, 8, 4], dtype=DTYPES, rows=[1, 3, 40], backend=["cpu", "reference"])
def test_repacked_weights_give_what_portable_ones_give(bits, dtype, rows, backend, generator):
    """With everything: odd shapes, languages, rotation, bias, both codebooks."""
    k, n, num_entries = 200, 37, 3
    x = torch.randn(rows, k, generator=generator).to(dtype)
    weight = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    weight_clip, bias = torch.rand(n, 4, generator=generator) + 0.1, torch.randn(n, generator=generator)
    options = {
        "group_size": 64,
        "weight_codebook": "midtread",
        "signs": torch.randint(0, 2, (k,), generator=generator).float() * 2 - 1,
        "activation_bits": bits,
    }
    if bits < 16:
        options |= {
            "clips": torch.rand(num_entries, 9, generator=generator) + 1,
            "language_ids": torch.arange(rows, dtype=torch.int32) % num_entries,
            "activation_group_size": 24,
            "activation_clip": "rms",
        }
    with la_aciq.use_backend("reference"):
        expected = la_aciq.linear(x, weight, weight_clip, bias, **options)
    with la_aciq.use_backend(backend):
        y = la_aciq.linear(x, la_aciq.repack_weight(weight), weight_clip, bias, **options)
    assert y.dtype == dtype
    if backend == "reference":
        assert torch.equal(y, expected)
    else:
        with la_aciq.use_backend(backend):
            portable = la_aciq.linear(x, weight, weight_clip, bias, **options)
        tolerance = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(y, portable, rtol=tolerance, atol=tolerance * 10)


def test_repacked_weights_that_do_not_fit_are_refused(generator):
    x, weight_clip = torch.randn(2, 40, generator=generator), torch.ones(20, 2)
    repacked = la_aciq.repack_weight(torch.zeros(20, 20, dtype=torch.uint8))
    la_aciq.linear(x, repacked, weight_clip, group_size=32)
    with pytest.raises(ValueError, match=r"weight: expected shape \[2, 5, 16\] .* for N=20, K=40, got \[3, 5, 16\]"):
        la_aciq.linear(x, torch.zeros(3, 5, 16, dtype=torch.int32), weight_clip, group_size=32)
    with pytest.raises(ValueError, match=r"group_size: expected a multiple of 8 .*, got 20"):
        la_aciq.linear(x, repacked, weight_clip, group_size=20)
    with pytest.raises(ValueError, match=r"activation_group_size: expected a multiple of 8 .*, got 10"):
        la_aciq.linear(
            x, repacked, weight_clip, group_size=32, activation_bits=8, clips=torch.ones(1, 4), activation_group_size=10
        )
    for refused, options in (
        (torch.zeros(3, 5, 16, dtype=torch.int32), {"group_size": 32}),
        (repacked, {"group_size": 20}),
        (repacked, {"group_size": 32, "activation_bits": 8, "clips": torch.ones(1, 4), "activation_group_size": 10}),
    ):
        if _C is not None:  # what does not come through Python's checks
            with pytest.raises(ValueError, match="expected"):
                torch.ops.la_aciq.linear(x, refused, weight_clip, **options)
    with pytest.raises(TypeError, match="weight: expected uint8 codes, got int32"):
        la_aciq.repack_weight(repacked)
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, ceil\(K / 2\)\]"):
        la_aciq.repack_weight(torch.zeros(20, dtype=torch.uint8))
    with pytest.raises(TypeError, match="repacked: expected int32, got uint8"):
        la_aciq.restore_weight(torch.zeros(20, 20, dtype=torch.uint8), 20, 40)
    with pytest.raises(ValueError, match=r"repacked: expected shape \[2, 6, 16\] for n=20, k=41, got \[2, 5, 16\]"):
        la_aciq.restore_weight(repacked, 20, 41)

"""Weights rounded with error feedback: the kernels against the float64 definition, and that against linear algebra."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from op_helpers import _C, CODEBOOKS, DTYPES, on_reference

from la_aciq import ops
from la_aciq.nn.weights import Rounding
from la_aciq.ops import fakes, reference

CPU = torch.device("cpu")
needs_core = pytest.mark.skipif(_C is None, reason="needs the compiled core")


def second_moments(k, seed=0):
    """Of correlated inputs, float64 [K, K]; one input dwarfs the others, as the first token's do."""
    random = np.random.default_rng(seed)
    rank, tokens = max(k // 3, 1), 3 * k + 2
    x = random.standard_normal((tokens, rank)) @ random.standard_normal((rank, k))
    x += 0.3 * random.standard_normal((tokens, k))
    x[0] *= 100
    return torch.from_numpy(x.T @ x)


def problem(n, k, seed=0, dtype=torch.float32):
    """A weight [n, k], damped second moments and their factor, as `quantize_weight` hands them over."""
    weight = torch.from_numpy(np.random.default_rng([seed, n]).standard_t(5, (n, k)) / np.sqrt(k)).to(dtype)
    return weight, *Rounding(second_moments(k, seed)).factors(CPU)


def values_of(codes, clips, k, group_size, codebook):
    return reference.dequantize(
        codes, clips, k=k, group_size=group_size, codebook=codebook, per_row=True, dtype=torch.float64
    )


def output_error(weight, codes, clips, h, group_size, codebook):
    """(w - q) H (w - q)^T by row, float64 [N]."""
    difference = weight.double() - values_of(codes, clips, weight.shape[1], group_size, codebook)
    return ((difference @ h.double()) * difference).sum(1)


def nearest_error(weight, clips, h, group_size, codebook):
    """`output_error` of rounding to nearest under the same clips, float64 [N]."""
    clip = reference.per_element(clips.double(), weight.shape[1], group_size)
    codes = reference.pack(reference.to_codes(weight.double(), clip, 4, codebook))
    return output_error(weight, codes, clips, h, group_size, codebook)


def assert_rounded_alike(result, expected, weight, h, group_size, codebook):
    """Both are roundings of the same weights, which may part where a weight lies between two codes.

    A row that has parted rounds other weights from there on, and is about as good.
    """
    (codes, clips), (right_codes, right_clips) = result, expected
    assert codes.shape == right_codes.shape
    assert clips.shape == right_clips.shape
    if weight.shape[1] % 2:
        assert (codes[:, -1] < 16).all()
    alike = (codes == right_codes).all(1) & torch.isclose(clips, right_clips, rtol=1e-3, atol=0).all(1)
    # In mid-tread, a step of a 7.5th of the largest weight, where that is negative, is always tried, and a tie. Weights
    # of half precision are often multiples of each other, which makes ties of other steps too.
    assert (~alike).sum() <= (2 + 0.2 * len(alike) if codebook == "midrise" else 3 + 0.5 * len(alike))
    error, right_error = (output_error(weight, *pair, h, group_size, codebook) for pair in (result, expected))
    plain, right_plain = (nearest_error(weight, pair[1], h, group_size, codebook) for pair in (result, expected))
    assert (error <= 3 * right_error + 2 * plain + 1e-12).all()
    assert (right_error <= 3 * error + 2 * right_plain + 1e-12).all()


# --- The definition ---------------------------------------------------------------------------------------------------


def rounded_by_least_squares(weight, h, group, half):
    """One row by the words of rounding.py, with H and least squares in place of factors: levels [K], steps [groups],
    and whether some weight that was tried lay between two codes."""
    k, tie = len(weight), False

    def nearest_codes(x, step, half):
        nonlocal tie
        t = x / step - half
        tie |= bool(np.any((np.abs(t - np.floor(t) - 0.5) < 1e-8) & (t > -8) & (t < 7)))
        return np.clip(np.rint(t), -8, 7) + half

    current, levels, steps = weight.copy(), np.zeros(k), []
    for first in range(0, k, group):
        last = min(first + group, k)
        now, later = np.arange(first, last), np.arange(last, k)
        # What is left of the group's errors once the later columns have taken over what they can.
        left = h[np.ix_(now, now)]
        if len(later):
            left = left - h[np.ix_(now, later)] @ np.linalg.solve(h[np.ix_(later, later)], h[np.ix_(later, now)])
        largest = np.abs(current[now]).max() / 7.5

        def error_of(share, now=now, left=left, largest=largest):
            step = share * largest
            e = current[now] - nearest_codes(current[now], step, half) * step
            return e @ left @ e

        best = min((0.44 + 0.04 * i for i in range(15)), key=error_of)
        step = min((best, best - 0.02, best + 0.02), key=error_of) * largest
        steps.append(step)
        for j in now:
            levels[j] = nearest_codes(current[j], step, half)
            error, rest = levels[j] * step - current[j], np.arange(j + 1, k)
            current[j] = levels[j] * step
            if len(rest):  # the change of the rest with the least error, given that of column j
                current[rest] -= np.linalg.solve(h[np.ix_(rest, rest)], h[rest, j]) * error
    values = levels * np.repeat(steps, group)[:k]
    for i, first in enumerate(range(0, k, group)):
        now = np.arange(first, min(first + group, k))
        gradient = h[now] @ (weight - values)
        ratio = 1 + levels[now] @ gradient / (levels[now] @ h[np.ix_(now, now)] @ levels[now] * steps[i])
        if 0.7 < ratio < 1.4:
            steps[i] *= ratio
        values[now] = levels[now] * steps[i]
        for j in now:
            best = values[j] + h[j] @ (weight - values) / h[j, j]
            levels[j] = nearest_codes(best, steps[i], half)
            values[j] = levels[j] * steps[i]
    return levels, np.array(steps), tie


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("k", "group"), [(24, 8), (19, 6), (17, 0), (2, 2), (1, 0)])
def test_the_definition_is_that_of_least_squares(k, group, codebook):
    weight, h, _ = problem(40, k)
    # The factor of exactly this H: the definition reads both.
    u = torch.linalg.cholesky(torch.linalg.inv(h.double()), upper=True)
    codes, clips = reference.round_weights(weight, h.double(), u, group, codebook)
    half = 0.5 if codebook == "midrise" else 0.0
    compared = 0
    for row in range(40):
        levels, steps, tie = rounded_by_least_squares(
            weight[row].double().numpy(), h.double().numpy(), group or k, half
        )
        # A step of a 7.5th of a weight that is negative is always tried, and a tie in mid-tread.
        if tie:
            continue
        compared += 1
        assert reference.unpack(codes[row], k).tolist() == [int(level - half + 8) for level in levels]
        np.testing.assert_allclose(clips[row].numpy(), 7.5 * steps, rtol=1e-6)
    assert compared >= (40 if codebook == "midrise" else 2)


# --- The kernels ------------------------------------------------------------------------------------------------------


@needs_core
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(50, 96, 32), (70, 256, 64), (40, 200, 16), (45, 131, 130), (33, 300, 0), (40, 520, 200), (40, 384, 256)],
)
def test_the_kernels_round_as_the_definition(isa, n, k, group, codebook):
    arguments = problem(n, k)
    result = ops.round_weights(*arguments, group_size=group, codebook=codebook)
    expected = on_reference(ops.round_weights, *arguments, group_size=group, codebook=codebook)
    assert_rounded_alike(result, expected, *arguments[:2], group, codebook)


@needs_core
@pytest.mark.parametrize(("k", "group"), [(256, 64), (320, 0)])
def test_the_error_of_the_output_is_that_of_the_definition(isa, k, group):
    weight, h, u = problem(300, k)
    result = ops.round_weights(weight, h, u, group_size=group)
    expected = on_reference(ops.round_weights, weight, h, u, group_size=group)
    assert (result[0] == expected[0]).all(1).double().mean() >= 0.98
    error, right_error = (output_error(weight, *pair, h, group, "midrise").sum() for pair in (result, expected))
    torch.testing.assert_close(error, right_error, rtol=1e-3, atol=0)


def strided(weight, kind):
    """The same weight in other memory."""
    n, k = weight.shape
    if kind == "columns":
        return weight.T.contiguous().T
    if kind == "part":
        larger = torch.full((n + 2, 2 * k + 3), torch.nan, dtype=weight.dtype)
        larger[1 : n + 1, 3::2] = weight
        return larger[1 : n + 1, 3::2]
    return weight


@needs_core
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 150),
    group=st.one_of(st.just(0), st.integers(1, 90).map(lambda half: 2 * half)),
    codebook=st.sampled_from(CODEBOOKS),
    dtype=st.sampled_from(DTYPES),
    memory=st.sampled_from(["own", "columns", "part"]),
    seed=st.integers(0, 1000),
)
@example(n=1, k=1, group=2, codebook="midrise", dtype=torch.float32, memory="own", seed=0)
@example(n=0, k=33, group=16, codebook="midtread", dtype=torch.bfloat16, memory="part", seed=0)
@example(n=17, k=1, group=0, codebook="midrise", dtype=torch.float16, memory="columns", seed=0)
def test_every_shape(isa, n, k, group, codebook, dtype, memory, seed):
    weight, h, u = problem(n, k, seed, dtype)
    if codebook == "midtread":
        weight = weight.abs()  # few ties, see `assert_rounded_alike`
    settings = {"group_size": group, "codebook": codebook}
    result = ops.round_weights(strided(weight, memory), strided(h, memory), strided(u, memory), **settings)
    expected = on_reference(ops.round_weights, weight, h, u, **settings)
    assert result[0].dtype == torch.uint8
    assert result[1].dtype == torch.float32
    assert_rounded_alike(result, expected, weight, h, group, codebook)


@needs_core
def test_what_is_below_the_diagonal_of_the_factor_is_not_read(isa):
    weight, h, u = problem(20, 140)
    expected = ops.round_weights(weight, h, u, group_size=64)
    below = u + torch.full_like(u, torch.nan).tril(-1).nan_to_num(nan=1e30)
    for got, right in zip(ops.round_weights(weight, h, below, group_size=64), expected, strict=True):
        assert torch.equal(got, right)


@needs_core
@pytest.mark.parametrize(("n", "k", "group"), [(300, 72, 16), (150, 200, 0)])
def test_a_row_depends_on_nothing_but_itself(isa, n, k, group):
    weight, h, u = problem(n, k)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        codes, clips = ops.round_weights(weight, h, u, group_size=group)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            more_codes, more_clips = ops.round_weights(weight, h, u, group_size=group)
            assert torch.equal(codes, more_codes)
            assert torch.equal(clips, more_clips)
    finally:
        torch.set_num_threads(before)
    for rows in (slice(0, 1), slice(37, 38), slice(n - 1, n), slice(20, 85)):
        some_codes, some_clips = ops.round_weights(weight[rows], h, u, group_size=group)
        assert torch.equal(codes[rows], some_codes)
        assert torch.equal(clips[rows], some_clips)


@needs_core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(isa, dtype):
    weight, h, u = problem(19, 50, dtype=dtype)
    for got, expected in zip(
        ops.round_weights(weight, h, u, group_size=16),
        ops.round_weights(weight.float(), h, u, group_size=16),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@needs_core
def test_a_row_with_values_that_are_not_finite_leaves_the_others_alone(isa, bad):
    weight, h, u = problem(40, 70)
    codes, clips = ops.round_weights(weight, h, u, group_size=32)
    broken = weight.clone()
    broken[17, 33] = bad
    other_codes, other_clips = ops.round_weights(broken, h, u, group_size=32)
    rest = torch.arange(40) != 17
    assert torch.equal(codes[rest], other_codes[rest])
    assert torch.equal(clips[rest], other_clips[rest])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zeros_and_denormals(isa, backend):
    weight, *_ = problem(20, 64)
    weight[3] = 0
    weight[5, 16:32] = 0
    weight[7] *= 1e-39
    weight[8] = 1e-45
    with ops.use_backend(backend):
        codes, clips = ops.round_weights(weight, torch.eye(64), torch.eye(64), group_size=16)
    values = values_of(codes, clips, 64, 16, "midrise")
    assert (clips[3] == 0).all()
    assert (reference.unpack(codes[3], 64) == 8).all()
    assert clips[5, 1] == 0
    assert (reference.unpack(codes[5], 64)[16:32] == 8).all()
    assert (clips[5, [0, 2, 3]] > 0).all()
    assert torch.isfinite(values).all()
    # Steps that small have no inverse in float32: what is kept of such weights is that they are tiny.
    assert (values[7].abs() <= 1e-37).all()
    assert (values[8].abs() <= 1e-44).all()


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_group_of_zeros_stays_zero_whatever_the_errors_of_the_others(isa, backend, codebook):
    weight, h, u = problem(20, 64)
    weight[:, :16] = 0
    with ops.use_backend(backend):
        codes, clips = ops.round_weights(weight, h, u, group_size=16, codebook=codebook)
    assert (clips[:, 0] == 0).all()
    assert (clips[:, 1:] > 0).all()
    assert (reference.unpack(codes, 64)[:, :16] == 8).all()


@needs_core
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-30, 2.0**40, 2.0**100])
def test_the_scale_of_the_weights_does_not_matter(isa, scale):
    weight, h, u = problem(20, 64)
    codes, clips = ops.round_weights(weight, h, u, group_size=16)
    for factor in (1.0, scale):
        scaled = ops.round_weights(weight * factor, h, u, group_size=16)
        if abs(np.log2(scale)) < 60:  # squares of errors stay in float32
            assert torch.equal(scaled[0], codes)
            assert torch.equal(scaled[1], clips * factor)
        assert torch.isfinite(scaled[1]).all()


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_the_form_of_cuda_tensors_rounds_as_the_definition(codebook):
    arguments = problem(60, 300)
    result = fakes._round_weights_on_cuda(*arguments, 200, codebook)
    expected = on_reference(ops.round_weights, *arguments, group_size=200, codebook=codebook)
    assert_rounded_alike(result, expected, *arguments[:2], 200, codebook)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    arguments = problem(60, 300)
    result = ops.round_weights(*(tensor.cuda() for tensor in arguments), group_size=64)
    expected = on_reference(ops.round_weights, *arguments, group_size=64)
    assert {tensor.device.type for tensor in result} == {"cuda"}
    assert_rounded_alike([tensor.cpu() for tensor in result], expected, *arguments[:2], 64, "midrise")


# --- What does not fit ------------------------------------------------------------------------------------------------

W, EYE = torch.ones(3, 8), torch.eye(8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((W.double(), EYE, EYE), {}, TypeError, "weight: expected float32, bfloat16 or float16, got float64"),
        ((W[0], EYE, EYE), {}, ValueError, r"weight: expected shape \[N, K\] with K >= 1, got \[8\]"),
        ((W[:, :0], EYE[:0, :0], EYE[:0, :0]), {}, ValueError, r"weight: expected shape \[N, K\] with K >= 1"),
        ((W, EYE.double(), EYE), {}, TypeError, "second_moments: expected float32, got float64"),
        ((W, EYE[:7], EYE), {}, ValueError, r"second_moments: expected shape \[8, 8\], got \[7, 8\]"),
        ((W, EYE, EYE.half()), {}, TypeError, "factor: expected float32, got float16"),
        ((W, EYE, EYE[:, :7]), {}, ValueError, r"factor: expected shape \[8, 8\], got \[8, 7\]"),
        ((W, EYE, EYE), {"group_size": 3}, ValueError, "group_size: expected an even number of at least 2"),
        (
            (W, EYE, EYE),
            {"codebook": "uniform"},
            ValueError,
            "codebook: expected 'midrise' or 'midtread', got 'uniform'",
        ),
        ((W.numpy(), EYE, EYE), {}, TypeError, "weight: expected a tensor, got numpy.ndarray"),
        ((W, EYE, EYE.to("meta")), {}, ValueError, "factor: expected on cpu like weight, got on meta"),
    ],
)
def test_what_does_not_fit_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.round_weights(*arguments, **options)


@needs_core
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W.double(), EYE, EYE), "weight: expected float32"),
        ((W[0], EYE, EYE), "weight: expected shape"),
        ((W, EYE.double(), EYE), "second_moments: expected float32"),
        ((W, EYE[:7], EYE), "second_moments: expected shape"),
        ((W, EYE, EYE[:, :7]), "factor: expected shape"),
        ((W, EYE, EYE, 3), "group_size: expected 0 or an even number"),
        ((W, EYE, EYE, 4, "uniform"), "codebook: expected 'midrise' or 'midtread'"),
    ],
)
def test_the_operator_checks_for_itself(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.la_aciq.round_weights(*arguments)

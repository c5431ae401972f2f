"""The reference against definitions written another way: NumPy loops, SciPy's Hadamard matrix, published optima."""

import numpy as np
import pytest
import scipy.linalg
import torch

from la_aciq.ops import reference


def code_by_definition(x: float, alpha: float, bits: int, codebook: str) -> int:
    levels = 2**bits
    if not (np.isfinite(alpha) and alpha > 0) or np.isnan(x):
        return levels // 2
    if np.isinf(x):
        return levels - 1 if x > 0 else 0
    t = x / (2 * alpha / (levels - 1))
    return int(min(max((np.floor(t) if codebook == "midrise" else np.rint(t)) + levels // 2, 0), levels - 1))


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_and_values_follow_the_definition(codebook, bits):
    x = np.concatenate([np.linspace(-20, 20, 401), [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-300, 3.4e38]])
    levels = 2**bits
    for alpha in (7.5, 1.0, 2.514, 0.0, -1.0, np.nan, np.inf):
        codes = reference.to_codes(torch.tensor(x), torch.tensor(alpha, dtype=torch.float64), bits, codebook)
        expected = [code_by_definition(v, alpha, bits, codebook) for v in x]
        assert codes.tolist() == expected
        values = reference.to_values(codes, torch.tensor(alpha, dtype=torch.float64), bits, codebook)
        step = 2 * alpha / (levels - 1) if np.isfinite(alpha) and alpha > 0 else 0.0
        zero = (levels - 1) / 2 if codebook == "midrise" else levels / 2
        np.testing.assert_allclose(values, (np.array(expected) - zero) * step, rtol=1e-15)


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
def test_every_element_takes_the_nearest_level(codebook):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    alpha = torch.tensor(2.5, dtype=torch.float64)
    levels = reference.to_values(torch.arange(16), alpha, 4, codebook)
    nearest = levels[(x.unsqueeze(1) - levels).abs().argmin(1)]
    torch.testing.assert_close(reference.fake_quantize(x, alpha, 4, codebook), nearest)


@pytest.mark.parametrize(
    ("alpha", "expected_mse"),
    # Max (1960), table I: 16 equally spaced levels for a Gaussian, step 0.3352, mean squared error 0.01154.
    [(0.3352 * 7.5, 0.01154)],
)
def test_gaussian_error_is_the_published_one(alpha, expected_mse):
    x = torch.randn(2_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = (reference.fake_quantize(x, torch.tensor(alpha), 4, "midrise") - x).square().mean()
    assert error.item() == pytest.approx(expected_mse, rel=5e-3)


@pytest.mark.parametrize(("k", "block"), [(1, 0), (2, 0), (64, 0), (96, 0), (576, 0), (576, 16), (100, 2), (64, 1)])
def test_rotation_is_the_hadamard_matrix(k, block):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(3, k, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (k,), generator=generator) * 2 - 1
    size = block or (k & -k)
    matrix = scipy.linalg.block_diag(*[scipy.linalg.hadamard(size) / np.sqrt(size)] * (k // size))
    expected = (x.numpy() * signs.numpy()) @ matrix.T
    np.testing.assert_allclose(reference.rotate(x, signs.to(torch.int8), block), expected, atol=1e-13)


def test_packing_puts_the_even_index_in_the_low_nibble():
    codes = torch.tensor([[1, 2, 3], [15, 0, 9]])
    packed = reference.pack(codes)
    assert packed.tolist() == [[0x21, 0x03], [0x0F, 0x09]]
    assert torch.equal(reference.unpack(packed, 3), codes.to(torch.uint8))


def test_languages_and_groups_pick_their_clip():
    alpha = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x = torch.full((2, 3, 5), 100.0)
    codes, _ = reference.quantize(x, alpha, torch.tensor([0, 1], dtype=torch.int32), group_size=4)
    values = reference.dequantize(codes, alpha, torch.tensor([0, 1], dtype=torch.int32), k=5, group_size=4)
    assert torch.equal(values[0], torch.tensor([1.0, 1, 1, 1, 2]).expand(3, 5))
    assert torch.equal(values[1], torch.tensor([3.0, 3, 3, 3, 4]).expand(3, 5))


def test_tail_sums_by_hand():
    x = torch.tensor([[0.5, -2.0, 3.0, float("nan")], [float("inf"), 1.0, -1.5, 0.0]])
    alpha = torch.tensor([[1.0], [1.2]])
    _, tail = reference.quantize(x, alpha, torch.tensor([0, 1], dtype=torch.int32), tail_sums=True)
    assert tail.tolist() == [[[3.0, 2.0, 5.0, 1.0]], [[3.0, 1.0, 1.5, 1.0]]]


@pytest.mark.parametrize("statistic", ["rms", "absmax"])
def test_dynamic_clips_are_over_finite_elements(statistic):
    x = torch.tensor([[3.0, 4.0, float("nan"), 0.0, 0.0, 0.0, float("inf")]])
    _, row_clips = reference.quantize_dynamic(x, torch.tensor([[2.0, 2.0]]), group_size=4, statistic=statistic)
    expected = 2 * np.sqrt((9 + 16 + 0) / 3) if statistic == "rms" else 8.0
    np.testing.assert_allclose(row_clips, [[expected, 0.0]], rtol=1e-6)


def test_linear_with_everything_on():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 12, generator=generator)
    signs = torch.randint(0, 2, (12,), generator=generator).float() * 2 - 1
    weight = reference.pack(torch.randint(0, 16, (7, 12), generator=generator))
    weight_clip = torch.rand(7, 3, generator=generator) + 0.1
    bias = torch.randn(7, generator=generator)
    clips = torch.tensor([[2.0, 2.5], [1.0, 1.5]])
    language_ids = torch.tensor([0, 1], dtype=torch.int32)
    out = reference.linear(
        x,
        weight,
        weight_clip,
        bias,
        group_size=4,
        signs=signs,
        activation_bits=4,
        activation_group_size=8,
        clips=clips,
        language_ids=language_ids,
    )
    matrix = scipy.linalg.block_diag(*[scipy.linalg.hadamard(4) / 2] * 3)
    rotated = (x.double().numpy() * signs.numpy()) @ matrix.T
    expected = np.zeros((2, 5, 7))
    for b, t, n in np.ndindex(2, 5, 7):
        for k in range(12):
            alpha = float(clips[b, k // 8])
            activation = (code_by_definition(rotated[b, t, k], alpha, 4, "midrise") - 7.5) * 2 * alpha / 15
            code = int(weight[n, k // 2]) >> (4 * (k % 2)) & 15
            expected[b, t, n] += activation * (code - 7.5) * 2 * float(weight_clip[n, k // 4]) / 15
        expected[b, t, n] += float(bias[n])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)

"""The CPU operations beside the hardware limit of the same run and what a user would otherwise write.

Every implementation gets the same tensor, larger than the last-level cache, and the same threads; its output is
compared with ours before anything is timed.
"""

import numpy as np
import pytest
import scipy.stats
import torch

import la_aciq
from benchmarks.roofline import probes

ROWS, K, GROUP = 16384, 4096, 64
LANGUAGES = 12


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, K, generator=generator)


@pytest.fixture(scope="module")
def language() -> torch.Tensor:
    return (torch.arange(ROWS) % LANGUAGES).to(torch.int32)


@pytest.fixture(scope="module")
def alpha() -> torch.Tensor:
    return torch.linspace(2.0, 3.0, LANGUAGES * K // GROUP).reshape(LANGUAGES, -1)


def measure(benchmark, function, *, operation: str, implementation: str, limit: str | None, nbytes: int) -> None:
    """Time `function`, noting the bytes a perfect implementation moves and the limit they are held against, if any."""
    benchmark.group = operation
    benchmark.extra_info |= {
        "operation": operation,
        "implementation": implementation,
        "limit": limit,
        "bytes": nbytes,
    }
    benchmark.pedantic(function, rounds=11, warmup_rounds=2)


@pytest.mark.parametrize("kind", ["read", "write", "copy", "fresh write", "fresh copy"])
def bench_roofline(benchmark, x, kind):
    function, nbytes = probes(x)[kind]
    measure(benchmark, function, operation=f"limit: {kind}", implementation="torch", limit=kind, nbytes=nbytes)


def pack_torch(q: torch.Tensor) -> torch.Tensor:
    return q[..., ::2] | (q[..., 1::2] << 4)


def bench_moments(benchmark, x, language):
    measure(
        benchmark,
        lambda: la_aciq.moments(x, language, LANGUAGES),
        operation="moments",
        implementation="la_aciq",
        limit="read",
        nbytes=x.nbytes,
    )


def bench_moments_histogram(benchmark, x, language):
    measure(
        benchmark,
        lambda: la_aciq.moments(x, language, LANGUAGES, histogram=True),
        operation="moments with histogram",
        implementation="la_aciq",
        limit="read",
        nbytes=x.nbytes,
    )


def composed_kurtosis(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean()
    square = centred * centred
    return (square * square).mean() / square.mean() ** 2 - 3


def bench_moments_torch(benchmark, x):
    # float32 sums over this many elements are good to about three digits; ours are float64.
    assert composed_kurtosis(x).item() == pytest.approx(float(la_aciq.moments(x).kurtosis), abs=5e-3)
    measure(
        benchmark,
        lambda: composed_kurtosis(x),
        operation="moments",
        implementation="torch, composed",
        limit="read",
        nbytes=x.nbytes,
    )


def bench_moments_numpy(benchmark, x):
    array = x.numpy()

    def kurtosis() -> float:
        square = np.square(array - array.mean())
        return float(np.square(square).mean() / square.mean() ** 2 - 3)

    assert kurtosis() == pytest.approx(float(la_aciq.moments(x).kurtosis), abs=5e-3)
    measure(benchmark, kurtosis, operation="moments", implementation="NumPy", limit="read", nbytes=x.nbytes)


def bench_moments_scipy(benchmark, x):
    array = x.numpy()
    assert scipy.stats.kurtosis(array, axis=None) == pytest.approx(float(la_aciq.moments(x).kurtosis), abs=5e-3)
    measure(
        benchmark,
        lambda: scipy.stats.kurtosis(array, axis=None),
        operation="moments",
        implementation="SciPy",
        limit="read",
        nbytes=x.nbytes,
    )


def composed_quantize(x: torch.Tensor, alpha: torch.Tensor, language: torch.Tensor) -> torch.Tensor:
    inverse = (7.5 / alpha)[language].unsqueeze(-1)
    q = (x.reshape(ROWS, -1, GROUP) * inverse + 8).floor().clamp(0, 15).to(torch.uint8)
    return pack_torch(q.reshape(ROWS, K))


def bench_quantize(benchmark, x, alpha, language):
    measure(
        benchmark,
        lambda: la_aciq.quantize(x, alpha, language, group_size=GROUP),
        operation="quantize",
        implementation="la_aciq",
        limit="read",
        nbytes=x.nbytes + x.numel() // 2,
    )


def bench_quantize_tail_sums(benchmark, x, alpha, language):
    measure(
        benchmark,
        lambda: la_aciq.quantize(x, alpha, language, group_size=GROUP, tail_sums=True),
        operation="quantize with tail sums",
        implementation="la_aciq",
        limit="read",
        nbytes=x.nbytes + x.numel() // 2,
    )


def bench_quantize_torch(benchmark, x, alpha, language):
    ours = la_aciq.quantize(x, alpha, language, group_size=GROUP)
    different = (composed_quantize(x, alpha, language) != ours).float().mean().item()
    assert different < 1e-5, "beyond rounding at a decision boundary"
    measure(
        benchmark,
        lambda: composed_quantize(x, alpha, language),
        operation="quantize",
        implementation="torch, composed",
        limit="read",
        nbytes=x.nbytes + x.numel() // 2,
    )


def bench_quantize_numpy(benchmark, x, alpha, language):
    array, rows = x.numpy(), language.numpy()
    inverse = (7.5 / alpha).numpy()

    def quantize() -> np.ndarray:
        scaled = array.reshape(ROWS, -1, GROUP) * inverse[rows][..., None] + np.float32(8)
        q = np.clip(np.floor(scaled), 0, 15).astype(np.uint8).reshape(ROWS, K)
        return q[:, ::2] | (q[:, 1::2] << 4)

    ours = la_aciq.quantize(x, alpha, language, group_size=GROUP).numpy()
    assert np.mean(quantize() != ours) < 1e-5, "beyond rounding at a decision boundary"
    measure(
        benchmark,
        quantize,
        operation="quantize",
        implementation="NumPy",
        limit="read",
        nbytes=x.nbytes + x.numel() // 2,
    )


@pytest.mark.parametrize("group_size", [None, GROUP], ids=["row", "group of 64"])
def bench_quantize_dynamic(benchmark, x, language, group_size):
    shape = torch.full((LANGUAGES, 1 if group_size is None else K // group_size), 2.5)
    measure(
        benchmark,
        lambda: la_aciq.quantize_dynamic(x, shape, language, group_size=group_size),
        operation=f"quantize_dynamic, rms per {'row' if group_size is None else f'group of {group_size}'}",
        implementation="la_aciq",
        limit="read",
        nbytes=x.nbytes + x.numel() // 2 + 4 * ROWS * shape.shape[1],
    )


def bench_quantize_dynamic_torch(benchmark, x):
    def quantize() -> torch.Tensor:
        inverse = 7.5 / (2.5 * x.square().mean(-1, keepdim=True).sqrt())
        return pack_torch((x * inverse + 8).floor().clamp(0, 15).to(torch.uint8))

    ours, _scales = la_aciq.quantize_dynamic(x, 2.5)
    assert (quantize() != ours).float().mean().item() < 1e-5, "beyond rounding at a decision boundary"
    measure(
        benchmark,
        quantize,
        operation="quantize_dynamic, rms per row",
        implementation="torch, composed",
        limit="read",
        nbytes=x.nbytes + x.numel() // 2 + 4 * ROWS,
    )


def bench_quantize_dynamic_rotated(benchmark, x):
    signs = torch.ones(K)
    measure(
        benchmark,
        lambda: la_aciq.quantize_dynamic(x, 2.5, signs=signs),
        operation="quantize_dynamic, rms per row, rotated",
        implementation="la_aciq",
        limit="read",
        nbytes=x.nbytes + x.numel() // 2 + 4 * ROWS,
    )


def bench_rotate(benchmark, x):
    signs = torch.ones(K)
    measure(
        benchmark,
        lambda: la_aciq.rotate(x, signs),
        operation="rotate, block of 4096",
        implementation="la_aciq",
        limit="fresh copy",
        nbytes=2 * x.nbytes,
    )


def bench_dequantize(benchmark, x, alpha, language):
    codes = la_aciq.quantize(x, alpha, language, group_size=GROUP)
    measure(
        benchmark,
        lambda: la_aciq.dequantize(codes, alpha, language, k=K, group_size=GROUP),
        operation="dequantize",
        implementation="la_aciq",
        limit="fresh write",
        nbytes=x.nbytes + codes.nbytes,
    )


def bench_dequantize_torch(benchmark, x, alpha, language):
    codes = la_aciq.quantize(x, alpha, language, group_size=GROUP)
    step = (alpha / 7.5)[language].unsqueeze(-1)

    def dequantize() -> torch.Tensor:
        q = torch.stack((codes & 15, codes >> 4), dim=-1).reshape(ROWS, -1, GROUP)
        return ((q.float() - 7.5) * step).reshape(ROWS, K)

    torch.testing.assert_close(dequantize(), la_aciq.dequantize(codes, alpha, language, k=K, group_size=GROUP))
    measure(
        benchmark,
        dequantize,
        operation="dequantize",
        implementation="torch, composed",
        limit="fresh write",
        nbytes=x.nbytes + codes.nbytes,
    )


# One row is bound by reading the weights, 128 rows by arithmetic: no share of a bandwidth is given for those.
N_LINEAR, K_LINEAR = 14336, 4096


@pytest.fixture(scope="module")
def weight() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight matrix in float32, its codes and its clips per group."""
    w = torch.randn(N_LINEAR, K_LINEAR, generator=torch.Generator().manual_seed(1)) / K_LINEAR**0.5
    codes, scales = la_aciq.quantize_dynamic(w, 2.5, group_size=GROUP)
    return w, codes, scales


@pytest.mark.parametrize("rows", [1, 128])
def bench_linear(benchmark, weight, rows):
    _w, codes, scales = weight
    activations = torch.randn(rows, K_LINEAR, generator=torch.Generator().manual_seed(2))
    dequantized = la_aciq.dequantize(codes, scales=scales, k=K_LINEAR, group_size=GROUP)
    torch.testing.assert_close(
        la_aciq.linear(activations, codes, scales, group_size=GROUP), activations @ dequantized.T, rtol=1e-3, atol=1e-3
    )
    measure(
        benchmark,
        lambda: la_aciq.linear(activations, codes, scales, group_size=GROUP),
        operation=f"linear, {rows} row{'s' * (rows > 1)}",
        implementation="la_aciq",
        limit="read" if rows == 1 else None,
        nbytes=codes.nbytes + scales.nbytes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 128])
def bench_linear_torch(benchmark, weight, rows, dtype):
    w = weight[0].to(dtype)
    activations = torch.randn(rows, K_LINEAR, generator=torch.Generator().manual_seed(2)).to(dtype)
    measure(
        benchmark,
        lambda: torch.nn.functional.linear(activations, w),
        operation=f"linear, {rows} row{'s' * (rows > 1)}",
        implementation=f"torch {str(dtype).removeprefix('torch.')}",
        limit="read" if rows == 1 else None,
        nbytes=w.nbytes,
    )


@pytest.mark.parametrize("rows", [1, 128])
def bench_linear_torch_int4(benchmark, weight, rows):
    """torch's own INT4 CPU kernel: bfloat16 activations, weights as (q - 8) * scale + zero per group."""
    _w, codes, scales = weight
    q = torch.stack((codes & 15, codes >> 4), dim=-1).reshape(N_LINEAR, K_LINEAR)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
    step = (scales / 7.5).T
    scales_and_zeros = torch.stack((step, step / 2), dim=-1).to(torch.bfloat16).contiguous()
    activations = torch.randn(rows, K_LINEAR, generator=torch.Generator().manual_seed(2)).bfloat16()

    def linear() -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(activations, packed, GROUP, scales_and_zeros)

    ours = la_aciq.linear(activations, codes, scales, group_size=GROUP).float()
    assert ((linear().float() - ours).norm() / ours.norm()).item() < 0.02, "bfloat16 rounding of scales and outputs"
    measure(
        benchmark,
        linear,
        operation=f"linear, {rows} row{'s' * (rows > 1)}",
        implementation="torch int4",
        limit="read" if rows == 1 else None,
        nbytes=codes.nbytes + scales.nbytes,
    )

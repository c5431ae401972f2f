"""The operations that go over data once, beside the hardware limit and what a user would otherwise write.

Contenders get the same tensors and threads, and their outputs are compared with ours before anything is timed.
"""

import contextlib
import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import la_aciq
from benchmarks import measure, roofline
from benchmarks.measure import compare, optional

ROWS, K, GROUP = 512 if measure.QUICK else 16384, 4096, 64  # 256 MiB of float32
LANGUAGES = 12
SIZES = {"1 KiB": 10, "16 KiB": 14, "256 KiB": 18, "4 MiB": 22, "32 MiB": 25, "256 MiB": 28, "1 GiB": 30}
if measure.QUICK:
    SIZES = {size: power for size, power in SIZES.items() if power <= 22}
ALL_THREADS = torch.get_num_threads()
compiled = torch.compile(dynamic=False, fullgraph=True)


def normal(elements: int) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return normal(ROWS * K).reshape(ROWS, K)


@pytest.fixture(scope="module")
def language_ids() -> Tensor:
    return (torch.arange(ROWS) % LANGUAGES).to(torch.int32)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return torch.linspace(2.0, 3.0, LANGUAGES * K // GROUP).reshape(LANGUAGES, -1)


@contextlib.contextmanager
def threads(count: int):
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(ALL_THREADS)


def differing(a: Tensor, b: Tensor) -> float:
    return (a != b).float().mean().item()


def reads(x: Tensor) -> dict[str, Callable[[], object]]:
    return {"limit: read": roofline.read(x)}


def pack(q: Tensor) -> Tensor:
    return q[..., ::2] | (q[..., 1::2] << 4)


# --- moments ---


def kurtosis_torch(x: Tensor) -> Tensor:
    centered = x - x.mean()
    square = centered * centered
    return (square * square).mean() / square.mean() ** 2 - 3


def kurtosis_numpy(x: np.ndarray) -> float:
    square = np.square(x - x.mean())
    return float(np.square(square).mean() / square.mean() ** 2 - 3)


def bench_moments(benchmark, x, language_ids):
    array, inductor = x.numpy(), compiled(kurtosis_torch)
    contenders = {
        "la_aciq": lambda: la_aciq.moments(x, language_ids, LANGUAGES),
        **reads(x),
        "torch": lambda: kurtosis_torch(x),
        "torch.compile": lambda: inductor(x),
        "NumPy": lambda: kurtosis_numpy(array),
        "SciPy": lambda: scipy.stats.kurtosis(array, axis=None),
    }
    ours = float(la_aciq.moments(x).kurtosis)
    for name in ("torch", "torch.compile", "NumPy", "SciPy"):
        # float32 sums over this many elements are good to about three digits; ours are float64.
        assert float(contenders[name]()) == pytest.approx(ours, abs=5e-3), name
    compare(benchmark, contenders, operation="moments", buffer=x.nbytes, bytes=x.nbytes, limit="read")


def bench_moments_histogram(benchmark, x, language_ids):
    compare(
        benchmark,
        {"la_aciq": lambda: la_aciq.moments(x, language_ids, LANGUAGES, histogram=True), **reads(x)},
        operation="moments with histogram",
        buffer=x.nbytes,
        bytes=x.nbytes,
        limit="read",
    )


def bench_moments_bfloat16(benchmark, x, language_ids):
    half = x.bfloat16()
    compare(
        benchmark,
        {"la_aciq": lambda: la_aciq.moments(half, language_ids, LANGUAGES), **reads(half)},
        operation="moments, bfloat16",
        buffer=half.nbytes,
        bytes=half.nbytes,
        limit="read",
    )


# --- quantize ---


def quantize_torch(x: Tensor, clips: Tensor, language_ids: Tensor) -> Tensor:
    inverse = (7.5 / clips)[language_ids].unsqueeze(-1)
    q = (x.reshape(x.shape[0], -1, GROUP) * inverse + 8).floor().clamp(0, 15).to(torch.uint8)
    return pack(q.reshape(x.shape))


def bench_quantize(benchmark, x, clips, language_ids):
    array, ids, inductor = x.numpy(), language_ids.numpy(), compiled(quantize_torch)
    inverse = (7.5 / clips).numpy()

    def quantize_numpy() -> np.ndarray:
        scaled = array.reshape(ROWS, -1, GROUP) * inverse[ids][..., None] + np.float32(8)
        q = np.clip(np.floor(scaled), 0, 15).astype(np.uint8).reshape(ROWS, K)
        return q[:, ::2] | (q[:, 1::2] << 4)

    contenders = {
        "la_aciq": lambda: la_aciq.quantize(x, clips, language_ids, group_size=GROUP),
        **reads(x),
        "torch": lambda: quantize_torch(x, clips, language_ids),
        "torch.compile": lambda: inductor(x, clips, language_ids),
        "NumPy": quantize_numpy,
    }
    ours = contenders["la_aciq"]()
    for name in ("torch", "torch.compile", "NumPy"):
        assert differing(torch.as_tensor(contenders[name]()), ours) < 1e-5, f"{name}: beyond rounding at a boundary"
    compare(benchmark, contenders, operation="quantize", buffer=x.nbytes, bytes=x.nbytes + ours.nbytes, limit="read")


def bench_quantize_one_clip(benchmark, x):
    """One clip for everything, which is all that pypiquant knows."""
    contenders = {"la_aciq": lambda: la_aciq.quantize(x, 2.5, codebook="midtread"), **reads(x)}
    ours = contenders["la_aciq"]()
    if piquant := optional("piquant"):
        context = piquant.Context(ALL_THREADS)

        def quantize_piquant() -> Tensor:
            out = torch.empty_like(ours)
            types, nearest = piquant.DataType, piquant.RoundMode.NEAREST
            pointers = x.data_ptr(), types.F32, out.data_ptr(), types.UINT4
            context.quantize_ptr(*pointers, x.numel(), 2.5 / 7.5, 8, nearest)
            return out

        contenders["pypiquant"] = quantize_piquant
        assert differing(quantize_piquant(), ours) < 1e-5, "beyond rounding at a boundary"
    compare(
        benchmark,
        contenders,
        operation="quantize, one clip",
        buffer=x.nbytes,
        bytes=x.nbytes + ours.nbytes,
        limit="read",
    )


def bench_quantize_tail_sums(benchmark, x, clips, language_ids):
    compare(
        benchmark,
        {"la_aciq": lambda: la_aciq.quantize(x, clips, language_ids, group_size=GROUP, tail_sums=True), **reads(x)},
        operation="quantize with tail sums",
        buffer=x.nbytes,
        bytes=x.nbytes + x.numel() // 2,
        limit="read",
    )


def bench_quantize_bfloat16(benchmark, x, clips, language_ids):
    half = x.bfloat16()
    compare(
        benchmark,
        {"la_aciq": lambda: la_aciq.quantize(half, clips, language_ids, group_size=GROUP), **reads(half)},
        operation="quantize, bfloat16",
        buffer=half.nbytes,
        bytes=half.nbytes + x.numel() // 2,
        limit="read",
    )


def quantize_dynamic_torch(x: Tensor) -> Tensor:
    inverse = 7.5 / (2.5 * x.square().mean(-1, keepdim=True).sqrt())
    return pack((x * inverse + 8).floor().clamp(0, 15).to(torch.uint8))


@pytest.mark.parametrize("group_size", [None, 32, 64, 128], ids=lambda size: str(size or "row"))
def bench_quantize_dynamic(benchmark, x, language_ids, group_size):
    clip_factors = torch.full((LANGUAGES, 1 if group_size is None else K // group_size), 2.5)
    contenders = {
        "la_aciq": lambda: la_aciq.quantize_dynamic(x, clip_factors, language_ids, group_size=group_size),
        **reads(x),
    }
    ours, row_clips = contenders["la_aciq"]()
    if group_size is None:
        inductor = compiled(quantize_dynamic_torch)
        contenders["torch"] = lambda: quantize_dynamic_torch(x)
        contenders["torch.compile"] = lambda: inductor(x)
        for name in ("torch", "torch.compile"):
            assert differing(contenders[name](), ours) < 1e-5, f"{name}: beyond rounding at a boundary"
    compare(
        benchmark,
        contenders,
        operation=f"quantize_dynamic, rms per {'row' if group_size is None else f'group of {group_size}'}",
        buffer=x.nbytes,
        bytes=x.nbytes + ours.nbytes + row_clips.nbytes,
        limit="read",
    )


def bench_quantize_dynamic_absmax(benchmark, x):
    contenders = {
        "la_aciq": lambda: la_aciq.quantize_dynamic(x, 1.0, group_size=GROUP, statistic="absmax"),
        **reads(x),
    }
    ours, row_clips = contenders["la_aciq"]()
    if bitsandbytes := optional("bitsandbytes"):
        functional = bitsandbytes.functional
        contenders["bitsandbytes NF4"] = lambda: functional.quantize_4bit(x, blocksize=GROUP, quant_type="nf4")
        back = functional.dequantize_4bit(*contenders["bitsandbytes NF4"]()).reshape(x.shape)
        assert ((back - x).norm() / x.norm()).item() < 0.12, "what four bits cost"
    compare(
        benchmark,
        contenders,
        operation=f"quantize_dynamic, absmax per group of {GROUP}",
        buffer=x.nbytes,
        bytes=x.nbytes + ours.nbytes + row_clips.nbytes,
        limit="read",
    )


def bench_quantize_dynamic_rotated(benchmark, x):
    signs = torch.ones(K)
    compare(
        benchmark,
        {"la_aciq": lambda: la_aciq.quantize_dynamic(x, 2.5, signs=signs), **reads(x)},
        operation="quantize_dynamic, rms per row, rotated",
        buffer=x.nbytes,
        bytes=x.nbytes + x.numel() // 2 + 4 * ROWS,
        limit="read",
    )


# --- rotate and dequantize: limits to memory in use and to fresh memory ---


def rotate_torch(x: Tensor) -> Tensor:
    """The fast transform: a butterfly per bit of K."""
    shape = x.shape
    for _ in range(shape[-1].bit_length() - 1):
        x = x.reshape(shape[0], -1, 2)
        x = torch.cat((x[..., 0] + x[..., 1], x[..., 0] - x[..., 1]), dim=-1)
    return x * shape[-1] ** -0.5


def bench_rotate(benchmark, x):
    signs, target = torch.ones(K), torch.ones_like(x)
    contenders = {
        "la_aciq": lambda: la_aciq.rotate(x, signs),
        "limit: copy": roofline.copy(x, target),
        "limit: fresh copy": x.clone,
        "torch": lambda: rotate_torch(x),
    }
    ours, theirs = contenders["la_aciq"](), contenders["torch"]()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    del ours, theirs
    compare(
        benchmark,
        contenders,
        operation="rotate, block of 4096",
        buffer=x.nbytes,
        bytes=2 * x.nbytes,
        limit="fresh copy",
    )


def dequantize_torch(codes: Tensor, clips: Tensor, language_ids: Tensor) -> Tensor:
    step = (clips / 7.5)[language_ids].unsqueeze(-1)
    q = torch.stack((codes & 15, codes >> 4), dim=-1).reshape(codes.shape[0], -1, GROUP)
    return ((q.float() - 7.5) * step).reshape(codes.shape[0], -1)


def bench_dequantize(benchmark, x, clips, language_ids):
    codes, target = la_aciq.quantize(x, clips, language_ids, group_size=GROUP), torch.ones_like(x)
    inductor = compiled(dequantize_torch)
    contenders = {
        "la_aciq": lambda: la_aciq.dequantize(codes, clips, language_ids, k=K, group_size=GROUP),
        "limit: write": roofline.write(target),
        "limit: fresh write": lambda: torch.full_like(target, 1.0),
        "torch": lambda: dequantize_torch(codes, clips, language_ids),
        "torch.compile": lambda: inductor(codes, clips, language_ids),
    }
    ours = contenders["la_aciq"]()
    for name in ("torch", "torch.compile"):
        torch.testing.assert_close(contenders[name](), ours)
    del ours
    if bitsandbytes := optional("bitsandbytes"):
        functional = bitsandbytes.functional
        q, state = functional.quantize_4bit(x, blocksize=GROUP, quant_type="nf4")
        contenders["bitsandbytes NF4"] = lambda: functional.dequantize_4bit(q, state)
        back = contenders["bitsandbytes NF4"]().reshape(x.shape)
        assert ((back - x).norm() / x.norm()).item() < 0.12, "what four bits cost"
        del back
    compare(
        benchmark,
        contenders,
        operation="dequantize",
        buffer=x.nbytes,
        bytes=x.nbytes + codes.nbytes,
        limit="fresh write",
    )


# --- outputs in memory that is in use already ---


@contextlib.contextmanager
def freed_memory_kept():
    """glibc keeps what is freed and hands it out again, so that no output is in memory fresh from the system."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("needs glibc's mallopt")
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**30)):
        assert libc.mallopt(option, value) == 1
    try:
        yield
    finally:
        for option, value in ((mmap_max, 65536), (trim_threshold, 2**17), (top_pad, 2**17)):  # glibc's own
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def bench_in_use(benchmark, x, clips, language_ids):
    signs, target, clip_factors = torch.ones(K), torch.ones_like(x), torch.full((LANGUAGES, K // GROUP), 2.5)
    codes = la_aciq.quantize(x, clips, language_ids, group_size=GROUP)
    with freed_memory_kept():
        compare(
            benchmark,
            {
                "quantize": lambda: la_aciq.quantize(x, clips, language_ids, group_size=GROUP),
                "quantize with tail sums": lambda: la_aciq.quantize(
                    x, clips, language_ids, group_size=GROUP, tail_sums=True
                ),
                "quantize_dynamic, rms per row": lambda: la_aciq.quantize_dynamic(x, clip_factors[:, :1], language_ids),
                f"quantize_dynamic, rms per group of {GROUP}": lambda: la_aciq.quantize_dynamic(
                    x, clip_factors, language_ids, group_size=GROUP
                ),
                "quantize_dynamic, rms per row, rotated": lambda: la_aciq.quantize_dynamic(x, 2.5, signs=signs),
                "rotate": lambda: la_aciq.rotate(x, signs),
                "dequantize": lambda: la_aciq.dequantize(codes, clips, language_ids, k=K, group_size=GROUP),
                **reads(x),
                "limit: copy": roofline.copy(x, target),
                "limit: write": roofline.write(target),
            },
            suite="in use",
        )


# --- by size, threads, and where neither matters ---


def operations(x: Tensor) -> dict[str, Callable[[], object]]:
    k = x.shape[-1]
    signs, codes = torch.ones(k), la_aciq.quantize(x, 2.5)
    return {
        "moments": lambda: la_aciq.moments(x),
        "moments with histogram": lambda: la_aciq.moments(x, histogram=True),
        "quantize": lambda: la_aciq.quantize(x, 2.5),
        "quantize_dynamic": lambda: la_aciq.quantize_dynamic(x, 2.5),
        "quantize_dynamic, rotated": lambda: la_aciq.quantize_dynamic(x, 2.5, signs=signs),
        "dequantize": lambda: la_aciq.dequantize(codes, 2.5, k=k),
    }


@pytest.fixture(scope="module")
def largest() -> Tensor:
    return normal(2 ** max(SIZES.values()) // 4)


@pytest.mark.parametrize("count", sorted({1, ALL_THREADS}))
@pytest.mark.parametrize("size", SIZES)
def bench_size(benchmark, largest, size, count):
    elements = 2 ** SIZES[size] // 4
    x = largest[:elements].reshape(-1, min(K, elements))
    with threads(count):
        compare(
            benchmark,
            {**operations(x), **reads(x)},
            suite="size",
            size=size,
            bytes=x.nbytes,
            threads=count,
            limit="read",
        )


@pytest.mark.parametrize("count", [2**i for i in range(ALL_THREADS.bit_length()) if 1 < 2**i < ALL_THREADS])
def bench_threads(benchmark, largest, count):
    """1 and all threads are among the sizes."""
    x = largest[: ROWS * K].reshape(-1, K)
    with threads(count):
        compare(
            benchmark,
            {**operations(x), **reads(x)},
            suite="size",
            size="256 MiB",
            bytes=x.nbytes,
            threads=count,
            limit="read",
        )


def bench_small_call(benchmark):
    """A call on 16 elements: all overhead. torch's sum stands for what any operation of PyTorch costs."""
    x, clips, signs = normal(16).reshape(1, 16), torch.full((1, 1), 2.5), torch.ones(16)
    codes, ops = la_aciq.quantize(x, clips), torch.ops.la_aciq
    weight_codes, weight_clip = la_aciq.quantize_dynamic(normal(256).reshape(16, 16), 2.5)
    contenders = {
        "torch.sum": x.sum,
        "torch.ops.aten.sum": lambda: torch.ops.aten.sum(x),
        "moments": lambda: la_aciq.moments(x),
        "quantize": lambda: la_aciq.quantize(x, clips),
        "quantize_dynamic": lambda: la_aciq.quantize_dynamic(x, clips),
        "dequantize": lambda: la_aciq.dequantize(codes, clips, k=16),
        "rotate": lambda: la_aciq.rotate(x, signs),
        "linear": lambda: la_aciq.linear(x, weight_codes, weight_clip),
        "torch.ops.la_aciq.moments": lambda: ops.moments(x),
        "torch.ops.la_aciq.quantize": lambda: ops.quantize(x, clips),
        "torch.ops.la_aciq.quantize_dynamic": lambda: ops.quantize_dynamic(x, clips),
        "torch.ops.la_aciq.dequantize": lambda: ops.dequantize(codes, clips, k=16, dtype=torch.float32),
        "torch.ops.la_aciq.rotate": lambda: ops.rotate(x, signs),
        "torch.ops.la_aciq.linear": lambda: ops.linear(x, weight_codes, weight_clip),
    }
    compare(benchmark, contenders, suite="small call", operation="16 elements")

"""The operations on a CUDA device beside its copy bandwidth: compiled kernels, Triton, PyTorch, and peers.

    python -m benchmarks.bench_gpu [--seconds 100] [--logs FOLDER]     writes results/<device>.json

choose_backends makes the table of backends from that file. Per case every implementation gets the same tensors, and its
output is compared with the first one's before it is timed; peers, whose codebooks are their own, loosely. The first is
ours, which the tests compare with the reference. A call is timed by events, after warming up, with the L2 cache
overwritten before it; what can be captured is replayed as a CUDA graph, so that the device is timed and not the host.
Medians with quartiles. A copy of the input stands beside each size. Peers run where their packages are installed. When
time is up, the groups of cases left out are counted in the result.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

import la_aciq
from la_aciq.bench import in_file_names, versions
from la_aciq.ops.backends import ROUNDED, why_unavailable
from la_aciq.ops.functional import moments_state

HERE = Path(__file__).parent
GROUP, LANGUAGES = 64, 12
MAIN_K = 4096


class Timer:
    """Times calls on the device; `flush` is larger than the L2 cache and written between calls."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.l2_bytes = properties.L2_cache_size
        self.flush = torch.empty(2 * self.l2_bytes // 4, device="cuda")

    def times(self, function: Callable[[], object], rounds: int = 25) -> tuple[list[float], bool]:
        """Seconds of each call, and whether they were replays of a graph."""
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        replay, captured = function, False
        with suppress(RuntimeError):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            replay, captured = graph.replay, True
        if not captured:
            torch.cuda.synchronize()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events], captured


class Case:
    """One operation on one shape: implementations by name, the bytes a perfect one moves, how outputs compare, and
    which entry of the table of backends its times decide about."""

    def __init__(
        self,
        operation: str,
        rows: int,
        shape: str,
        nbytes: int,
        compare: Callable[[object, object], None],
        entry: str | None = None,
    ) -> None:
        self.operation = operation
        self.rows = rows
        self.shape = shape
        self.nbytes = nbytes
        self.compare = compare
        self.entry = entry
        self.implementations: dict[str, Callable[[], object]] = {}

    def add_ours(self, function: Callable[[], object]) -> None:
        for backend in ("cuda", "triton"):
            if why_unavailable(backend) is None:
                self.implementations[f"la_aciq {backend}"] = on_backend(backend, function)

    def add_compiled(self, function: Callable[..., object], *arguments: Tensor) -> None:
        self.implementations["torch.compile"] = partial(torch.compile(function, dynamic=False), *arguments)


def on_backend(backend: str, function: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with la_aciq.use_backend(backend):
            return function()

    return call


def few_codes_differ(got: object, wanted: object) -> None:
    """Codes differ at decision boundaries only."""
    share = (first(got) != first(wanted)).float().mean().item()
    assert share < 1e-3, f"{share:.2%} of the bytes differ"


def close(bound: float) -> Callable[[object, object], None]:
    def compare(got: object, wanted: object) -> None:
        a, b = first(got).double(), first(wanted).double()
        error = ((a - b).norm() / b.norm()).item()
        assert error < bound, f"relative difference {error:.2e}"

    return compare


def first(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def same_kurtosis(got: object, wanted: object) -> None:
    """Whether from our state per language or from PyTorch's mean of powers."""

    def kurtosis(output: object) -> float:
        if isinstance(output, tuple):
            return float(la_aciq.Moments.from_state(output[0].cpu().numpy()).pool().kurtosis)
        return float(output[2] / output[1] ** 2 - 3)

    assert abs(kurtosis(got) - kurtosis(wanted)) < 1e-2


# --- What a user would otherwise write ---


def pack(q: Tensor) -> Tensor:
    return q[..., ::2] | (q[..., 1::2] << 4)


def torch_quantize(x: Tensor, clips: Tensor, language_ids: Tensor) -> Tensor:
    inverse = (7.5 / clips)[language_ids].unsqueeze(-1)
    q = (x.float().unflatten(-1, (-1, GROUP)) * inverse + 8).floor().clamp(0, 15).to(torch.uint8)
    return pack(q.flatten(-2))


def torch_quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, GROUP))
    clip = 2.5 * groups.square().mean(-1, keepdim=True).sqrt()
    q = (groups * (7.5 / clip) + 8).floor().clamp(0, 15).to(torch.uint8)
    return pack(q.flatten(-2)), clip.squeeze(-1)


def torch_dequantize(codes: Tensor, clips: Tensor, language_ids: Tensor) -> Tensor:
    q = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).unflatten(-1, (-1, GROUP))
    return ((q.float() - 7.5) * (clips / 7.5)[language_ids].unsqueeze(-1)).flatten(-2).bfloat16()


def torch_moments(x: Tensor) -> Tensor:
    values = x.float()
    mean = values.mean()
    square = (values - mean).square()
    return torch.stack([mean, square.mean(), square.square().mean()])


def torch_rotate(x: Tensor, signs: Tensor) -> Tensor:
    y, k = x.float() * signs, x.shape[-1]
    half = 1
    while half < k:
        pairs = y.unflatten(-1, (k // (2 * half), 2, half))
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((even + odd, even - odd), dim=-2).flatten(-3)
        half *= 2
    return (y / k**0.5).to(x.dtype)


# --- Cases ---


def elementwise_cases(rows: int, k: int, dtype: torch.dtype, composed: bool = False) -> Iterator[Case]:
    """composed: beside PyTorch's compiler, which takes its time."""
    x = torch.randn(rows, k, device="cuda").to(dtype)
    language_ids = (torch.arange(rows, device="cuda") % LANGUAGES).to(torch.int32)
    clips = torch.linspace(2.0, 3.0, LANGUAGES * k // GROUP, device="cuda").reshape(LANGUAGES, -1)
    signs = torch.where(torch.rand(k, device="cuda") < 0.5, -1, 1).to(torch.int8)
    codes = la_aciq.quantize(x, clips, language_ids, group_size=GROUP)
    name = f"{rows} x {k} {str(dtype).removeprefix('torch.')}"
    code_bytes, clip_bytes = x.numel() // 2, 4 * x.numel() // GROUP

    target = torch.empty_like(x)
    case = Case("device copy", rows, name, 2 * x.nbytes, close(0.0))
    case.implementations["PyTorch"] = lambda: target.copy_(x)
    yield case

    case = Case("quantize", rows, name, x.nbytes + code_bytes, few_codes_differ, "quantize")
    case.add_ours(lambda: la_aciq.quantize(x, clips, language_ids, group_size=GROUP))
    if composed:
        case.add_compiled(torch_quantize, x, clips, language_ids)
    yield case

    case = Case("quantize with tail sums", rows, name, x.nbytes + code_bytes, few_codes_differ, "quantize")
    case.add_ours(lambda: la_aciq.quantize(x, clips, language_ids, group_size=GROUP, tail_sums=True))
    yield case

    case = Case(
        "quantize_dynamic", rows, name, x.nbytes + code_bytes + clip_bytes, few_codes_differ, "quantize_dynamic"
    )
    case.add_ours(lambda: la_aciq.quantize_dynamic(x, 2.5, group_size=GROUP))
    if composed:
        case.add_compiled(torch_quantize_dynamic, x)
    yield case

    case = Case(
        "quantize_dynamic rotated",
        rows,
        name,
        x.nbytes + code_bytes + clip_bytes,
        few_codes_differ,
        "quantize_dynamic",
    )
    case.add_ours(lambda: la_aciq.quantize_dynamic(x, 2.5, group_size=GROUP, signs=signs))
    if composed:
        case.add_compiled(lambda v, s: torch_quantize_dynamic(torch_rotate(v.float(), s)), x, signs)
    yield case

    case = Case("rotate", rows, name, 2 * x.nbytes, close(2e-2), "rotate")
    case.add_ours(lambda: la_aciq.rotate(x, signs))
    if composed:
        case.add_compiled(torch_rotate, x, signs)
    yield case

    case = Case("dequantize", rows, name, code_bytes + 2 * x.numel(), close(1e-2), "dequantize")
    case.add_ours(lambda: la_aciq.dequantize(codes, clips, language_ids, k=k, group_size=GROUP, dtype=torch.bfloat16))
    if composed:
        case.add_compiled(torch_dequantize, codes, clips, language_ids)
    yield case

    case = Case("moments", rows, name, x.nbytes, same_kurtosis, "moments")
    case.add_ours(lambda: moments_state(x, language_ids, LANGUAGES))
    if composed:
        case.add_compiled(torch_moments, x)  # of all languages together
    yield case


def linear_cases(rows: int, n: int, k: int) -> Iterator[Case]:
    weight = torch.randn(n, k, device="cuda") / k**0.5
    codes, weight_clip = la_aciq.quantize_dynamic(weight, 2.5, group_size=GROUP)
    dense = la_aciq.dequantize(codes, row_clips=weight_clip, k=k, group_size=GROUP, dtype=torch.bfloat16)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    shape, nbytes = f"{rows} x {k}, {n} outputs", codes.nbytes + weight_clip.nbytes + 2 * rows * (n + k)
    case = Case("linear", rows, shape, nbytes, close(2e-2), "linear")
    case.add_ours(lambda: la_aciq.linear(x, codes, weight_clip, group_size=GROUP))
    case.implementations["cuBLAS bfloat16"] = lambda: torch.nn.functional.linear(x, dense)
    for name, make in LINEAR_PEERS.items():
        if importlib.util.find_spec(name):
            case.implementations[name] = Peer(partial(make, dense, x))
    yield case

    if rows == 1 or rows >= 16:
        table = torch.full((1, k // GROUP), 2.5, device="cuda")
        # Beside cuBLAS as above on the same shape: there the activations keep their 16 bits.
        case = Case("linear, INT4 activations", rows, shape, nbytes, close(5e-2), ROUNDED)
        case.add_ours(
            lambda: la_aciq.linear(
                x,
                codes,
                weight_clip,
                group_size=GROUP,
                activation_bits=4,
                activation_clip="rms",
                clips=table,
                activation_group_size=GROUP,
            )
        )
        yield case


def layer_case(rows: int) -> Iterator[Case]:
    """A gated MLP of Llama-3-8B from quantized linear layers."""
    shapes = {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
    weights = {}
    for name, (n, k) in shapes.items():
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5
        codes, weight_clip = la_aciq.quantize_dynamic(weight, 2.5, group_size=GROUP)
        weights[name] = (
            codes,
            weight_clip,
            la_aciq.dequantize(codes, row_clips=weight_clip, k=k, group_size=GROUP, dtype=torch.bfloat16),
        )
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)

    def mlp(linear: Callable[[Tensor, str], Tensor]) -> Tensor:
        return linear(torch.nn.functional.silu(linear(x, "gate")) * linear(x, "up"), "down")

    nbytes = sum(codes.nbytes + weight_clip.nbytes for codes, weight_clip, _ in weights.values())
    case = Case("gated MLP 4096 -> 14336 -> 4096", rows, f"{rows} rows", nbytes, close(3e-2))
    case.add_ours(lambda: mlp(lambda v, name: la_aciq.linear(v, *weights[name][:2], group_size=GROUP)))
    case.implementations["cuBLAS bfloat16"] = lambda: mlp(
        lambda v, name: torch.nn.functional.linear(v, weights[name][2])
    )
    yield case


# --- Peers: the same weights in their own formats, so outputs agree only as far as INT4 of different codebooks does ---


class Peer:
    """A peer's product, made when it is first called: one that does not work here is a failed row of the result."""

    def __init__(self, make: Callable[[], Callable[[], Tensor]]) -> None:
        self.make = make
        self.product: Callable[[], Tensor] | None = None

    def __call__(self) -> Tensor:
        self.product = self.product or self.make()
        return self.product()


def bitsandbytes_linear(dense: Tensor, x: Tensor) -> Callable[[], Tensor]:
    functional = import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(dense, blocksize=GROUP, quant_type="nf4")
    matmul = import_module("bitsandbytes").matmul_4bit
    return lambda: matmul(x, packed.t(), quant_state=state)


def torchao_linear(dense: Tensor, x: Tensor) -> Callable[[], Tensor]:
    quantization = import_module("torchao.quantization")
    layer = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    layer.weight.data.copy_(dense)
    quantization.quantize_(layer, quantization.Int4WeightOnlyConfig(group_size=GROUP))
    return lambda: layer(x)


def hqq_linear(dense: Tensor, x: Tensor) -> Callable[[], Tensor]:
    core = import_module("hqq.core.quantize")
    layer = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    layer.weight.data.copy_(dense)
    config = core.BaseQuantizeConfig(nbits=4, group_size=GROUP)
    quantized = core.HQQLinear(layer, config, compute_dtype=torch.bfloat16, device="cuda")
    return lambda: quantized(x)


def gemlite_linear(dense: Tensor, x: Tensor) -> Callable[[], Tensor]:
    helper = import_module("gemlite.helper")
    layer = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    layer.weight.data.copy_(dense)
    quantized = helper.A16W4(device="cuda", dtype=torch.bfloat16).from_linear(layer)
    return lambda: quantized(x)


LINEAR_PEERS = {
    "bitsandbytes": bitsandbytes_linear,
    "torchao": torchao_linear,
    "hqq": hqq_linear,
    "gemlite": gemlite_linear,
}
PEERS_AGREE = close(0.2)  # INT4 of an INT4 matrix in another codebook: an error of its own of about a tenth


def cases(l2_bytes: int) -> Iterator[Callable[[], Iterator[Case]]]:
    """What to measure, the most wanted first."""
    # Rows of 4096 bfloat16: four times the L2 cache and more, then down to 64 KiB.
    large = max(16384, 1 << (4 * l2_bytes // (2 * MAIN_K)).bit_length())
    yield lambda: elementwise_cases(large, MAIN_K, torch.bfloat16, composed=True)
    for n, k in ((4096, 4096), (14336, 4096)):
        for rows in (1, 16):
            yield lambda rows=rows, n=n, k=k: linear_cases(rows, n, k)
    yield lambda: layer_case(1)
    yield lambda: elementwise_cases(large, MAIN_K, torch.float32)
    yield lambda: linear_cases(4096, 4096, 4096)
    for rows in (8, 128, 1024):  # from 64 KiB
        yield lambda rows=rows: elementwise_cases(rows, MAIN_K, torch.bfloat16)
    yield lambda: elementwise_cases(large * MAIN_K // 128, 128, torch.bfloat16)  # keys and values per head
    yield lambda: elementwise_cases(large // 4, 14336, torch.bfloat16)
    for rows in (2, 4, 8, 32, 128, 1024):
        yield lambda rows=rows: linear_cases(rows, 4096, 4096)
    for rows in (16, 128):
        yield lambda rows=rows: layer_case(rows)
    yield lambda: linear_cases(4096, 14336, 4096)


def measure_case(case: Case, timer: Timer, copy_rate: float) -> Iterator[dict]:
    outputs: list[object] = []
    for name, function in case.implementations.items():
        row = {"operation": case.operation, "rows": case.rows, "shape": case.shape, "entry": case.entry}
        row |= {"implementation": name, "bytes": case.nbytes}
        try:
            output = function()
            torch.cuda.synchronize()
            if outputs:
                compare = PEERS_AGREE if name in LINEAR_PEERS else case.compare
                compare(output, outputs[0])
            outputs.append(output)
            times, captured = timer.times(function)
        except Exception as error:  # a peer or a backend that fails is a result, and must not end the run
            yield row | {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
            continue
        low, median, high = statistics.quantiles(times, n=4)
        rate = case.nbytes / median
        yield row | {
            "median_s": median,
            "quartiles_s": [low, high],
            "rounds": len(times),
            "graph": captured,
            "bytes_per_s": rate,
            "share_of_copy": rate / copy_rate,
        }


def measure_copy(timer: Timer) -> float:
    """Bytes read and written per second by a device-to-device copy far larger than the L2 cache."""
    source = torch.randn(max(1 << 28, 4 * timer.l2_bytes) // 4, device="cuda")
    target = torch.empty_like(source)
    times, _ = timer.times(lambda: target.copy_(source))
    return 2 * source.nbytes / statistics.median(times)


def checks(logs: Path) -> dict[str, dict]:
    """The steps of gpu.sh that ran before, by name: whether they passed, and the last line they printed."""
    return {
        path.stem: {
            "passed": path.read_text().strip() == "0",
            "last": path.with_suffix(".log").read_text(errors="replace").strip().rpartition("\n")[2],
        }
        for path in sorted(logs.glob("*.status"))
        if path.stem != "benchmarks"
    }


def write_results(rows: list[dict], left_out: int, copy_rate: float, timer: Timer, logs: Path | None) -> Path:
    """results/<device>.json: what was measured so far, on what, with which versions."""
    properties = torch.cuda.get_device_properties(0)
    results = {
        "schema": 1,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": timer.l2_bytes,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "la_aciq": la_aciq.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **versions(("triton", "bitsandbytes", "torchao", "gemlite", "hqq")),
        },
        "backends": {backend: why_unavailable(backend) or "available" for backend in ("cuda", "triton")},
        "copy_bytes_per_s": copy_rate,
        "groups_of_cases_left_out": left_out,
        "checks": checks(logs) if logs else {},
        "rows": rows,
    }
    target = HERE / "results" / f"{in_file_names(properties.name)}.json"
    target.write_text(json.dumps(results, indent=1) + "\n")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=100, help="when to stop starting cases")
    parser.add_argument(
        "--logs", type=Path, help="the folder with gpu.sh's logs, whose steps' outcomes go into the result"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: PyTorch finds no CUDA device", file=sys.stderr)
        return 1
    started = time.monotonic()
    torch.manual_seed(0)
    timer = Timer()
    copy_rate = measure_copy(timer)
    print(f"copy: {copy_rate / 1e9:.0f} GB/s")
    rows, left_out = [], 0
    for make in cases(timer.l2_bytes):
        if time.monotonic() - started > arguments.seconds:
            left_out += 1
            continue
        for case in make():
            for row in measure_case(case, timer, copy_rate):
                rows.append(row)
                told = row.get("failed") or f"{row['median_s'] * 1e6:9.1f} us  {row['share_of_copy']:.2f} of copy"
                print(f"{row['operation']:26} {row['shape']:28} {row['implementation']:28} {told}", flush=True)
        torch.cuda.empty_cache()
        # After every group: a run that is stopped by its time limit keeps what it measured.
        write_results(rows, left_out, copy_rate, timer, arguments.logs)
    print(f"results: {write_results(rows, left_out, copy_rate, timer, arguments.logs)}")
    return int(any("failed" in row and row["implementation"].startswith("la_aciq") for row in rows))


if __name__ == "__main__":
    sys.exit(main())

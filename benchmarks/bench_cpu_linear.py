"""`linear` by shape, rows, dtype and bits of the activations, beside the hardware limit and the peers of a CPU user.

Matrices that do not fit a core's own cache exist several times over, together larger than the last-level cache, and
calls go through the copies in turn, as they go through the layers of a model: weights come from memory. All contenders
multiply with the same weights as far as their format can hold them, and each result is compared with the product in
float64 before anything is timed.
"""

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import la_aciq
from benchmarks import measure, roofline
from benchmarks.ggml import Ggml
from benchmarks.measure import Contenders, compare, optional
from la_aciq import ops

GROUP, LANGUAGES = 64, 12
SHAPES = [(576, 576), (1536, 576), (4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (7, 100)]
ROWS = [1, 4, 16, 128, 512]
if measure.QUICK:
    SHAPES, ROWS = SHAPES[:2] + SHAPES[-1:], ROWS[::2]
COMPILED_SHAPES = [(4096, 4096), (14336, 4096)]  # torchao is compiled, which takes seconds per shape
SCALAR_ROWS = 4  # torch's INT4 kernel is scalar for float32: seconds and minutes beyond
OWN_CACHE, ALL_CACHES = 1 << 20, 80 << 20
# The relative error (Frobenius norm) that a format costs, and a little more.
TOLERANCE = {"exact": 3e-6, "16 bits": 1e-2, "8 bits": 3e-2, "4 bits": 0.2}


@dataclass
class Weight:
    """[n, k] as the codes of la_aciq with their clips, and the values of those codes."""

    codes: Tensor
    weight_clip: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.weight_clip.nbytes


@functools.lru_cache(maxsize=1)
def weight_of(n: int, k: int) -> Weight:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) / k**0.5
    codes, weight_clip = la_aciq.quantize_dynamic(w, 2.5, group_size=GROUP)
    return Weight(codes, weight_clip, la_aciq.dequantize(codes, row_clips=weight_clip, k=k, group_size=GROUP))


Product = Callable[[Tensor], object]


def copies_of(nbytes: int) -> range:
    """How many copies of so many bytes do not fit in the caches together."""
    return range(1 if nbytes < OWN_CACHE else -(-ALL_CACHES // nbytes))


def in_turn(products: list[Product], x: Tensor) -> Callable[[], object]:
    turns = itertools.cycle(products)
    return lambda: next(turns)(x)


def ours(
    weight: Weight, bits: int = 16, clips: Tensor | None = None, language_ids: Tensor | None = None
) -> list[Product]:
    """As a layer on the CPU calls it: with repacked weights, and arguments that were checked when it was made."""
    options = ops.linear_options(group_size=GROUP, activation_bits=bits)

    def product() -> Product:
        codes, weight_clip = la_aciq.repack_weight(weight.codes), weight.weight_clip.clone()
        return lambda x: ops.linear_unchecked(x, codes, weight_clip, None, None, clips, language_ids, options)

    return [product() for _ in copies_of(weight.nbytes)]


def torch_linear(weight: Weight, dtype: torch.dtype) -> list[Product]:
    def product() -> Product:
        w = weight.values.to(dtype, copy=True)
        return lambda x: torch.nn.functional.linear(x, w)

    return [product() for _ in copies_of(weight.values.numel() * dtype.itemsize)]


def torch_int4(weight: Weight, dtype: torch.dtype) -> list[Product]:
    """torch's own kernel: (q - 8) * scale + zero per group, in the dtype of x."""
    n, k = weight.values.shape
    q = torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).reshape(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
    step = (weight.weight_clip / 7.5).T
    parameters = torch.stack((step, step / 2), dim=-1).to(dtype).contiguous()

    def product() -> Product:
        codes, scales_and_zeros = packed.clone(), parameters.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, scales_and_zeros)

    return [product() for _ in copies_of(packed.nbytes + parameters.nbytes)]


def torch_int8(weight: Weight) -> list[Product]:
    """torch's dynamic quantization: int8 weights per output, activations rounded to 8 bits per call."""
    scale = (weight.values.abs().amax(1) / 127).double()
    q = torch.quantize_per_channel(weight.values, scale, torch.zeros(len(scale), dtype=torch.long), 0, torch.qint8)

    def product() -> Product:
        packed = torch.ops.quantized.linear_prepack(q, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)

    return [product() for _ in copies_of(weight.values.numel())]


def layer_of(weight: Weight, dtype: torch.dtype) -> torch.nn.Sequential:
    n, k = weight.values.shape
    layer = torch.nn.Linear(k, n, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight.values)
    return torch.nn.Sequential(layer).requires_grad_(False).eval()


def torchao_int8(weight: Weight, dtype: torch.dtype) -> list[Product]:
    """torchao's dynamic quantization: int8 weights per output, activations per row. One copy: each would compile."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = layer_of(weight, dtype)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return [torch.compile(layer)]


def torchao_int4(weight: Weight, dtype: torch.dtype) -> list[Product]:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    layer = layer_of(weight, dtype)
    quantize_(layer, PrototypeInt4WeightOnlyConfig(group_size=GROUP))
    return [copy.deepcopy(layer) for _ in copies_of(weight.nbytes)]


def bitsandbytes_nf4(weight: Weight, dtype: torch.dtype) -> list[Product]:
    import bitsandbytes

    n, k = weight.values.shape
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, quant_type="nf4", compute_dtype=dtype)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.values.clone(), requires_grad=False, quant_type="nf4", blocksize=GROUP
    )
    layer = layer.to("cpu").eval()
    layer(torch.zeros(1, k, dtype=dtype))  # puts the weights in the order its kernel wants
    packed, state = layer.weight.data, layer.weight.quant_state

    def product() -> Product:
        codes, quant_state = packed.clone(), copy.deepcopy(state)
        return lambda x: bitsandbytes.matmul_4bit(x, codes, quant_state)

    return [product() for _ in copies_of(weight.nbytes)]


def llama(weight: Weight) -> list[Product]:
    """llama.cpp: groups of 32, activations rounded to 8 bits."""
    ggml = Ggml()
    ggml_weights = [ggml.weight(weight.values) for _ in copies_of(weight.nbytes)]

    def product(ggml_weight: int) -> Product:
        calls: dict[int, Callable[[], Tensor]] = {}  # graphs by rows; each is given one x only

        def call(x: Tensor) -> Tensor:
            if len(x) not in calls:
                calls[len(x)] = ggml.linear(ggml_weight, len(weight.values), x)
            return calls[len(x)]()

        return call

    return [product(ggml_weight) for ggml_weight in ggml_weights]


@functools.lru_cache(maxsize=1)
def contenders_of(n: int, k: int, dtype: torch.dtype) -> dict[str, tuple[list[Product], str]]:
    """Everything that multiplies activations of dtype with that matrix, and what its formats may cost."""
    weight, name = weight_of(n, k), str(dtype).removeprefix("torch.")
    exact = "exact" if dtype == torch.float32 else "16 bits"
    contenders = {
        "la_aciq A16": (ours(weight), exact),
        f"torch {name}": (torch_linear(weight, dtype), exact),
    }
    if n % 16 == 0 and k % GROUP == 0:
        contenders["torch int4"] = torch_int4(weight, dtype), exact
        if (n, k) in COMPILED_SHAPES and optional("torchao"):
            contenders["torchao int4"] = torchao_int4(weight, dtype), "4 bits"
            if dtype == torch.bfloat16:
                contenders["torchao int8 dynamic"] = torchao_int8(weight, dtype), "8 bits"
        if dtype == torch.bfloat16 and optional("bitsandbytes"):
            contenders["bitsandbytes NF4"] = bitsandbytes_nf4(weight, dtype), "4 bits"
        if dtype == torch.float32 and optional("llama_cpp"):
            contenders["llama.cpp Q4_0"] = llama(weight), "4 bits"
    if dtype == torch.float32:
        contenders["torch int8 dynamic"] = torch_int8(weight), "8 bits"
    return contenders


def limits_of(weight: Weight, rows: int, dtype: torch.dtype) -> tuple[Contenders, dict[str, float]]:
    """Reading the packed weights, in turn like them; multiply-adds in registers, and how many calls that takes."""
    buffers = [roofline.aligned(weight.nbytes) for _ in copies_of(weight.nbytes)]
    loops = itertools.cycle([roofline.read(buffer) for buffer in buffers])
    contenders: Contenders = {"limit: read": lambda: next(loops)()}
    calls = {}
    for kind in ("int8", "bfloat16" if dtype == torch.bfloat16 else "float32"):
        probe = roofline.multiply(kind)
        if probe is not None:
            contenders[f"limit: {kind}"], multiplied = probe
            calls[f"limit: {kind}"] = rows * weight.values.numel() / multiplied
    return contenders, calls


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@torch.no_grad()
def bench_linear(benchmark, shape, rows, dtype):
    n, k = shape
    weight = weight_of(n, k)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(2)).to(dtype)
    clips = torch.linspace(2.4, 2.6, LANGUAGES).unsqueeze(1)
    mixed = (torch.arange(rows) % LANGUAGES).to(torch.int32)
    same = torch.zeros(rows, dtype=torch.int32)
    contenders = contenders_of(n, k, dtype) | {
        "la_aciq A8": (ours(weight, 8, 2 * clips, same), "8 bits"),
        "la_aciq A4": (ours(weight, 4, clips, same), "4 bits"),
        "la_aciq A4, mixed languages": (ours(weight, 4, clips, mixed), "4 bits"),
    }
    if dtype == torch.float32 and rows > SCALAR_ROWS:
        contenders = {
            name: contender for name, contender in contenders.items() if name not in ("torch int4", "torchao int4")
        }
    exact, errors = x.double() @ weight.values.double().T, {}
    for name, (products, cost) in contenders.items():
        errors[name] = ((products[0](x).double() - exact).norm() / exact.norm()).item()
        assert errors[name] < TOLERANCE[cost], f"{name}: relative error {errors[name]:.3g}"
    limits, calls = limits_of(weight, rows, dtype)
    compare(
        benchmark,
        {**{name: in_turn(products, x) for name, (products, _cost) in contenders.items()}, **limits},
        suite="linear",
        shape=[n, k],
        rows=rows,
        dtype=str(dtype).removeprefix("torch."),
        bytes=weight.nbytes,
        multiply_adds=rows * n * k,
        limit_calls=calls,
        relative_errors={name: float(f"{error:.2g}") for name, error in errors.items()},
    )

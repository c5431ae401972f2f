"""Other methods for weights at 4 bits, as copies of a model whose weights are the dequantized ones.

Groups of 64 along a row share a scale and, where there is one, a zero point. Names and bits per weight:

    rtn_symmetric   4.25  round to nearest, scale max|w| / 7.5 in 16 bits
    rtn_asymmetric  4.5   round to nearest between the smallest and the largest weight; scale and zero in 16 bits
    nf4             4.5   the 16 normal quantiles of QLoRA (Dettmers et al. 2023) times max|w| in 32 bits
    hqq             4.5   half-quadratic zero points (Badri and Shaji 2023)
    awq             4.5   a scale per input channel and a clip per group, least error of the output (Lin et al. 2023)
    gptq            4.5   error feedback (Frantar et al. 2023) between each group's smallest and largest weight

They are written from the papers, for comparison and not for use: the copies compute in floating point. Scales and zeros
are not rounded to 16 bits, which favors the baselines. awq and gptq need `InputStatistics` of calibration text.

`PACKAGES` are other packages, installed separately, with their own kernels, at the same group size:

    torchao int4        4.5   between each group's smallest and largest weight; scale and zero in 16 bits
    torchao int4 hqq    4.5   the same with HQQ's zero points
    bitsandbytes nf4    4.5   NF4, a scale in 32 bits
"""

import argparse
import copy
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

GROUP = 64
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass
class InputStatistics:
    """Of each linear layer's input over calibration text: the sum of x x^T, the mean of |x| and the number of tokens.

    Layers that read one tensor (q, k and v projections, say) share an entry: `source` names the first of them.
    """

    products: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)

    @classmethod
    def measure(cls, model: nn.Module, windows: Iterable[Tensor], ignore: tuple[str, ...] = ("lm_head",)):
        """The statistics over windows of token ids, int64 [t] each."""
        statistics, last = cls(), []

        def hook_of(name):
            def hook(module, args):
                x = args[0]
                if last and last[0] is x:
                    statistics.source[name] = last[1]
                    return
                last[:] = [x, name]
                statistics.source[name] = name
                rows = x.reshape(-1, x.shape[-1]).float()
                products, magnitudes = rows.T @ rows, rows.abs().sum(0)
                if name in statistics.products:
                    products += statistics.products[name]
                    magnitudes += statistics.magnitudes[name]
                statistics.products[name], statistics.magnitudes[name] = products, magnitudes
                statistics.tokens[name] = statistics.tokens.get(name, 0) + len(rows)

            return hook

        handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in _linears(model, ignore).items()]
        try:
            with torch.inference_mode():
                for ids in windows:
                    last.clear()
                    model(input_ids=ids[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        statistics.magnitudes = {name: total / statistics.tokens[name] for name, total in statistics.magnitudes.items()}
        return statistics


def quantized_copy(
    model: nn.Module, name: str, statistics: InputStatistics | None = None, ignore: tuple[str, ...] = ("lm_head",)
) -> tuple[nn.Module, float]:
    """A copy of the model with the baseline's weights, and the baseline's bits per weight."""
    method, bits, needs_statistics = BASELINES[name]
    if needs_statistics and statistics is None:
        raise ValueError(f"statistics: {name!r} needs InputStatistics, got None")
    candidate = copy.deepcopy(model)
    together: dict[str, list[nn.Linear]] = {}
    for layer, module in _linears(candidate, ignore).items():
        together.setdefault(layer if statistics is None else statistics.source[layer], []).append(module)
    for source, modules in together.items():
        weights = [module.weight.detach().float() for module in modules]
        input_statistics = () if not needs_statistics else (statistics.products[source], statistics.magnitudes[source])
        for module, weight in zip(modules, method(weights, *input_statistics), strict=True):
            module.weight.data.copy_(weight)
    return candidate, bits


def package_copy(model: nn.Module, name: str, ignore: tuple[str, ...] = ("lm_head",)) -> tuple[nn.Module, float]:
    """A copy of the model in bfloat16 that another package quantized, and its bits per weight."""
    make, _ = PACKAGES[name]
    candidate = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)
    make(candidate, tuple(_linears(candidate, ignore)))
    return candidate, 4 + 32 / GROUP


def _torchao(model: nn.Module, layers: tuple[str, ...], algorithm: str = "tinygemm") -> None:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    config = PrototypeInt4WeightOnlyConfig(group_size=GROUP, int4_choose_qparams_algorithm=algorithm)
    quantize_(model, config, lambda module, name: name in layers)


def _torchao_hqq(model: nn.Module, layers: tuple[str, ...]) -> None:
    _torchao(model, layers, "hqq")


def _bitsandbytes(model: nn.Module, layers: tuple[str, ...]) -> None:
    import bitsandbytes

    for name in layers:
        linear = model.get_submodule(name)
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, quant_type="nf4"
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", blocksize=GROUP, compress_statistics=False
        )
        layer.bias = linear.bias
        model.set_submodule(name, layer.to("cpu"))


def _linears(model: nn.Module, ignore: tuple[str, ...]) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ignore
    }


def _by_group(method: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """A method on groups [n, GROUP] as one on weights [N, K] whose K the group divides."""
    return lambda weights: [method(weight.reshape(-1, GROUP)).view_as(weight) for weight in weights]


def rtn_symmetric(w: Tensor) -> Tensor:
    scale = w.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 7.5
    return (w / scale).round().clamp(-8, 7) * scale


def rtn_asymmetric(w: Tensor, largest: Tensor | None = None) -> Tensor:
    """Between the smallest and the largest weight of each row of w, both first cut to +-largest where given."""
    if largest is not None:
        w = w.clamp(-largest, largest)
    scale, zero = _range(w)
    return ((w / scale + zero).round().clamp(0, 15) - zero) * scale


def _range(w: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and (rounded) zero point with which 0 and 15 are the smallest and the largest weight of each row."""
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-30) / 15
    return scale, (-low / scale).round()


def nf4(w: Tensor) -> Tensor:
    largest = w.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    values = torch.tensor(NF4)
    return values[torch.bucketize(w / largest, (values[1:] + values[:-1]) / 2)] * largest


def hqq(w: Tensor, p: float = 0.7, beta: float = 10.0, growth: float = 1.01, iterations: int = 20) -> Tensor:
    """min_z |W - s (Q - z)|_p^p by half-quadratic splitting: the shrinkage of the error, then the mean zero point."""
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-30) / 15
    zero = -low / scale
    best, least = None, float("inf")
    for _ in range(iterations):
        code = (w / scale + zero).round().clamp(0, 15)
        rounded = (code - zero) * scale
        error = float((w - rounded).abs().mean())
        if error >= least:
            break
        best, least = rounded, error
        difference = w - rounded
        size = difference.abs().clamp(min=1e-12)
        shrunk = difference.sign() * (size - size ** (p - 1) / beta).clamp(min=0)
        zero = (code - (w - shrunk) / scale).mean(-1, keepdim=True)
        beta *= growth
    return rounded if best is None else best


def awq(weights: list[Tensor], products: Tensor, magnitudes: Tensor, steps: int = 20) -> list[Tensor]:
    """The channel scales magnitudes^a of the least output error, a = 0, 1/steps, ..., then clips per group.

    Layers that read one input share its scales.
    """
    best, least = weights, float("inf")
    for i in range(steps):
        scales = magnitudes.clamp(min=1e-4) ** (i / steps)
        scales = scales / (scales.max() * scales.min()).sqrt()
        trial = [_by_group(rtn_asymmetric)([w * scales])[0] / scales for w in weights]
        error = sum(output_error(w - q, products) for w, q in zip(weights, trial, strict=True))
        if error < least:
            best, least, chosen = trial, error, scales
    if least == float("inf"):
        return best
    return [_clipped(w * chosen, products / chosen[:, None] / chosen) / chosen for w in weights]


def _clipped(weight: Tensor, products: Tensor, steps: int = 20) -> Tensor:
    """Each group with the largest weight, 1 to 0.5 of its own, of the least error of the group's part of the output."""
    n, k = weight.shape
    groups = weight.view(n, -1, GROUP)
    blocks = torch.stack([products[i : i + GROUP, i : i + GROUP] for i in range(0, k, GROUP)])
    most = groups.abs().amax(-1, keepdim=True)
    best, least = groups, torch.full((n, k // GROUP), float("inf"))
    for i in range(steps // 2 + 1):
        trial = rtn_asymmetric(groups, most * (1 - i / steps))
        error = groups - trial
        size = (torch.einsum("ngi,gij->ngj", error, blocks) * error).sum(-1)
        better = size < least
        best, least = torch.where(better[..., None], trial, best), torch.where(better, size, least)
    return best.reshape(n, k)


def gptq(weights: list[Tensor], products: Tensor, magnitudes: Tensor, damping: float = 0.01) -> list[Tensor]:
    k = len(products)
    h = products.double()
    unseen = h.diagonal() == 0
    h.diagonal()[unseen] = 1
    h.diagonal().add_(damping * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    rounded = []
    for weight in weights:
        w, q = weight.T.contiguous(), torch.empty_like(weight.T)
        for first in range(0, k, GROUP):
            last = first + GROUP
            scale, zero = (x[:, 0] for x in _range(w[first:last].T))
            errors = torch.empty_like(w[first:last])
            for j in range(first, last):
                q[j] = ((w[j] / scale + zero).round().clamp(0, 15) - zero) * scale
                errors[j - first] = (w[j] - q[j]) / u[j, j]
                w[j + 1 : last] -= u[j, j + 1 : last, None] * errors[j - first]
            w[last:] -= u[first:last, last:].T @ errors
        rounded.append(q.T)
    return rounded


def output_error(error: Tensor, products: Tensor) -> float:
    """tr(E H E^T), the squared error of the outputs over the inputs that H is the sum of x x^T of."""
    return float(((error @ products) * error).sum())


BASELINES: dict[str, tuple[Callable[..., list[Tensor]], float, bool]] = {
    "rtn_symmetric": (_by_group(rtn_symmetric), 4 + 16 / GROUP, False),
    "rtn_asymmetric": (_by_group(rtn_asymmetric), 4 + 32 / GROUP, False),
    "nf4": (_by_group(nf4), 4 + 32 / GROUP, False),
    "hqq": (_by_group(hqq), 4 + 32 / GROUP, False),
    "awq": (awq, 4 + 32 / GROUP, True),
    "gptq": (gptq, 4 + 32 / GROUP, True),
}

# What other packages do in place, with the names of the layers to quantize, and the package's name.
PACKAGES: dict[str, tuple[Callable[[nn.Module, tuple[str, ...]], None], str]] = {
    "torchao int4": (_torchao, "torchao"),
    "torchao int4 hqq": (_torchao_hqq, "torchao"),
    "bitsandbytes nf4": (_bitsandbytes, "bitsandbytes"),
}


def packages_installed() -> list[str]:
    """The names of `PACKAGES` that can run here."""
    return [name for name, (_, package) in PACKAGES.items() if importlib.util.find_spec(package) is not None]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.research.baselines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without an option, the command lists the packages of PACKAGES that are installed.",
    )
    parser.parse_args()
    for name, (_, package) in PACKAGES.items():
        print(f"{name:18} {'installed' if name in packages_installed() else f'{package} is not installed'}")


if __name__ == "__main__":
    main()

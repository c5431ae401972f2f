"""The time of one quantized linear layer by the number of rows, beside `torch.nn.Linear`; under a minute.

The rows of a batch are in different languages, as in a served batch. Each contender has several copies that take turns,
so that weights come from memory and not from the cache, as in a model.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..nn import LanguageAwareLinear, QuantConfig
from ..nn.forward_pass import LanguageState

_LANGUAGES = 12
ROWS = (1, 4, 16, 128)
# The copies of the weights of a contender take at least this many bytes together.
_BYTES = 128 << 20

CONFIGURATIONS = {
    "la_aciq W4A16": QuantConfig(activations=16, center=True),
    "la_aciq W4A8": QuantConfig(activations=8, center=True),
    "la_aciq W4A4": QuantConfig(center=True),
    "la_aciq W4A4, static": QuantConfig(clip="static", center=True),
}
_DTYPES = {"torch bfloat16": torch.bfloat16, "torch float32": torch.float32}


@dataclass(frozen=True)
class LayerTiming:
    """Median seconds of one call of a layer by its number of rows, and the bytes of its weights."""

    layer: str
    nbytes: int
    seconds: dict[int, float]


class _Rows(LanguageState):
    """A language state whose rows are in different languages."""

    def __init__(self) -> None:
        super().__init__(("und", *(f"x-{i}" for i in range(_LANGUAGES))))
        self._row_ids = 1 + torch.arange(max(ROWS), dtype=torch.int32) % _LANGUAGES

    def ids_for(self, x: torch.Tensor, layout: str | None = None) -> torch.Tensor:
        return self._row_ids[: x.shape[0]]


def measure(
    in_features: int = 4096,
    out_features: int = 4096,
    *,
    rows: Sequence[int] = ROWS,
    rounds: int = 7,
    step: Callable[[], object] | None = None,
) -> list[LayerTiming]:
    """Time each contender for each number of rows; in every round all contenders take their turn.

    Quantized layers get bfloat16 inputs, as `torch bfloat16` does.

    Args:
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        rows: numbers of rows, at most `max(ROWS)` each.
        rounds: how often each contender is timed.
        step: called after each number of rows, for progress.

    Returns:
        A timing for each contender.
    """
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(linear.weight, std=in_features**-0.5, generator=generator)
    contenders: dict[str, tuple[list[nn.Module], torch.dtype, int]] = {}
    for name, config in CONFIGURATIONS.items():
        quantized = _quantized(linear, config, generator)
        clip = quantized.weight_clip
        packed = quantized.portable_weight.nbytes + (0 if clip is None else clip.nbytes)
        contenders[name] = _copies(quantized, packed), torch.bfloat16, packed
    for name, dtype in _DTYPES.items():
        plain = copy.deepcopy(linear).to(dtype)
        contenders[name] = _copies(plain, plain.weight.nbytes), dtype, plain.weight.nbytes

    seconds: dict[str, dict[int, float]] = {name: {} for name in contenders}
    with torch.inference_mode():
        for count in rows:
            x = torch.randn(count, in_features, generator=generator)
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(rounds + 1):  # the first warms up
                for name, (layers, dtype, _) in contenders.items():
                    layer_input = x.to(dtype)
                    start = time.perf_counter()
                    for layer in layers:
                        layer(layer_input)
                    times[name].append((time.perf_counter() - start) / len(layers))
            for name, durations in times.items():
                seconds[name][count] = statistics.median(durations[1:])
            if step is not None:
                step()
    return [LayerTiming(name, nbytes, seconds[name]) for name, (_, _, nbytes) in contenders.items()]


def _quantized(linear: nn.Linear, config: QuantConfig, generator: torch.Generator) -> LanguageAwareLinear:
    state, k = _Rows(), linear.in_features
    clip = None
    if config.activations < 16:
        clip = torch.rand(len(state.entries), config.groups(k), generator=generator) + 2
    center = torch.randn(len(state.entries), k, generator=generator) / 10
    return LanguageAwareLinear.from_linear(linear, config, state, clip, center=center).to(torch.bfloat16)


def _copies(layer: nn.Module, nbytes: int) -> list[nn.Module]:
    return [layer, *(copy.deepcopy(layer) for _ in range(-(-_BYTES // nbytes) - 1))]


def table(timings: Sequence[LayerTiming]) -> str:
    """The timings as text: microseconds, and how many times as fast as `torch bfloat16`, by rows."""
    counts = list(timings[0].seconds)
    usual = next(timing for timing in timings if timing.layer == "torch bfloat16")
    heads = "".join(f"  {f'{count} row' + 's' * (count > 1):>20}" for count in counts)
    lines = [f"{'layer':<22}  {'weights':>9}{heads}"]
    for timing in timings:
        cells = [
            f"  {timing.seconds[count] * 1e6:>9.0f} us ({usual.seconds[count] / timing.seconds[count]:>4.1f}x)"
            for count in counts
        ]
        lines.append(f"{timing.layer:<22}  {timing.nbytes / 2**20:>5.1f} MiB{''.join(cells)}")
    return "\n".join(lines)

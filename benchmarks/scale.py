"""Memory and traffic of calibration and serving for a large model: computed from its shapes, nothing is measured.

`python -m benchmarks.tables` puts it into docs/serving.md. Per layer of a Llama the sites are the inputs of q, k and v,
of o, of gate and up, and of down, and keys and values by head.
"""

from dataclasses import dataclass

import torch

from la_aciq.nn.config import QuantConfig
from la_aciq.nn.forward_pass import LanguageState
from la_aciq.nn.linear import LanguageAwareLinear
from la_aciq.ops.streaming import HISTOGRAM_BINS, STATE_SIZE

LANGUAGES = 100
GROUP = 64
NETWORK = 100e9 / 8  # bytes per second of a 100 Gbit/s port


@dataclass(frozen=True)
class Llama:
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int  # of keys and values
    head_dim: int

    @property
    def inputs(self) -> list[int]:
        """K of the four inputs of a layer."""
        return [self.hidden, self.hidden, self.hidden, self.intermediate]

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(K, N) of a layer as vLLM fuses it."""
        kv = self.heads * self.head_dim
        return [
            (self.hidden, self.hidden + 2 * kv),
            (self.hidden, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        ]


MODELS = [Llama("Llama 3.1 8B", 4096, 14336, 32, 8, 128), Llama("Llama 3.1 70B", 8192, 28672, 80, 8, 128)]


def part_bytes(model: Llama) -> int:
    """Of one language: moments and histograms of its tokens and its first tokens, and float64 sums of its inputs."""
    groups = sum(k // GROUP for k in model.inputs) + 2 * model.heads
    statistics = 2 * groups * (STATE_SIZE * 8 + HISTOGRAM_BINS * 2 * 8)
    return model.layers * (statistics + 2 * sum(model.inputs) * 8)


def products_bytes(model: Llama) -> tuple[int, int]:
    """Second moments: the matrices that a process keeps, and the triangles that it sends; float32."""
    matrices = sum(k * k for k in model.inputs)
    triangles = sum(k * (k + 1) // 2 for k in model.inputs)
    return model.layers * matrices * 4, model.layers * triangles * 4


def layer_bytes(model: Llama, config: QuantConfig) -> tuple[int, int]:
    """What a replica keeps: the codes and clips of the weights, and what there is for each entry of the tables."""
    state = LanguageState(("und", *(f"x-{i}" for i in range(LANGUAGES)), "sink"))
    weights = tables = 0
    for k, n in model.linears:
        layer = LanguageAwareLinear(k, n, False, config, state, dtype=torch.bfloat16, device="meta")
        for name, buffer in layer.named_buffers():
            if name in ("weight", "weight_codes", "weight_clip"):
                weights += buffer.nbytes
            elif name in ("bias", "center", "clips"):
                tables += buffer.nbytes
    return model.layers * weights, model.layers * tables


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def table() -> str:
    """The table of docs/serving.md."""
    config = QuantConfig(activations=8, clip="static", center=True, group_size=GROUP)
    columns = []
    for model in MODELS:
        part, (matrices, triangles) = part_bytes(model), products_bytes(model)
        weights, tables = layer_bytes(model, config)
        columns.append(
            {
                "calibration: statistics of one language, which a process sends once, at most": gib(part),
                f"calibration: statistics of {LANGUAGES} languages, which the first process receives": gib(
                    LANGUAGES * part
                ),
                "calibration: seconds to receive them at 100 Gbit/s": f"{LANGUAGES * part / NETWORK:.1f}",
                "calibration: second moments in the memory of each process": gib(matrices),
                "calibration: second moments that each process sends": gib(triangles),
                "calibration: seconds to send them at 100 Gbit/s": f"{triangles / NETWORK:.1f}",
                "serving: INT4 weights with their clips, in a replica": gib(weights),
                f"serving: tables of {LANGUAGES} languages (clips, centers, biases), in a replica": gib(tables),
                "serving: tables of one language": gib(tables / (LANGUAGES + 2)),
            }
        )
    lines = ["| |" + "".join(f" {model.name} |" for model in MODELS), "|---|" + "--:|" * len(MODELS)]
    lines += ["| " + " | ".join([name, *(column[name] for column in columns)]) + " |" for name in columns[0]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table())

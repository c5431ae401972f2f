"""Every kernel on small shapes with several blocks, tiles, languages and splits, and with ends that are not whole.

For what runs a kernel many times or slows it down: orders of threads in the emulation, and compute-sanitizer on a
device (benchmarks/gpu.sh).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def small_calls() -> dict[str, Callable[[Any], tuple[Tensor, ...]]]:
    """Calls by name; each takes a namespace with the operations and returns their results."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def weights(n: int, k: int, groups: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
        return codes, torch.rand(n, groups, generator=generator) / k**0.5

    x, signs = normal(150, 256), torch.ones(256)
    table = 2 + torch.rand(3, 4, generator=generator)
    ids = torch.randint(0, 3, (150,), generator=generator, dtype=torch.int32)
    wide, wide_signs = normal(3, 4096).bfloat16(), torch.ones(4096, dtype=torch.int8)
    wide_table = 2 + torch.rand(3, 64, generator=generator)
    narrow, short, long = normal(9, 22), normal(70, 40).half(), normal(2, 20000)
    codes = torch.randint(0, 256, (150, 128), generator=generator, dtype=torch.uint8)
    activations = normal(16, 2048).bfloat16()
    coarse, fine, odd = weights(48, 2048, 32), weights(33, 96, 3), weights(20, 64, 1)
    rounding = {
        "activation_bits": 8,
        "activation_clip": "rms",
        "clips": table[:, :1],
        "activation_codebook": "midtread",
    }
    return {
        "moments": lambda ops: ops.moments(x, ids, 3, True),
        "moments of long rows": lambda ops: ops.moments(torch.arange(60000.0), None, 1, True),
        "moments, unaligned": lambda ops: ops.moments(narrow, ids[:9], 3, True),
        "quantize": lambda ops: ops.quantize(x, table, ids, 64)[:1],
        "quantize, unaligned": lambda ops: ops.quantize(narrow, table, ids[:9], 6)[:1],
        "quantize, tail sums": lambda ops: ops.quantize(x, table, ids, 64, tail_sums=True),
        "quantize, tail sums, unaligned": lambda ops: ops.quantize(narrow, table, ids[:9], 6, tail_sums=True),
        "quantize rotated": lambda ops: ops.quantize(x, table, ids, 64, "midrise", signs)[:1],
        "quantize_dynamic": lambda ops: ops.quantize_dynamic(x, table, ids, 64),
        "quantize_dynamic per row": lambda ops: ops.quantize_dynamic(wide, table[:, :1]),
        "quantize_dynamic, rows sharing a warp": lambda ops: ops.quantize_dynamic(x[:, :64].contiguous(), table[:, :1]),
        "quantize_dynamic rotated": lambda ops: ops.quantize_dynamic(
            wide, table[:, :1], None, 0, "rms", "midrise", wide_signs
        ),
        "quantize_dynamic rotated, by group": lambda ops: ops.quantize_dynamic(
            wide, wide_table, ids[:3], 64, "absmax", "midrise", wide_signs
        ),
        "quantize_dynamic irregular": lambda ops: ops.quantize_dynamic(narrow, table, None, 6),
        "quantize_dynamic, a short last group": lambda ops: ops.quantize_dynamic(short, table[:, :2], ids[:70], 32),
        "quantize_dynamic of long rows": lambda ops: ops.quantize_dynamic(long, table[:, :1]),
        "dequantize": lambda ops: (ops.dequantize(codes, table, ids, k=256, group_size=64, dtype=torch.float32),),
        "dequantize, unaligned": lambda ops: (
            ops.dequantize(codes[:, :11].contiguous(), table, ids, k=21, group_size=6, dtype=torch.bfloat16),
        ),
        "rotate": lambda ops: (ops.rotate(wide, wide_signs),),
        "linear": lambda ops: (ops.linear(activations[:7], *coarse, group_size=64),),
        "linear, 16 rows": lambda ops: (ops.linear(activations, *coarse, group_size=64),),
        "linear, one row of small groups": lambda ops: (ops.linear(activations[:1, :96], *fine, group_size=32),),
        "linear, rounded": lambda ops: (ops.linear(activations[:3, :64], *odd, **rounding),),
    }

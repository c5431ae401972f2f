"""The hardware limit, measured in the same run as what is compared with it.

A read is `torch.sum` of a float32 buffer: it is bound by memory, not arithmetic (a loop of plain vector loads reaches
the same bandwidth), and needs nothing compiled.
"""

from collections.abc import Callable

import torch


def probes(buffer: torch.Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """The traffic to time, with all threads, on a float32 buffer: name -> (function, bytes it moves)."""
    target = torch.empty_like(buffer)
    return {
        "read": (buffer.sum, buffer.nbytes),
        "write": (lambda: target.fill_(1.0), buffer.nbytes),
        "copy": (lambda: target.copy_(buffer), 2 * buffer.nbytes),
    }

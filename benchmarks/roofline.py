"""The hardware limit, measured in the same run as what is compared with it.

A read is `torch.sum` of a float32 buffer: it is bound by memory, not arithmetic (a loop of plain vector loads reaches
the same bandwidth), and needs nothing compiled. Operations return new tensors, as every PyTorch operation does, and
large ones come from the operating system page by page, zeroed; that is most of the time of an operation with a large
output. So what writes much is held against a write or copy to fresh memory; that to memory in use is shown beside it.
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
        "fresh write": (lambda: torch.full_like(buffer, 1.0), buffer.nbytes),
        "fresh copy": (buffer.clone, 2 * buffer.nbytes),
    }

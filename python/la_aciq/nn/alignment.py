"""Where tensors lie in memory, as far as results depend on it."""

import torch
from torch import nn

# PyTorch's allocator on the CPU gives memory at multiples of this many bytes.
_ALIGNMENT = 64


def align(model: nn.Module) -> None:
    """Move a model's tensors on the CPU to the alignment that PyTorch's own have.

    The last bits of a matrix product on the CPU depend on the alignment of its factors, and tensors of a file that is
    mapped into memory lie at any multiple of their elements' size. With this a loaded model gives the same bits as the
    model that was saved, in layers that are not quantized too.

    Args:
        model: The model; its parameters and buffers stay the same objects.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_inference()
        if plain and tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()

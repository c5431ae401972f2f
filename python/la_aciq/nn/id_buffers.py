"""Persistent buffers for language ids: a shape always has the same address, as a CUDA graph needs."""

import math

import torch


class IdBuffers:
    """One flat int32 buffer per role, device and power of two of elements.

    All shapes together take less than twice the memory of the largest power of two seen, whatever lengths requests
    have.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, int], torch.Tensor] = {}

    def view(self, role: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The buffer of a role, int32 of this shape, with the values that the last pass left in it."""
        number = math.prod(shape)
        size = 1 << max(number - 1, 0).bit_length()
        key = (role, device, size)
        if key not in self._buffers:
            # Made in inference mode, the buffer could not be written in place outside of it.
            with torch.inference_mode(False):
                self._buffers[key] = torch.zeros(size, dtype=torch.int32, device=device)
        return self._buffers[key][:number].view(shape)

    @property
    def elements(self) -> int:
        """How many ids all buffers hold."""
        return sum(buffer.numel() for buffer in self._buffers.values())

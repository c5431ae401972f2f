"""The Triton kernels' tests run on the first CUDA device, or in Triton's interpreter where there is none."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float


def _convert_float_rounding_bfloat16(data, source, target, rounding):
    """The interpreter truncates float32 to bfloat16, where the hardware rounds to nearest even."""
    if source != tl.float32 or target != tl.bfloat16:
        return _convert_float(data, source, target, rounding)
    values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


interpreter._convert_float = _convert_float_rounding_bfloat16


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN and the largest integers, so that an element no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)

"""The Triton kernels' tests run on the first CUDA device, or in Triton's interpreter where there is none.

Three faults of the interpreter with bfloat16, which it keeps as bit patterns, are put right here, and one of
Triton 3.6 with NumPy 2.4.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot
_cast = interpreter.InterpreterBuilder.cast_impl
_patch_tensor = interpreter._patch_lang_tensor


def _convert_float_rounding_bfloat16(data, source, target, rounding):
    """The interpreter truncates float32 to bfloat16, where the hardware rounds to nearest even."""
    if source != tl.float32 or target != tl.bfloat16:
        return _convert_float(data, source, target, rounding)
    values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def _create_dot_of_bfloat16(builder, a, b, *rest):
    """The interpreter multiplies the bit patterns as integers; bfloat16 products are exact in float32."""
    a, b = (builder.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    return _create_dot(builder, a, b, *rest)


def _cast_to_bfloat16_by_value(builder, source, target):
    """The interpreter takes an integer for the bit pattern of a bfloat16."""
    if source.dtype.scalar.is_int() and target.scalar == tl.bfloat16:
        source = _cast(builder, source, tl.float32)
    return _cast(builder, source, target)


def _patch_tensor_with_index(tensor, scope):
    """A bound of a loop is an array of one element, which NumPy 2.4 does not take for a number."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._convert_float = _convert_float_rounding_bfloat16
interpreter.InterpreterBuilder.create_dot = _create_dot_of_bfloat16
interpreter.InterpreterBuilder.cast_impl = _cast_to_bfloat16_by_value
interpreter._patch_lang_tensor = _patch_tensor_with_index


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN and the largest integers, so that an element no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)

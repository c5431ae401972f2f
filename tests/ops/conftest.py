"""Fixtures of the tests of the operations: every instruction set, poisoned outputs."""

import pytest
import torch
from op_helpers import _C, available_isas


@pytest.fixture(params=available_isas())
def isa(request):
    """Each set of kernels this CPU can run."""
    if _C is None:
        pytest.skip("needs the compiled core")
    before = _C.cpu_info()["isa"]
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(before)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory of new tensors is filled with NaN or 255, so an element that no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20260)

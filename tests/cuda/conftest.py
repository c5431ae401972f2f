"""Where the CUDA operations run: their source on the CPU, and on a device where there is one."""

import emulated
import pytest
import torch
from torch import Tensor

from la_aciq.ops.backends import why_unavailable


class Backend:
    """The operations of one implementation, for tensors made on the CPU: arguments go to it, results come back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = "cuda" if name == "cuda" else "cpu"
        self.namespace = torch.ops.la_aciq if name == "cuda" else torch.ops.la_aciq_emulated

    def __getattr__(self, operation: str):
        function = getattr(self.namespace, operation)

        def call(*args, **kwargs):
            def there(value):
                return value.to(self.device) if isinstance(value, Tensor) else value

            result = function(*map(there, args), **{name: there(value) for name, value in kwargs.items()})
            return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()

        return call


def pytest_generate_tests(metafunc):
    if "ops" in metafunc.fixturenames:
        devices = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.device_count() else []
        metafunc.parametrize("ops", ["emulated", *devices], indirect=True)


@pytest.fixture
def ops(request):
    if request.param == "cuda":
        reason = why_unavailable("cuda")
        if reason is not None:
            pytest.skip(reason)
    else:
        if emulated.compiler() is None:
            pytest.skip("no C++ compiler")
        emulated.load()
        emulated.set_order(0)
    return Backend(request.param)

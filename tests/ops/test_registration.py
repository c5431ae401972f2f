"""When `torch.ops.la_aciq.*` exists, in a process of its own."""

import subprocess
import sys

import pytest

from la_aciq.ops import backends

pytestmark = pytest.mark.skipif(backends.WHY_NO_CORE is not None, reason="needs the compiled core")

EVERY = "for name in ('moments', 'quantize', 'quantize_dynamic', 'dequantize', 'rotate', 'linear', 'round_weights'): "
META = "print(torch.ops.la_aciq.rotate(torch.ones(2, 8, device='meta'), torch.ones(8, device='meta')).shape)"


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_register_makes_the_operators_and_their_fakes():
    program = f"import la_aciq\nla_aciq.ops.register()\nimport torch\n{EVERY}getattr(torch.ops.la_aciq, name).default\n"
    assert run(program + META) == "torch.Size([2, 8])"


def test_the_first_operation_does_too():
    program = "import la_aciq, torch\nla_aciq.quantize(torch.ones(2, 8), 1.0)\n"
    assert run(program + META) == "torch.Size([2, 8])"


def test_import_la_aciq_has_ops_without_importing_torch():
    program = "import sys, la_aciq\nprint(la_aciq.ops.__name__, 'torch' in sys.modules)"
    assert run(program) == "la_aciq.ops False"


def test_register_says_why_there_are_none(monkeypatch):
    from la_aciq import UnavailableError

    monkeypatch.setattr(backends, "WHY_NO_CORE", "it was not built")
    with pytest.raises(UnavailableError, match="it was not built"):
        backends.register()

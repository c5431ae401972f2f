"""The choice of a backend by device, shape and order, and what a process without Triton or a GPU says of it."""

import json
import os
import subprocess
import sys

import pytest
import torch

import la_aciq
from benchmarks import choose_backends
from la_aciq import ops
from la_aciq.bench import in_file_names
from la_aciq.ops import backends

from .cases import DEVICE, Case, assert_codes, reference


def fake_cuda(*shape: int) -> torch.Tensor:
    """A tensor that says it is on a CUDA device, for the choice alone."""

    class Tensor:
        device = torch.device("cuda", 0)
        is_cpu = False

        def __init__(self) -> None:
            self.shape = torch.Size(shape)

        def numel(self) -> int:
            return self.shape.numel()

        def dim(self) -> int:
            return len(self.shape)

    return Tensor()


@pytest.fixture
def available(monkeypatch):
    """Declares which backends exist, whatever this machine has."""

    def declare(*names: str) -> None:
        monkeypatch.setattr(
            backends, "_WHY_NOT", {name: None if name in names else "absent" for name in backends._WHY_NOT}
        )

    monkeypatch.setattr(backends._choice, "backend", None)
    return declare


def test_every_operation_has_a_preference_for_any_number_of_rows():
    assert set(backends.PREFERENCES) == {*backends.OPERATIONS, backends.ROUNDED}
    for rules in backends.PREFERENCES.values():
        bounds = [bound for bound, _ in rules]
        assert bounds == sorted(bounds)
        assert bounds[-1] == float("inf")


def test_compiled_kernels_come_first_and_triton_without_them(available):
    available("reference", "cpu", "cuda", "triton")
    assert backends.choose("quantize", fake_cuda(4, 64)) == "cuda"
    assert backends.choose("linear", fake_cuda(16, 64)) == "cuda"
    assert backends.choose("linear", fake_cuda(2, 16, 64)) == "triton"
    assert backends.choose("linear", fake_cuda(1, 64), rounded=True) == "triton"
    available("reference", "cpu", "triton")
    assert backends.choose("quantize", fake_cuda(4, 64)) == "triton"
    available("reference", "cpu", "cuda")
    assert backends.choose("linear", fake_cuda(100, 64)) == "cuda"
    available("reference", "cpu")
    assert backends.choose("moments", fake_cuda(4, 64)) == "reference"


def test_weights_are_rounded_on_their_device_whatever_kernels_there_are(available, monkeypatch):
    available("reference", "cpu", "triton")
    for forced in (None, "triton"):
        monkeypatch.setattr(backends._choice, "backend", forced)
        assert backends.choose("round_weights", fake_cuda(4, 64)) == ("reference" if backends.WHY_NO_CORE else "cuda")
    monkeypatch.setattr(backends._choice, "backend", "reference")
    assert backends.choose("round_weights", fake_cuda(4, 64)) == "reference"


def test_cpu_tensors_use_the_compiled_kernel_even_where_triton_interprets(available):
    available("reference", "cpu", "triton")
    expected = "cpu" if backends.WHY_NO_CORE is None else "reference"
    assert backends.choose("quantize", torch.zeros(2, 4)) == expected


def test_a_backend_that_cannot_run_on_the_tensor_is_refused_with_the_reason(available):
    available("reference", "cpu", "cuda", "triton")
    with la_aciq.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' is not available: x is on cpu"):
        la_aciq.quantize(torch.zeros(2, 4), 1.0)
    with la_aciq.use_backend("cpu"), pytest.raises(RuntimeError, match="x is on cuda:0"):
        backends.choose("quantize", fake_cuda(2, 4))


def test_the_wrappers_run_every_operation_on_triton():
    case = Case(lead=(2, 3), k=96, group_size=32, ids_shape=(2,), rotated=True)
    x, clips, language_ids, signs = case.x(), case.table(), case.language_ids(), case.signs()
    with la_aciq.use_backend("triton"):
        codes, tail = la_aciq.quantize(x, clips, language_ids, group_size=32, signs=signs, tail_sums=True)
        dynamic, row_clips = la_aciq.quantize_dynamic(x, clips, language_ids, group_size=32, signs=signs)
        values = la_aciq.dequantize(codes, clips, language_ids, k=96, group_size=32)
        statistics = la_aciq.moments(x, language_ids=language_ids, num_entries=3)
        y = la_aciq.rotate(x, signs)
        weight = torch.zeros(5, 48, dtype=torch.uint8, device=DEVICE)
        weight_clip = torch.ones(5, 3, device=DEVICE)
        out = la_aciq.linear(x, weight, weight_clip, group_size=32, activation_bits=8, clips=clips[:, :1])
    assert_codes(case, codes, reference.clip_per_group(clips, language_ids, (2, 3)))
    assert_codes(case, dynamic, row_clips.double())
    assert tail.shape == (3, 3, 4)
    expected = reference.dequantize(codes, clips, language_ids, k=96, group_size=32)
    torch.testing.assert_close(values, expected, rtol=2e-7, atol=0)
    counts = torch.bincount(language_ids, minlength=3).cpu().numpy() * 3 * 96
    assert statistics.count.tolist() == counts.tolist()
    torch.testing.assert_close(y, reference.rotate(x, signs), rtol=0, atol=2e-5)
    assert out.shape == (2, 3, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a process without a GPU says")
def test_a_process_without_a_gpu_imports_no_triton_and_says_why_it_cannot_run():
    program = (
        "import json, sys, torch, la_aciq\n"
        "from la_aciq import ops\n"
        "la_aciq.quantize(torch.ones(2, 4), 1.0)\n"
        "reasons = [ops.why_unavailable(b) for b in ('triton', 'cuda')]\n"
        "print(json.dumps(['triton' in sys.modules, 'la_aciq.kernels.quantize' in sys.modules, *reasons]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    triton_imported, kernels_imported, why_no_triton, why_no_cuda = json.loads(result.stdout)
    assert not triton_imported
    assert not kernels_imported
    assert "no CUDA device" in why_no_triton
    assert why_no_cuda


def test_a_process_without_the_package_triton_says_so():
    program = (
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "from la_aciq import ops\n"
        "print(ops.why_unavailable('triton'))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "the package triton is not installed (pip install 'la-aciq[triton]')\n"


def test_kernels_that_were_never_verified_on_a_gpu_are_said_to_be(available, monkeypatch):
    available("reference", "cpu", "triton")
    monkeypatch.setattr(backends, "_FROM_ENVIRONMENT", None)
    monkeypatch.setattr(backends, "VERIFIED_ON_GPU", False)
    assert "not yet verified on a GPU: run benchmarks/gpu.sh" in backends._warning_for_cuda(True)
    assert backends._warning_for_cuda(False) is None
    monkeypatch.setattr(backends, "_FROM_ENVIRONMENT", "reference")
    assert backends._warning_for_cuda(True) is None
    monkeypatch.setattr(backends, "_FROM_ENVIRONMENT", None)
    monkeypatch.setattr(backends, "VERIFIED_ON_GPU", True)
    assert backends._warning_for_cuda(True) is None
    available("reference", "cpu")
    assert "slow reference implementation on CUDA tensors: absent; absent" in backends._warning_for_cuda(True)


def test_the_warning_about_cuda_is_given_when_a_process_with_a_gpu_imports_the_operations():
    program = "import torch; torch.cuda.device_count = lambda: 1; import la_aciq; la_aciq.ops.register()"
    environment = {name: value for name, value in os.environ.items() if name != "LA_ACIQ_BACKEND"}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode != 0) == (not backends.VERIFIED_ON_GPU)
    assert ("CUDA tensors" in result.stderr) == (not backends.VERIFIED_ON_GPU)


def test_names_of_backends_are_checked():
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, cuda, triton, got 'tpu'"):
        ops.why_unavailable("tpu")


def row(entry: str, rows: int, backend: str, median: float | None, shape: str = "") -> dict:
    timing = {"failed": "RuntimeError"} if median is None else {"median_s": median}
    name = {"operation": entry, "shape": shape or f"{rows} x 64", "implementation": f"la_aciq {backend}"}
    return {"entry": entry, "rows": rows, **name, **timing}


def result(*rows: dict, passed: bool = True) -> dict:
    """As bench_gpu writes it, but invented: no figure in it was measured."""
    checks = {name: {"passed": passed, "last": ""} for name in choose_backends.CHECKS}
    return {"device": "a device", "measured": "never", "versions": {}, "checks": checks, "rows": list(rows)}


def test_the_committed_table_is_what_its_measurements_give():
    table = json.loads(choose_backends.TABLE.read_text())
    source = table["device"] and choose_backends.TABLE.parents[2] / "benchmarks" / "results"
    measured = json.loads((source / f"{in_file_names(table['device'])}.json").read_text()) if source else None
    assert choose_backends.written(choose_backends.table_of(measured)) == choose_backends.TABLE.read_text()


def test_the_faster_backend_is_chosen_by_rows():
    times = {1: (1.0, 2.0), 16: (1.0, 1.5), 64: (1.0, 0.5), 1024: (2.0, 1.0)}
    rows = [row("linear", n, b, t) for n, pair in times.items() for b, t in zip(("cuda", "triton"), pair, strict=True)]
    preferences = choose_backends.table_of(result(*rows))["preferences"]
    cuda, triton = ["cuda", "triton"], ["triton", "cuda"]
    assert preferences["linear"] == [{"rows": 32, "backends": cuda}, {"rows": None, "backends": triton}]
    assert preferences["moments"] == [{"rows": None, "backends": cuda}]  # not measured: the default


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([("cuda", 1.0), ("triton", 1.02)], "triton"),  # a tie: the default of this entry
        ([("cuda", 1.0), ("triton", 1.05)], "cuda"),
        ([("cuda", 1.0)], "triton"),  # nothing to compare with
        ([("cuda", None), ("triton", 9.0)], "triton"),
        ([("cuda", 9.0), ("triton", None)], "cuda"),
        ([("cuda", None), ("triton", None)], "triton"),
        ([], "triton"),
    ],
)
def test_ties_failures_and_missing_measurements(rows, chosen):
    entry = "linear, rounded activations"
    table = choose_backends.table_of(result(*[row(entry, 8, *implementation) for implementation in rows]))
    (rule,) = table["preferences"][entry]
    assert (rule["rows"], rule["backends"][0]) == (None, chosen)


def test_several_shapes_of_a_number_of_rows_count_alike():
    pairs = {"a": (1.0, 4.0), "b": (1.0, 0.5), "c": (1.0, 0.5)}
    rows = [row("rotate", 8, b, t, s) for s, p in pairs.items() for b, t in zip(("cuda", "triton"), p, strict=True)]
    assert choose_backends.table_of(result(*rows[:4]))["preferences"]["rotate"][0]["backends"][0] == "cuda"
    assert choose_backends.table_of(result(*rows[2:]))["preferences"]["rotate"][0]["backends"][0] == "triton"


def test_verified_is_what_passed_every_check():
    good = row("rotate", 8, "cuda", 1.0)
    assert choose_backends.table_of(result(good))["verified"]
    assert not choose_backends.table_of(None)["verified"]
    assert not choose_backends.table_of(result())["verified"]
    assert not choose_backends.table_of(result(good, passed=False))["verified"]
    assert not choose_backends.table_of(result(good, row("rotate", 8, "triton", None)))["verified"]
    unchecked = result(good)
    del unchecked["checks"]["racecheck"]
    assert not choose_backends.table_of(unchecked)["verified"]


def test_a_table_of_ones_own(tmp_path):
    rows = [row("quantize", 8, "cuda", 2.0), row("quantize", 8, "triton", 1.0)]
    path = tmp_path / "table.json"
    path.write_text(choose_backends.written(choose_backends.table_of(result(*rows))))
    assert backends.read_table(path)[0]["quantize"] == ((float("inf"), ("triton", "cuda")),)
    program = "from la_aciq import backends as b; print(b.PREFERENCES['quantize'][0][1][0], b.VERIFIED_ON_GPU)"
    environment = os.environ | {"LA_ACIQ_BACKEND_TABLE": str(path)}
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert process.stdout == "triton True\n"


@pytest.mark.parametrize("content", [None, "{}", "not JSON"])
def test_a_table_of_ones_own_that_is_none_names_the_variable_and_the_file(tmp_path, content):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    environment = os.environ | {"LA_ACIQ_BACKEND_TABLE": str(path)}
    command = [sys.executable, "-c", "from la_aciq import cli; raise SystemExit(cli.main(['info']))"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert f"LA_ACIQ_BACKEND_TABLE: {path} is not a table of backends: " in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(schema=2), "schema 1, got 2"),
        (lambda table: table.pop("verified"), "KeyError: 'verified'"),
        (lambda table: table["preferences"].pop("rotate"), "expected the operations moments"),
        (lambda table: table["preferences"].update(rotate=[{"rows": 8, "backends": ["cuda"]}]), "null at last"),
        (lambda table: table["preferences"].update(rotate=[]), "null at last"),
        (lambda table: table["preferences"].update(rotate=[{"rows": None, "backends": ["tpu"]}]), "got \\['tpu'\\]"),
        (lambda table: table.update(preferences=3), "AttributeError"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, change, message):
    table = choose_backends.table_of(None)
    change(table)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"table.json is not a table of backends: .*{message}"):
        backends.read_table(path)

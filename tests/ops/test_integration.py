"""The operations inside PyTorch: registration, torch.compile, threads, processes, and without the compiled core."""

import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from op_helpers import _C, make_inputs

import la_aciq
from la_aciq import ops
from la_aciq.ops import backends, reference

needs_core = pytest.mark.skipif(_C is None, reason="needs the compiled core")
ROOT = Path(__file__).parents[2]
ONE = torch.ones(1, 1)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [*backends.OPERATIONS, "round_weights"])
def test_opcheck(op, dtype):
    for args, kwargs in make_inputs(op, dtype):
        torch.library.opcheck(getattr(torch.ops.la_aciq, op).default, args, kwargs)


@pytest.mark.parametrize(("backend", "namespace"), [("cpu", "la_aciq"), ("triton", "la_aciq_triton")])
@pytest.mark.parametrize("op", [*backends.OPERATIONS, "round_weights"])
def test_the_reference_has_the_signatures_of_the_schema(op, backend, namespace):
    """ops.py leaves out what is a default of the reference, and the operator then takes its own."""
    if (reason := backends.why_unavailable(backend)) is not None:
        pytest.skip(reason)
    if backend == "triton" and op in backends.IN_PYTORCH_ON_CUDA:
        assert not hasattr(torch.ops.la_aciq_triton, op)
        return
    operator = getattr(getattr(torch.ops, namespace), op).default
    arguments = operator._schema.arguments
    expected = {a.name: a.default_value if a.has_default_value() else inspect.Parameter.empty for a in arguments}
    if op == "dequantize":
        device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
        codes = torch.zeros(1, 1, dtype=torch.uint8, device=device)
        assert operator(codes, ONE.to(device), k=2).dtype == torch.float32
        expected["dtype"] = torch.float32  # which the schema knows by number
    signature = inspect.signature(getattr(reference, op))
    assert {parameter.name: parameter.default for parameter in signature.parameters.values()} == expected


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_wrappers_compile_without_graph_breaks(backend, dynamic):
    if backend == "cpu" and _C is None:
        pytest.skip("needs the compiled core")

    def everything(x, clips, language_ids, signs, weight, weight_clip):
        codes, tail = la_aciq.quantize(x, clips, language_ids, group_size=32, signs=signs, tail_sums=True)
        values = la_aciq.dequantize(codes, clips, language_ids, k=x.shape[-1], group_size=32, dtype=x.dtype)
        dynamic_codes, row_clips = la_aciq.quantize_dynamic(x, 2.5, group_size=32, codebook="midtread")
        more = la_aciq.dequantize(dynamic_codes, row_clips=row_clips, k=x.shape[-1], group_size=32, codebook="midtread")
        y = la_aciq.linear(
            la_aciq.rotate(values, signs) + more,
            weight,
            weight_clip,
            activation_bits=8,
            clips=clips,
            language_ids=language_ids,
            activation_group_size=32,
        )
        state, histogram = ops.moments_state(y, language_ids, clips.shape[0], histogram=True)
        return codes, tail, values, row_clips, y, state, histogram

    generator = torch.Generator().manual_seed(1)
    clips = torch.rand(3, 3, generator=generator) + 1
    signs = torch.randint(0, 2, (96,), generator=generator).float() * 2 - 1
    weight = torch.randint(0, 256, (10, 48), generator=generator, dtype=torch.uint8)
    weight_clip = torch.rand(10, 1, generator=generator)
    torch._dynamo.reset()
    with la_aciq.use_backend(backend):
        compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for batch in (2, 5):
            x = torch.randn(batch, 4, 96, generator=generator)
            language_ids = torch.randint(0, 3, (batch,), generator=generator, dtype=torch.int32)
            arguments = (x, clips, language_ids, signs, weight, weight_clip)
            for got, expected in zip(compiled(*arguments), everything(*arguments), strict=True):
                torch.testing.assert_close(got, expected)


@needs_core
def test_rounding_weights_compiles_without_graph_breaks():
    torch._dynamo.reset()
    weight, eye = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)), torch.eye(48)

    def rounded(weight, eye):
        codes, row_clips = ops.round_weights(weight * 2, eye, eye, group_size=16)
        return la_aciq.dequantize(codes, row_clips=row_clips, k=48, group_size=16)

    compiled = torch.compile(rounded, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (weight, weight[:3]):
        torch.testing.assert_close(compiled(rows, eye), rounded(rows, eye))


@needs_core
def test_inductor_calls_the_kernels(tmp_path, monkeypatch):
    # Inductor's cache does not tell apart what it compiled under other settings of ATEN_CPU_CAPABILITY.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    function = torch.compile(lambda t: la_aciq.dequantize(la_aciq.quantize(t * 2, 2.0), 2.0, k=64) + 1, fullgraph=True)
    torch.testing.assert_close(function(x), la_aciq.dequantize(la_aciq.quantize(x * 2, 2.0), 2.0, k=64) + 1)


def every_result(x, language_ids):
    generator = torch.Generator().manual_seed(0)
    k = x.shape[-1]
    signs = torch.randint(0, 2, (k,), generator=generator).float() * 2 - 1
    weight = torch.randint(0, 256, (70, k // 2), generator=generator, dtype=torch.uint8)
    weight_clip = torch.rand(70, 1, generator=generator)
    clips = torch.rand(4, k // 32, generator=generator) + 1
    codes, tail = la_aciq.quantize(x, clips, language_ids, group_size=32, tail_sums=True)
    return [
        codes,
        tail,
        *la_aciq.quantize_dynamic(x, clips, language_ids, group_size=32, signs=signs),
        la_aciq.dequantize(codes, clips, language_ids, k=k, group_size=32),
        la_aciq.rotate(x, signs),
        *ops.moments_state(x, language_ids, 4, histogram=True),
        la_aciq.linear(x[:3], weight, weight_clip),
    ]


@needs_core
@pytest.mark.skipif(sys.platform != "linux", reason="threads need OpenMP, which the build asks for on Linux")
def test_the_core_uses_the_threads_of_torch():
    assert _C.cpu_info()["threads"] == torch.get_num_threads()
    assert _C.build_info()["torch"].split(".")[:2] == torch.__version__.split(".")[:2]


@needs_core
def test_results_do_not_depend_on_the_number_of_threads(isa):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1500, 192, generator=generator) + 5
    language_ids = torch.randint(0, 4, (1500,), generator=generator, dtype=torch.int32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(every_result(x, language_ids))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one, other)


@needs_core
def test_every_instruction_set_gives_the_same_codes():
    """So a checkpoint or a cache made on one machine means the same on another."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, 192, generator=generator) * 2
    language_ids = torch.randint(0, 4, (300,), generator=generator, dtype=torch.int32)
    before = _C.cpu_info()["isa"]
    try:
        results = []
        for isa in _C.cpu_info()["available"]:
            _C.force_isa(isa)
            results.append(every_result(x, language_ids))
    finally:
        _C.force_isa(before)
    for others in results[1:]:
        for one, other in zip(results[0][:6], others[:6], strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match="isa: expected one of"):
        _C.force_isa("sse9")


def test_many_python_threads_at_once():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 64, generator=generator)
    language_ids = torch.randint(0, 4, (400,), generator=generator, dtype=torch.int32)
    expected = every_result(x, language_ids)
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(lambda _: every_result(x, language_ids), range(40)):
            for got, want in zip(results, expected, strict=True):
                assert torch.equal(got, want)


def test_backend_choice_is_per_thread():
    x = torch.randn(4, 8)
    with la_aciq.use_backend("reference"):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: backends._choice.backend).result() == os.environ.get("LA_ACIQ_BACKEND")
        assert backends._choice.backend == "reference"
        with la_aciq.use_backend("reference"):
            la_aciq.quantize(x, 1.0)
        assert backends._choice.backend == "reference"
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, cuda, triton, got 'gpu'"):
        la_aciq.use_backend("gpu").__enter__()


def test_backend_from_the_environment():
    code = "import torch, la_aciq; print(la_aciq.quantize(torch.ones(2), 1.0))"
    good = run_python(code, LA_ACIQ_BACKEND="reference")
    assert good.returncode == 0
    bad = run_python(code, LA_ACIQ_BACKEND="cuda")
    assert bad.returncode != 0
    assert "backend 'cuda' (of LA_ACIQ_BACKEND) is not available" in bad.stderr
    unknown = run_python(code, LA_ACIQ_BACKEND="tpu")
    assert unknown.returncode != 0
    assert "LaAciqError: LA_ACIQ_BACKEND: expected one of reference, cpu, cuda, triton, got 'tpu'" in unknown.stderr


@needs_core
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_use():
    """A forked worker that runs torch on one thread, as DataLoader's workers do."""
    code = """
import os, torch, la_aciq
x = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))
expected = la_aciq.quantize(x, 2.0)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(not torch.equal(la_aciq.quantize(x, 2.0), expected))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_without_the_compiled_core():
    """One warning, and the results of the reference."""
    code = """
import sys, warnings
sys.modules["la_aciq._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, la_aciq
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        codes, tail = la_aciq.quantize(x, 2.0, group_size=32, tail_sums=True)
    m = la_aciq.moments(x, histogram=True)
    y = la_aciq.linear(x, codes[:5], torch.ones(5, 1))
    compiled = torch.compile(lambda t: la_aciq.quantize(t, 2.0), fullgraph=True, backend="eager")(x)
ours = [w for w in caught if "la_aciq" in str(w.message)]
assert len(ours) == 1, ours
assert ours[0].category is RuntimeWarning and "slow reference" in str(ours[0].message)
try:
    with la_aciq.use_backend("cpu"):
        pass
except RuntimeError as error:
    assert "compiled core" in str(error)
else:
    raise AssertionError
torch.save((codes, tail, m.state, m.histogram, y), sys.argv[1])
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "results.pt")
        result = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, check=False, timeout=120
        )
        assert result.returncode == 0, result.stderr
        codes, tail, state, histogram, y = torch.load(path, weights_only=False)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    expected_codes, expected_tail = la_aciq.quantize(x, 2.0, group_size=32, tail_sums=True)
    m = la_aciq.moments(x, histogram=True)
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(tail, expected_tail, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.from_numpy(state), torch.from_numpy(m.state), rtol=1e-10, atol=1e-10)
    assert (histogram == m.histogram).all()
    torch.testing.assert_close(y, la_aciq.linear(x, codes[:5], torch.ones(5, 1)))


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({"LA_ACIQ_BUILD": "0"}, 0, "installing without the C++ core, LA_ACIQ_BUILD=0"),
        ({"LA_ACIQ_BUILD": "", "CXX": "/no/such/compiler"}, 0, "no C++ compiler was found"),
        ({"LA_ACIQ_BUILD": "1", "CXX": "/no/such/compiler"}, 1, "LA_ACIQ_BUILD=1, but the C++ core cannot be built"),
        (
            {"LA_ACIQ_CUDA": "1", "CUDA_HOME": "/no/such/toolkit"},
            1,
            "LA_ACIQ_CUDA=1, but the CUDA kernels cannot be built",
        ),
    ],
)
def test_build_says_what_it_does(environment, code, message):
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == code
    assert message in result.stderr

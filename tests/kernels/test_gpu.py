"""What only a GPU can show: streams, graph capture, several devices, torch.compile, offsets beyond 2^31."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import la_aciq
from la_aciq.ops import backends

from .cases import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASE = Case(lead=(64,), k=4096, group_size=64, dtype=torch.bfloat16, num_entries=12, ids_shape=(64,))


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request):
    """Every test runs on both backends of a CUDA tensor, as far as they are there."""
    reason = backends.why_unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    with la_aciq.use_backend(request.param):
        yield request.param


def problem(device: str = "cuda"):
    x, clips, language_ids = CASE.x().to(device), CASE.table().to(device), CASE.language_ids().to(device)
    signs = (1 - 2 * torch.randint(0, 2, (CASE.k,), generator=CASE.generator())).to(device=device, dtype=torch.int8)
    weight = torch.randint(0, 256, (512, CASE.k // 2), generator=CASE.generator(), dtype=torch.uint8).to(device)
    weight_clip = torch.rand(512, CASE.groups, generator=CASE.generator()).to(device) + 0.5
    return x, clips, language_ids, signs, weight, weight_clip


def all_operations(x, clips, language_ids, signs, weight, weight_clip) -> list[torch.Tensor]:
    """Every operation, with tail sums, rotation and rounded activations."""
    size = CASE.group_size
    codes, tail = la_aciq.quantize(x, clips, language_ids, group_size=size, tail_sums=True)
    rotated_codes = la_aciq.quantize(x, clips, language_ids, group_size=size, signs=signs)
    dynamic, row_clips = la_aciq.quantize_dynamic(x, clips, language_ids, group_size=size, signs=signs)
    state, histogram = la_aciq.ops.moments_state(x, language_ids, clips.shape[0], histogram=True)
    options = {"clips": clips, "language_ids": language_ids, "activation_group_size": size, "group_size": size}
    return [
        codes,
        tail,
        rotated_codes,
        dynamic,
        row_clips,
        state,
        histogram,
        la_aciq.dequantize(codes, clips, language_ids, k=CASE.k, group_size=size, dtype=torch.bfloat16),
        la_aciq.rotate(x, signs),
        la_aciq.linear(x, weight, weight_clip, group_size=size),
        la_aciq.linear(x[:1], weight, weight_clip, group_size=size),
        la_aciq.linear(x, weight, weight_clip, signs=signs, activation_bits=8, **options),
        la_aciq.linear(x, weight, weight_clip, signs=signs, activation_bits=4, activation_clip="rms", **options),
    ]


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a.to(b.device), b), f"result {index}"


def test_results_repeat_bit_for_bit():
    arguments = problem()
    assert_same(all_operations(*arguments), all_operations(*arguments))


def test_two_streams_at_once():
    """Work runs on the current stream: each stream's inputs are written on it behind a long wait, before the calls."""
    arguments = problem()
    expected = all_operations(*arguments)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[list[torch.Tensor]] = []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late = [torch.zeros_like(argument) for argument in arguments]
            for target, source in zip(late, arguments, strict=True):
                target.copy_(source)
            results.append(all_operations(*late))
    torch.cuda.synchronize()
    for result in results:
        assert_same(result, expected)


def test_replays_see_the_ids_the_table_and_the_input_of_their_time():
    arguments = problem()
    warm_up = torch.cuda.Stream()
    with torch.cuda.stream(warm_up):
        all_operations(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_operations(*arguments)
    x, clips, language_ids, *_ = arguments
    for step in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(step)))
        clips.mul_(1.25)
        language_ids.copy_(torch.randint(-2, 14, language_ids.shape, generator=torch.Generator().manual_seed(step)))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, all_operations(*arguments))


def test_the_first_call_of_a_process_inside_a_capture_works_or_fails_clearly_and_never_corrupts(backend, tmp_path):
    program = Path(__file__).with_name("first_calls.py")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}  # so that Triton compiles inside the capture
    command = [sys.executable, program, backend]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert outcomes.keys() == set(backends.OPERATIONS)
    assert all(outcome == "worked" or "captur" in outcome for outcome in outcomes.values()), outcomes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_than_the_current_device():
    expected = all_operations(*problem("cuda:0"))
    with torch.cuda.device(0):
        result = all_operations(*problem("cuda:1"))
    assert {tensor.device.index for tensor in result} == {1}
    assert_same(result, expected)


def test_torch_compile_gives_the_same():
    arguments = problem()
    compiled = torch.compile(all_operations, fullgraph=True, mode="reduce-overhead")
    expected = all_operations(*arguments)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same([tensor.clone() for tensor in compiled(*arguments)], expected)


def test_no_operation_waits_for_the_device():
    """The sync debug mode raises at anything that would."""
    arguments = problem()
    all_operations(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_operations(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_to_the_31_elements():
    rows, k = 2**16 + 5, 2**15
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    x = torch.ones(rows, k, dtype=torch.bfloat16, device="cuda")
    x[-1] = -1
    codes = la_aciq.quantize(x, 1.0)
    assert (codes[:-1] == 0xFF).all()
    assert (codes[-1] == 0x00).all()
    values = la_aciq.dequantize(codes[-2:], 1.0, k=k)
    assert values.sum() == 0
    state, _ = la_aciq.ops.moments_state(x)
    assert state[0, 0] == rows * k
    torch.testing.assert_close(state[0, 1].item(), (rows - 2) / rows, rtol=1e-12, atol=0)


@pytest.mark.parametrize("opcheck_tests", [("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")])
def test_opcheck(backend, opcheck_tests):
    namespace = torch.ops.la_aciq_triton if backend == "triton" else torch.ops.la_aciq
    x, clips, language_ids, signs, weight, weight_clip = problem()
    calls = [
        (namespace.moments, (x, language_ids, 12, True), {}),
        (namespace.quantize, (x, clips, language_ids, 64, "midrise", signs, 0, True), {}),
        (namespace.quantize_dynamic, (x, clips, language_ids, 64), {}),
        (namespace.rotate, (x, signs), {}),
        (namespace.linear, (x, weight, weight_clip), {"group_size": 64}),
    ]
    for operation, arguments, options in calls:
        torch.library.opcheck(operation.default, arguments, options, test_utils=opcheck_tests)

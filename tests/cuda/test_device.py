"""What only a device shows: streams, graphs, several devices, compiled code, and offsets beyond 32 bits."""

import pytest
import torch

import la_aciq
from la_aciq.ops import reference
from la_aciq.ops.backends import why_unavailable
from la_aciq.ops.functional import moments_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(why_unavailable("cuda") is not None, reason=str(why_unavailable("cuda"))),
]


@pytest.fixture(autouse=True)
def compiled_kernels():
    with la_aciq.use_backend("cuda"):
        yield


def inputs(rows: int = 64, k: int = 512):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator)
    table = 1.5 + torch.rand(3, k // 64, generator=generator)
    ids = torch.randint(0, 3, (rows,), generator=generator, dtype=torch.int32)
    return x.cuda(), table.cuda(), ids.cuda()


def every_operation(x, table, ids):
    signs = torch.ones(x.shape[-1], dtype=torch.int8, device=x.device)
    codes, tail = la_aciq.quantize(x, table, ids, group_size=64, tail_sums=True)
    dynamic, row_clips = la_aciq.quantize_dynamic(x, table, ids, group_size=64, signs=signs)
    values = la_aciq.dequantize(codes, table, ids, k=x.shape[-1], group_size=64)
    y = la_aciq.linear(x[:4].bfloat16(), dynamic, row_clips, group_size=64)
    state, counts = moments_state(x, ids, 3, histogram=True)
    return codes, tail, dynamic, row_clips, values, y, state, counts, la_aciq.rotate(x, signs)


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_repeats_bit_for_bit():
    arguments = inputs(3000)
    expected = every_operation(*arguments)
    for _ in range(5):
        assert_equal(every_operation(*arguments), expected)


def test_nothing_waits_for_the_device():
    arguments = inputs()
    every_operation(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_operation(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams():
    jobs = [inputs(2000, 512), inputs(2000, 512)]
    jobs[1][0].mul_(2)
    expected = [every_operation(*job) for job in jobs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = [None, None]
    torch.cuda.synchronize()
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i] = every_operation(*jobs[i])
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert_equal(result, wanted)


def test_replay_sees_new_ids_and_a_new_table():
    x, table, ids = inputs()
    every_operation(x, table, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = every_operation(x, table, ids)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn(x.shape, generator=generator))
        table.copy_(1 + torch.rand(table.shape, generator=generator))
        ids.copy_(torch.randint(-1, 4, ids.shape, generator=generator, dtype=torch.int32))  # also out of range
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(results, every_operation(x, table, ids))


def test_compiled_code():
    x, table, ids = inputs()

    def step(x, table, ids):
        codes = la_aciq.quantize(x * 2, table, ids, group_size=64)
        return la_aciq.dequantize(codes, table, ids, k=x.shape[-1], group_size=64) + 1

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        torch.testing.assert_close(compiled(x, table, ids).clone(), step(x, table, ids))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_counts():
    x, table, ids = (tensor.to("cuda:1") for tensor in inputs())
    expected = every_operation(*inputs())
    with torch.cuda.device(0):
        results = every_operation(x, table, ids)
    assert_equal([result.cpu() for result in results], [wanted.cpu() for wanted in expected])


def test_tensors_on_other_devices_are_refused():
    x, table, ids = inputs()
    with pytest.raises(ValueError, match="clips: expected on cuda:0"):
        torch.ops.la_aciq.quantize(x, table.cpu(), ids, 64)
    with pytest.raises(ValueError, match="language_ids: expected on cuda:0"):
        torch.ops.la_aciq.quantize(x, table, ids.cpu(), 64)


@pytest.mark.parametrize("num_entries", [1, 1024])
def test_a_million_rows(num_entries):
    rows = 10**6
    x = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16)
    ids = (torch.arange(rows, device="cuda") % num_entries).to(torch.int32)
    table = torch.full((num_entries, 1), 2.5, device="cuda")
    codes, tail = la_aciq.quantize(x, table, ids, tail_sums=True)
    assert torch.equal(codes, reference.quantize(x, table, ids)[0])
    torch.testing.assert_close(tail, reference.quantize(x, table, ids, tail_sums=True)[1], rtol=1e-6, atol=0)
    state, _ = moments_state(x, ids, num_entries)
    torch.testing.assert_close(state[:, :3], reference.moments(x, ids, num_entries)[0][:, :3], rtol=1e-5, atol=1e-6)


def test_offsets_beyond_32_bits():
    """More than 2^32 elements; the last rows are what they are alone."""
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free memory on the device")
    rows, k = 2**21 + 3, 2048
    x = torch.empty(rows, k, device="cuda", dtype=torch.bfloat16).normal_()
    table = torch.full((1, k // 64), 2.5, device="cuda")
    last = x[-3:].clone()
    codes = la_aciq.quantize(x, table, group_size=64)
    assert torch.equal(codes[-3:], la_aciq.quantize(last, table, group_size=64))
    values = la_aciq.dequantize(codes, table, k=k, group_size=64, dtype=torch.bfloat16)
    expected = la_aciq.dequantize(codes[-3:].clone(), table, k=k, group_size=64, dtype=torch.bfloat16)
    assert torch.equal(values[-3:], expected)
    del values, codes
    dynamic, row_clips = la_aciq.quantize_dynamic(x, table, group_size=64)
    assert_equal((dynamic[-3:], row_clips[-3:]), la_aciq.quantize_dynamic(last, table, group_size=64))
    state, _ = moments_state(x)
    assert state[0, 0] == rows * k

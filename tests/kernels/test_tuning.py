"""Launch parameters: where they come from, that they reach the launch, and that results do not depend on them."""

import importlib
import json

import pytest
import torch

from benchmarks import triton_compile, tune_triton
from la_aciq.ops import reference

from .cases import DEVICE, Case, assert_codes, kernel

tuning = importlib.import_module("la_aciq.kernels.tuning")
PARAMETERS = {"tile", "per_thread", "block_m", "block_n", "warps", "stages", "programs"}
# What a block may have (CUDA C++ Programming Guide, technical specifications per compute capability), bytes.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


def keys() -> set[str]:
    return {make().key for make in tune_triton.problems("meta")}


def launches(run) -> dict[str, tuple[dict, dict]]:
    """Arguments and options by kernel."""
    return {launched.fn.__name__: (arguments, options) for launched, arguments, options in triton_compile.record(run)}


def test_the_committed_table_has_known_keys_and_parameters():
    for entries in json.loads(tune_triton.TABLE.read_text())["devices"].values():
        assert entries.keys() <= keys()
        for entry in entries.values():
            assert entry.keys() <= PARAMETERS
            assert all(value > 0 for value in entry.values())


def test_a_device_that_was_not_measured_follows_the_heuristics(monkeypatch):
    x = torch.empty(40000, 64, device="meta")
    heuristic = tuning.streaming("quantize", x)
    monkeypatch.setattr(tuning, "_measured", lambda: {"another device": {"quantize, 4 bytes, large": {"tile": 2048}}})
    monkeypatch.setattr(tuning, "_device_name", lambda index: "this device")
    assert tuning.entries(torch.device("cuda", 0)) == {}
    monkeypatch.setattr(tuning, "_device_name", lambda index: "another device")
    assert tuning.entries(torch.device("cuda", 0)) == {"quantize, 4 bytes, large": {"tile": 2048}}
    assert tuning.entries(torch.device("cpu")) == {}
    with tuning.use(tuning.entries(torch.device("cuda", 0))):
        assert tuning.streaming("quantize", x) == heuristic | {"tile": 2048}
        assert tuning.streaming("quantize", x[:8]) == heuristic
        assert tuning.streaming("dequantize", x) == {"tile": tuning.TILE, "per_thread": 32}


@pytest.mark.parametrize("kernel_name", sorted(tuning.PER_THREAD))
def test_an_entry_reaches_the_launch_of_its_kernel(kernel_name):
    problem = tune_triton.streaming_problem(kernel_name, 512, torch.float32, "meta")
    name = f"{kernel_name.removesuffix(' rotated')}_kernel"
    before = launches(problem.run)[name]
    with tuning.use({problem.key: {"tile": 16384, "per_thread": 64}}):
        arguments, options = launches(problem.run)[name]
    elements = arguments["PIECES"] * arguments["WIDTH"]
    assert elements == 16384 > before[0]["PIECES"] * before[0]["WIDTH"]
    assert options["num_warps"] == 16384 // (32 * 64)


def test_an_entry_reaches_the_launch_of_linear():
    problem = tune_triton.linear_problem(16, 16, "meta")
    assert launches(problem.run)["linear_kernel"][1] == {"num_warps": 4, "num_stages": 3}
    with tuning.use({problem.key: {"block_n": 128, "warps": 8, "stages": 4, "programs": 1}}):
        arguments, options = launches(problem.run)["linear_kernel"]
    assert arguments["BLOCK_N"] == 128
    assert options == {"num_warps": 8, "num_stages": 4}
    assert arguments["segments_per_split"] == 16  # 32 tiles of columns and 132 multiprocessors: 4 splits of 64 segments


@pytest.mark.gpu
@pytest.mark.parametrize("parameters", [{"tile": 512, "per_thread": 16}, {"tile": 8192, "per_thread": 64}], ids=str)
def test_results_are_right_with_any_parameters(parameters):
    case = Case(lead=(5,), k=192, group_size=48, ids_shape=(5,), rotated=True, block_size=16)
    x, clips, language_ids, signs = case.x(), case.table(), case.language_ids(), case.signs()
    size = "4 bytes, small"
    with tuning.use({f"{name}, {size}": parameters for name in tuning.PER_THREAD}):
        codes, _ = kernel("quantize")(x, clips, language_ids, 48, "midrise", signs, 16)
        dynamic, row_clips = kernel("quantize_dynamic")(x, clips, language_ids, 48, "rms", "midrise", signs, 16)
        values = kernel("dequantize")(codes, clips, language_ids, k=192, group_size=48)
        state, _ = kernel("moments")(x, language_ids, 3)
        y = kernel("rotate")(x, signs, 16)
    assert_codes(case, codes, reference.clip_per_group(clips, language_ids, (5,)))
    assert_codes(case, dynamic, row_clips.double())
    expected = reference.dequantize(codes, clips, language_ids, k=192, group_size=48)
    torch.testing.assert_close(values, expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(state, reference.moments(x, language_ids, 3)[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(y, reference.rotate(x, signs, 16), rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8])
def test_linear_is_right_with_any_parameters(bits):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 512, generator=generator).to(torch.bfloat16).to(DEVICE)
    weight = torch.randint(0, 256, (40, 256), generator=generator, dtype=torch.uint8).to(DEVICE)
    weight_clip = (torch.rand(40, 8, generator=generator) + 0.5).to(DEVICE)
    options = {"group_size": 64}
    if bits < 16:
        options |= {"activation_bits": bits, "clips": torch.full((1, 1), 4.0, device=DEVICE)}
    expected = kernel("linear")(x, weight, weight_clip, **options)
    for parameters in ({"block_n": 32, "warps": 2}, {"block_m": 32, "block_n": 128, "stages": 2, "programs": 32}):
        with tuning.use({tuning.linear_key(3, x.dtype, bits): parameters}):
            out = kernel("linear")(x, weight, weight_clip, **options)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-1)


def test_the_faster_candidate_is_taken_if_it_is_right():
    heuristic, right = torch.tensor([1.0]), {"tile": 1}
    outputs = {1: heuristic, 2: heuristic, 3: torch.tensor([2.0]), 4: heuristic}
    seconds = {0: 1.0, 1: 0.9, 2: 0.5, 3: 0.1, 4: 0.99}
    now = 0

    def run():
        nonlocal now
        now = tuning.entries(torch.device("meta")).get("key", {}).get("tile", 0)
        if now == 5:
            raise RuntimeError("out of shared memory")
        return outputs.get(now, heuristic)

    def median(call):
        call()
        return seconds[now]

    def entry(*tiles):
        return tune_triton.best_entry(tune_triton.Problem("key", run, [{"tile": t} for t in tiles]), median)

    assert entry(1, 2, 3, 4, 5) == ({"tile": 2}, 2.0)
    assert entry(1) == (right, pytest.approx(1 / 0.9))
    assert entry(3, 4, 5) == ({}, 1.0)


def test_every_candidate_compiles_for_every_target_without_spills():
    record = json.loads(triton_compile.CANDIDATES.read_text())["candidates"]
    for target, limit in SHARED_MEMORY.items():
        rows = [row for row in record if row["target"] == target]
        assert {(row["key"], *row["candidate"].items()) for row in rows} == {
            (key, *candidate.items()) for key, candidate, _ in triton_compile.candidates()
        }
        assert not [row for row in rows if row["spills"] or row["shared"] > limit]

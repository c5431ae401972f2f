"""Clips that follow what is served, in a real engine every step of which is a sample."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

from vllm import SamplingParams

import la_aciq
from la_aciq.checkpoint.folder import SCHEMA, read_folder
from la_aciq.errors import LaAciqError
from la_aciq.integrations.vllm import adapt, tail_sums
from la_aciq.integrations.vllm.method import LaAciqVllmConfig, _tensor_files
from la_aciq.ops import reference

PROMPT = "The committee met on Tuesday, and nobody could say why the river had risen."
TOKENS = 24


@pytest.fixture
def llm(static_llm):
    return static_llm


@pytest.fixture
def config(llm):
    return llm.llm_engine.vllm_config.quant_config


@pytest.fixture
def engine(llm):
    return llm.llm_engine.engine_core.engine_core


def ask(llm, tag, prompt=PROMPT):
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args={"language": tag})
    return llm.generate(prompt, parameters, use_tqdm=False)[0]


def clips(config):
    return [sums.clips.clone() for sums in config.tail_sums]


def test_folders_of_both_schemas_are_served(config, served_folder):
    """This engine has a folder of schema 2, that of test_engine.py one of the present schema."""
    assert config.description["schema"] == 2
    assert json.loads((served_folder / "config.json").read_text())["quantization_config"]["schema"] == SCHEMA


def test_values_and_clipped_values_by_entry(llm, engine, config, static):
    """All tokens are counted once under their entries, and as many are clipped as float64 arithmetic finds."""
    ask(llm, "sw")
    before = adapt.report(engine, config)
    llm.reset_prefix_cache()
    output = ask(llm, "sw")
    change = {entry: np.subtract(now, before[entry]) for entry, now in adapt.report(engine, config).items()}
    tokens = len(output.prompt_token_ids) + TOKENS - 1  # the last one is not computed
    width = sum(sums.layer.in_features for sums in config.tail_sums)
    assert {entry: counts[0] for entry, counts in change.items()} == {
        **dict.fromkeys(change, 0),
        "sw": (tokens - 1) * width,
        "sink": width,
    }

    clipped = 0.0
    handles = []
    wanted = {sums.name for sums in config.tail_sums}
    entry = config.entries.index("sw")

    def count(layer, inputs):
        nonlocal clipped
        x = (inputs[0][0, 1:] - layer.center[entry]).double()
        rotated = reference.rotate(x, layer.signs, layer.block_size)
        bound = layer.clips[entry].double().repeat_interleave(64)[: x.shape[1]]
        clipped += (rotated.abs() > bound).sum().item()

    for name, module in static.named_modules():
        if name in wanted:
            handles.append(module.register_forward_pre_hook(count))
    ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]])
    with torch.no_grad(), la_aciq.language("sw"):
        static(ids)
    for handle in handles:
        handle.remove()
    assert len(wanted) == 8
    assert clipped > 100
    assert change["sw"][1] == pytest.approx(clipped, rel=0.01)


def test_without_adapt_nothing_moves(llm, config):
    before = clips(config)
    for tag in ("en", "sw", "th"):
        ask(llm, tag, "\x01zzzz" * 20)
    assert all(torch.equal(one, other) for one, other in zip(before, clips(config), strict=True))
    assert config.clip_moves.counts == [0] * 5
    with pytest.raises(RuntimeError, match="calibrate"):
        config.tail_sums[0].move([1])


def test_the_clips_of_a_language_follow_it_and_no_others(llm, engine, config, profile, static):
    """A language is served what no calibration text was like: its own clips move, and its cached blocks are not found
    again; the others' are, bit for bit, where they were. Then all are rolled back, and stay."""
    calibrated = clips(config)
    th = config.entries.index("th")
    llm.reset_prefix_cache()
    assert [ask(llm, tag).num_cached_tokens for tag in ("th", "sw", "th", "sw")] == [0, 0, 64, 64]
    for sums in config.tail_sums:
        sums.calibrate(profile)
        sums.roll_back()  # forgets what was counted
    config.clip_moves.adapting = True
    counts = list(config.clip_moves.counts)
    for i in range(12):
        ask(llm, "th", f"{i}\x01\x02" * 30)
    changed = [one != other for one, other in zip(calibrated, clips(config), strict=True)]
    assert all(change[th].any() for change in changed)
    others = [entry for entry in range(len(config.entries)) if entry != th]
    assert not any(change[others].any() for change in changed)
    assert config.clip_moves.counts[th] > counts[th]
    assert [config.clip_moves.counts[entry] for entry in others] == [counts[entry] for entry in others]
    for sums, start in zip(config.tail_sums, calibrated, strict=True):
        ratio = sums.clips / start
        assert ((ratio > 1 / tail_sums.RULE.span - 1e-6) & (ratio < tail_sums.RULE.span + 1e-6)).all()
    report = adapt.report(engine, config)
    assert report["th"][2] == config.clip_moves.counts[th]
    assert report["th"][3] != 1 == report["sw"][3]
    assert [ask(llm, tag).num_cached_tokens for tag in ("sw", "th")] == [64, 0]

    moved = engine.la_aciq_roll_back()
    assert "th" in moved
    assert all(torch.equal(one, other) for one, other in zip(calibrated, clips(config), strict=True))
    assert ask(llm, "th").num_cached_tokens == 0
    for i in range(12):
        ask(llm, "th", f"{i}\x01\x02" * 30)
    assert all(torch.equal(one, other) for one, other in zip(calibrated, clips(config), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": "absmax"}, "needs static clips"),
        ({"clip": "static", "sharing": "pooled"}, "one language would move all"),
    ],
)
def test_what_cannot_adapt(model, profile, changes, message):
    quantization = la_aciq.quantize_model(model, profile, la_aciq.QuantConfig(**changes), progress=False).la_aciq
    with pytest.raises(LaAciqError, match=message):
        tail_sums.check_adaptable(quantization, profile)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"fingerprint": "0" * 64}, "measured on another model"), ({"center": False}, "its center is")],
)
def test_a_profile_of_something_else(static, profile, change, message):
    other = dataclasses.replace(profile, metadata=profile.metadata | change)
    with pytest.raises(LaAciqError, match=message):
        tail_sums.check_adaptable(static.la_aciq, other)


def test_tensors_replaced_while_they_are_loaded(served_folder, tmp_path):
    """By others, by the same, or by nothing: refused, and what is loaded is what config.json describes."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in served_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = folder / "model.safetensors"
    description = read_folder(folder)[0]["quantization_config"]

    def loading():
        config = LaAciqVllmConfig(description)
        config._folder, config._files = folder, _tensor_files(folder)
        return config

    loading().check_loaded()
    config = loading()
    (folder / "new").write_bytes(tensors.read_bytes())
    os.replace(folder / "new", tensors)
    with pytest.raises(LaAciqError, match="was changed while it was loaded"):
        config.check_loaded()
    config = loading()
    config.check_loaded()
    tensors.unlink()
    config.check_loaded()  # loaded already
    data = bytearray((served_folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(LaAciqError, match="SHA-256"):
        loading().check_loaded()
    config = loading()
    tensors.unlink()
    with pytest.raises(LaAciqError, match="was changed while it was loaded"):
        config.check_loaded()

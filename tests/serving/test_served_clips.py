"""Clips that follow what is served, in a real engine every step of which is a sample."""

import dataclasses
import os

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has its own virtual environment: make test runs these in .venv-vllm")

from vllm import LLM, SamplingParams

import la_aciq
from la_aciq.checkpoint import save_quantized
from la_aciq.checkpoint.folder import read_folder
from la_aciq.clipping.adapt import AdaptationRule
from la_aciq.errors import LaAciqError
from la_aciq.integrations.vllm import adapt
from la_aciq.integrations.vllm.method import LaAciqConfig, _tensor_files
from la_aciq.ops import reference

PROMPT = "The committee met on Tuesday, and nobody could say why the river had risen."
TOKENS = 24


@pytest.fixture(scope="module")
def static(model, profile):
    return la_aciq.quantize_model(model, profile, la_aciq.QuantConfig(clip="static"), progress=False)


@pytest.fixture(scope="module")
def llm(static, tmp_path_factory):
    """An engine that does not adapt: `adapting` lets it, as --adapt does when a server starts."""
    from byte_llama import byte_tokenizer

    folder = tmp_path_factory.mktemp("static") / "model"
    save_quantized(static, folder, byte_tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LA_ACIQ_SAMPLE_STEPS", "1")
        patch.setattr(adapt, "SAMPLES", 4)
        patch.setattr(adapt, "RULE", AdaptationRule(minimum=256))
        yield LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=192, max_num_seqs=8, block_size=32)


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
    return [sums.clip.clone() for sums in config.tail_sums]


def test_values_and_clipped_values_by_row(llm, engine, config, static):
    """All tokens are counted once under their rows, and as many are clipped as float64 arithmetic finds."""
    ask(llm, "sw")
    before = adapt.report(engine, config)
    llm.reset_prefix_cache()
    output = ask(llm, "sw")
    change = {row: np.subtract(now, before[row]) for row, now in adapt.report(engine, config).items()}
    tokens = len(output.prompt_token_ids) + TOKENS - 1  # the last one is not computed
    width = sum(sums.layer.in_features for sums in config.tail_sums)
    assert {row: found[0] for row, found in change.items()} == {
        **dict.fromkeys(change, 0),
        "sw": (tokens - 1) * width,
        "sink": width,
    }

    clipped = 0.0
    handles = []
    wanted = {sums.name for sums in config.tail_sums}
    row = config.done.state.entries.index("sw")

    def count(layer, inputs):
        nonlocal clipped
        x = (inputs[0][0, 1:] - layer.center[row]).double()
        rotated = reference.rotate(x, layer.signs, layer.block_size)
        bound = layer.clip[row].double().repeat_interleave(64)[: x.shape[1]]
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
    assert config.moves.moves == [0] * 5
    with pytest.raises(RuntimeError, match="calibrate"):
        config.tail_sums[0].move([1])


def test_the_clips_of_a_language_follow_it_and_no_others(llm, engine, config, profile, static):
    """A language is served what no calibration text was like: its own clips move, and its cached blocks are not found
    again; the others' are, bit for bit, where they were. Then all are rolled back, and stay."""
    calibrated = clips(config)
    rows = config.done.state.entries
    th = rows.index("th")
    llm.reset_prefix_cache()
    assert [ask(llm, tag).num_cached_tokens for tag in ("th", "sw", "th", "sw")] == [0, 0, 64, 64]
    for sums in config.tail_sums:
        sums.calibrate(profile)
        sums.roll_back()  # forgets what was counted
    config.moves.adapting = True
    moves = list(config.moves.moves)
    for i in range(12):
        ask(llm, "th", f"{i}\x01\x02" * 30)
    changed = [one != other for one, other in zip(calibrated, clips(config), strict=True)]
    assert all(change[th].any() for change in changed)
    others = [row for row in range(len(rows)) if row != th]
    assert not any(change[others].any() for change in changed)
    assert config.moves.moves[th] > moves[th]
    assert [config.moves.moves[row] for row in others] == [moves[row] for row in others]
    for sums, start in zip(config.tail_sums, calibrated, strict=True):
        ratio = sums.clip / start
        assert ((ratio > 1 / adapt.RULE.span - 1e-6) & (ratio < adapt.RULE.span + 1e-6)).all()
    report = adapt.report(engine, config)
    assert report["th"][2] == config.moves.moves[th]
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
    done = la_aciq.quantize_model(model, profile, la_aciq.QuantConfig(**changes), progress=False).la_aciq
    with pytest.raises(LaAciqError, match=message):
        adapt.check_adaptable(done, profile)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"fingerprint": "0" * 64}, "measured on another model"), ({"center": False}, "its center is")],
)
def test_a_profile_of_something_else(static, profile, change, message):
    other = dataclasses.replace(profile, metadata=profile.metadata | change)
    with pytest.raises(LaAciqError, match=message):
        adapt.check_adaptable(static.la_aciq, other)


def test_tensors_replaced_while_they_are_loaded(served_folder, tmp_path):
    """By others, by the same, or by nothing: refused, and what is loaded is what config.json describes."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in served_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = folder / "model.safetensors"
    description = read_folder(folder)[0]["quantization_config"]

    def loading():
        config = LaAciqConfig(description)
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

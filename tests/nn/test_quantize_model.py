"""Quantizing a small real Llama: what is swapped, what is left alone, and what a mixed batch computes."""

import asyncio
import copy
import dataclasses
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_llama import random_texts, tiny_llama
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import MixtralConfig, MixtralForCausalLM

import la_aciq
from la_aciq import clipping
from la_aciq.errors import LaAciqError
from la_aciq.models import fingerprint
from la_aciq.nn import LanguageAwareLinear, QuantConfig, bits_per_weight, languages, quantize_model, weights
from la_aciq.nn.weights import quantize_weight
from la_aciq.profile.second_moments import SecondMoments

GROUP = 16
LAYERS = 7 * 2


def config_of(**changes):
    return QuantConfig(**({"group_size": GROUP, "clip": "static"} | changes))


def calibrated(model, **settings):
    return la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=256, group_size=GROUP, progress=False, **settings)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def profile(model):
    return calibrated(model)


def quantized(model, profile, **changes):
    return quantize_model(model, profile, config_of(**changes), progress=False)


def logits(model, ids, **settings):
    with torch.no_grad():
        return model(input_ids=ids, **settings).logits


IDS = torch.from_numpy(np.random.default_rng(5).integers(1, 60, (3, 12)))


def test_layers_are_swapped_and_the_original_is_left_alone(model, profile):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model, IDS)
    out = quantized(model, profile, kv=4)
    kinds = [type(module) for module in out.modules()]
    assert kinds.count(LanguageAwareLinear) == LAYERS
    assert len(out.la_aciq.layers) == LAYERS
    assert out.la_aciq.skipped == {"lm_head": "ignored by the configuration"}
    assert not hasattr(model, "la_aciq")
    assert torch.equal(logits(model, IDS), expected)
    own = {tensor.data_ptr() for tensor in out.state_dict().values()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() not in own
    # Tied before, tied after.
    assert out.lm_head.weight is out.model.embed_tokens.weight


def test_in_place_gives_the_same_model(model, profile):
    target = copy.deepcopy(model)
    out = quantize_model(target, profile, config_of(kv=4), inplace=True, progress=False)
    assert out is target
    assert torch.equal(logits(out, IDS), logits(quantized(model, profile, kv=4), IDS))


def test_clips_are_the_tables(model, profile):
    table = clipping.table(profile, bits=4)
    out = quantized(model, profile, kv=4, kv_clip="static")
    name = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(out.get_submodule(name).clips.numpy(), table.clips[name])
    key = "model.layers.1.self_attn.k_proj"
    np.testing.assert_array_equal(out.get_submodule(key).clips.numpy(), table.clips[key])
    cache = np.concatenate([table.clips["cache.1.key"], table.clips["cache.1.value"]], axis=1)
    np.testing.assert_array_equal(out.get_buffer("la_aciq_cache.1_clip").numpy(), cache)
    assert out.la_aciq.cache == {"0": 4, "1": 4}
    dynamic = quantized(model, profile, clip="rms", sharing="pooled")
    shape = clipping.table(profile, bits=4, sharing="pooled").clip_factors[name]
    np.testing.assert_array_equal(dynamic.get_submodule(name).clips.numpy(), shape[[0, -1]])
    token = quantized(model, profile, clip="rms", granularity="token")
    layer = clipping.table(profile, bits=4, granularity="layer").clip_factors[name]
    np.testing.assert_array_equal(token.get_submodule(name).clips.numpy(), layer[:, :1])
    eight = quantized(model, profile, activations=8)
    np.testing.assert_array_equal(eight.get_submodule(name).clips.numpy(), clipping.table(profile, bits=8).clips[name])
    assert bool((quantized(model, profile, clip="absmax").get_submodule(name).clips == 0.9).all())


CONFIGS = {
    "static": {"kv": 4},
    "pooled": {"sharing": "pooled"},
    "layer": {"granularity": "layer"},
    "rms": {"clip": "rms", "granularity": "token", "kv": 4},
    "absmax": {"clip": "absmax", "kv": 4},
    "W4A8": {"activations": 8},
    "W4A16": {"activations": 16},
    "W16A4": {"weights": 16},
    "KV4": {"weights": 16, "activations": 16, "kv": 4},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_mixed_batches_equal_each_row_alone(model, profile, changes):
    out = quantized(model, profile, **changes)
    with languages(["th", "en", "sw"]):
        mixed = logits(out, IDS)
    for row, tag in enumerate(["th", "en", "sw"]):
        with la_aciq.language(tag):
            torch.testing.assert_close(logits(out, IDS[row : row + 1])[0], mixed[row], rtol=1e-4, atol=1e-4)
    # The check has teeth: where the clips depend on the language, another language computes something else.
    if changes.get("clip") != "absmax" and changes.get("sharing") != "pooled" and out.la_aciq.config.activations < 16:
        with la_aciq.language("en"):
            assert not torch.allclose(logits(out, IDS[:1])[0], mixed[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_row_is_the_same_to_the_bit_whatever_its_neighbours_speak(profile, changes, dtype):
    model = tiny_llama(dtype=dtype)
    own = dataclasses.replace(profile, metadata=profile.metadata | {"fingerprint": fingerprint(model)})
    out = quantized(model, own, **changes)

    def steps(tags):
        """Logits of a prompt and of tokens decoded after it."""
        with languages(tags), torch.no_grad():
            first = out(input_ids=IDS[:, :6], use_cache=True)
            cache = first.past_key_values
            later = [
                out(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6, 12)
            ]
        return torch.cat([first.logits, *later], dim=1)

    same, mixed = steps(["sw", "sw", "sw"]), steps(["en", "sw", "th"])
    assert torch.equal(same[1], mixed[1])


@pytest.mark.parametrize(
    "changes", [CONFIGS["static"], CONFIGS["layer"], CONFIGS["absmax"]], ids=["static", "layer", "absmax"]
)
def test_left_padding_and_cached_decoding_change_nothing(model, profile, changes):
    out = quantized(model, profile, **changes)
    padded = torch.cat([torch.zeros(3, 4, dtype=IDS.dtype), IDS], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.int64), torch.ones_like(IDS)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with languages(["th", "en", "sw"]):
        full = logits(out, IDS)
        with_padding = logits(out, padded, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(with_padding[:, 4:], full, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            first = out(input_ids=IDS[:, :8], use_cache=True)
            steps = [first.logits]
            for place in range(8, 12):
                step = out(input_ids=IDS[:, place : place + 1], past_key_values=first.past_key_values, use_cache=True)
                steps.append(step.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-3, atol=1e-3)


def test_without_a_sink_row_the_first_token_has_its_languages(model, profile):
    name = "model.layers.1.mlp.down_proj"
    usual, without = quantized(model, profile), quantized(model, profile, sink=False)
    assert without.la_aciq.state.entries == profile.entries[:-1]
    ours, theirs = without.get_submodule(name), usual.get_submodule(name)
    for table in ("clips", "center", "bias"):
        np.testing.assert_array_equal(getattr(ours, table).numpy(), getattr(theirs, table).numpy()[:-1])


def test_the_sink_row_is_used_for_the_first_token_only(model, profile):
    usual = quantized(model, profile)
    changed = copy.deepcopy(usual)
    # The first projections see embeddings, and no token the others: what changes there is a token's own row.
    for layer in (getattr(changed.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj", "v_proj")):
        layer.clips[-1] *= 0.2

    def projected(of):
        """What the first value projection gives for a prompt, and for a token decoded after it."""
        kept = []
        handle = of.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _, __, out: kept.append(out.clone()))
        with la_aciq.language("en"), torch.no_grad():
            cache = of(input_ids=IDS, use_cache=True).past_key_values
            of(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True)
        handle.remove()
        return kept

    (prompt, decoded), (prompt_after, decoded_after) = projected(usual), projected(changed)
    differs = (prompt != prompt_after).any(dim=-1)
    assert differs[:, 0].all()
    assert not differs[:, 1:].any()
    assert torch.equal(decoded, decoded_after)


def test_generate_under_a_language(model, profile):
    out = quantized(model, profile, kv=4)
    with la_aciq.languages(["th", "en", "sw"]):
        together = out.generate(IDS, max_new_tokens=5, do_sample=False)
    with la_aciq.language("en"):
        alone = out.generate(IDS[1:2], max_new_tokens=5, do_sample=False)
    assert together.shape == (3, 17)
    assert torch.equal(together[1], alone[0])


@pytest.mark.parametrize("style", ["module", "forward"])
def test_compiled_once_for_all_languages_and_batches_of_tags(model, profile, style):
    out = quantized(model, profile)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = copy.deepcopy(out)
    if style == "module":
        compiled = torch.compile(compiled, backend=counter)
    else:  # as transformers' own documentation does it, and without a single graph break
        compiled.forward = torch.compile(compiled.forward, backend=counter, fullgraph=True)
    seen = set()
    for tags in (["en"] * 3, ["sw"] * 3, ["th", "ja", "en"], ["sw", "en", "th"], ["und"] * 3):
        with la_aciq.languages(tags):
            got = logits(compiled, IDS, use_cache=False)
            torch.testing.assert_close(got, logits(out, IDS, use_cache=False))
        seen.add(got.sum().item())
    with la_aciq.language("sw"):
        logits(compiled, IDS, use_cache=False)
    assert len(seen) == 5  # the languages differ, so the ids are read and not baked in
    assert counter.frame_count == 1


def test_a_compiled_body_sets_its_own_languages(model, profile):
    out = quantized(model, profile)
    torch._dynamo.reset()
    compiled = torch.compile(out.model, backend="eager")
    for tags in (["en", "sw", "th"], ["th", "th", "en"]):
        with la_aciq.languages(tags), torch.no_grad():
            got = compiled(IDS, use_cache=False).last_hidden_state
            torch.testing.assert_close(got, out.model(IDS, use_cache=False).last_hidden_state)


def test_moved_after_quantization(model, profile):
    out = quantized(model, profile, activations=8)
    with la_aciq.language("sw"):
        before = logits(out, IDS)
        clip = out.model.layers[0].mlp.up_proj.clips.clone()
        out.to(torch.bfloat16)
        assert torch.equal(out.model.layers[0].mlp.up_proj.clips, clip)  # float32 as before
        moved = logits(out, IDS)
        assert moved.dtype == torch.bfloat16
        assert (moved.float() - before).std() < 0.1 * before.std()
        assert out.to("meta").model.layers[0].mlp.up_proj.weight.is_meta
        assert logits(out, IDS.to("meta")).is_meta


def test_generate_takes_a_language_that_no_later_call_sees(model, profile):
    out = quantized(model, profile)

    def tokens(ids=IDS, **settings):
        return out.generate(ids, max_new_tokens=4, do_sample=False, **settings)

    with la_aciq.language("und"):
        pooled = tokens()
        with la_aciq.language("sw"):
            expected = tokens()
        assert torch.equal(tokens(language="sw"), expected)
        assert torch.equal(tokens(), pooled)
        rows = tokens(language=["th", "sw", "en"])
        assert torch.equal(rows[1], expected[1])
        with pytest.raises(LaAciqError, match="2 tags for 3 rows of inputs"):
            tokens(language=["th", "sw"])
        with pytest.raises(LaAciqError, match="not BCP-47"):
            tokens(language="no language")
        assert torch.equal(tokens(), pooled)
        # Six rows are three inputs' beams only where three inputs were given.
        with la_aciq.languages(["th", "sw", "en"]):
            assert tokens(num_beams=2).shape == (3, 16)
            with pytest.raises(LaAciqError, match="3 tags for 6 rows"):
                tokens(torch.cat([IDS, IDS]))
    assert torch.equal(copy.deepcopy(out).generate(IDS, max_new_tokens=4, do_sample=False, language="sw"), expected)


def test_generate_under_threads_and_asyncio(model, profile):
    """Each thread and task has its own language; two that share a model take turns or are refused."""
    out = quantized(model, profile)
    models = {tag: copy.deepcopy(out) for tag in ("en", "sw", "th")}

    def tokens(tag, of):
        return of.generate(IDS, max_new_tokens=4, do_sample=False, language=tag)

    expected = {tag: tokens(tag, out) for tag in models}
    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(models, pool.map(tokens, models, models.values()), strict=True))
    assert all(torch.equal(found[tag], expected[tag]) for tag in models)

    async def serve():
        turn = asyncio.Lock()

        async def one(tag):
            await asyncio.sleep(0)
            async with turn:
                return await asyncio.to_thread(tokens, tag, out)

        return await asyncio.gather(*map(one, models))

    for tag, own in zip(models, asyncio.run(serve()), strict=True):
        assert torch.equal(own, expected[tag])


def test_a_language_the_profile_lacks_is_pooled_and_counted(model, profile):
    out = quantized(model, profile)
    pooled = logits(out, IDS[:1])
    with la_aciq.language("ja"):
        assert torch.equal(logits(out, IDS[:1]), pooled)
    assert out.la_aciq.state.unserved == {"ja": 1}


def test_pooled_tables_have_one_row_for_all_languages(model, profile):
    out = quantized(model, profile, sharing="pooled", kv=4, kv_clip="static")
    assert out.la_aciq.state.entries == ("und", "sink")
    name = "model.layers.0.self_attn.q_proj"
    layer, table = out.get_submodule(name), clipping.table(profile, bits=4, sharing="pooled")
    for row, place in enumerate([0, -1]):  # of the profile's rows
        np.testing.assert_array_equal(layer.clips[row].numpy(), table.clips[name][place])
    np.testing.assert_array_equal(layer.center[0].numpy(), profile.centers[profile.layers[name]][0])
    assert {len(layer.bias), len(layer.center), len(out.get_buffer("la_aciq_cache.1_clip"))} == {2}
    together = logits(out, IDS)
    with languages(["th", "en", "ja"]):
        assert torch.equal(logits(out, IDS), together)
    assert not out.la_aciq.state.unserved  # no language has a row to miss
    alone = quantized(model, profile, sharing="pooled", sink=False)
    assert alone.la_aciq.state.entries == ("und",)
    assert alone.get_submodule(name).clips.shape[0] == 1


def test_error_falls_with_more_bits(model, profile):
    exact = logits(model, IDS)

    def error(**changes):
        with la_aciq.languages(["th", "en", "sw"]):
            return float((logits(quantized(model, profile, **changes), IDS) - exact).square().mean())

    w4a4, w4a8, w4a16, w16a4 = error(), error(activations=8), error(activations=16), error(weights=16)
    assert w4a4 > w4a8
    assert w4a4 > w16a4 > 0
    assert w4a8 < 2 * w4a16


def test_bits_per_weight(model, profile):
    # Per row of K weights: K / 2 bytes of codes and a float32 per group of 16 (three groups of 32, four of 54).
    sizes = [(32, 32), (16, 32), (16, 32), (32, 32), (54, 32), (54, 32), (32, 54)]
    bits = sum(n * (8 * (k // 2) + 32 * -(-k // GROUP)) for n, k in sizes)
    plain = {"clip": "absmax", "center": False}
    weights = sum(n * k for n, k in sizes)
    assert bits_per_weight(quantized(model, profile, **plain)) == pytest.approx(bits / weights)
    assert bits_per_weight(quantized(model, profile, weights=16, **plain)) == 32
    # With centers also a float32 bias per output and row of the table, and with quantized inputs one per input.
    rows = len(profile.entries)
    biases = bits + sum(32 * rows * n for n, _ in sizes)
    assert bits_per_weight(quantized(model, profile, activations=16)) == pytest.approx(biases / weights)
    centers = biases + sum(32 * rows * k for _, k in sizes)
    assert bits_per_weight(quantized(model, profile)) == pytest.approx(centers / weights)
    pooled = bits + sum(32 * 2 * (n + k) for n, k in sizes)
    assert bits_per_weight(quantized(model, profile, sharing="pooled")) == pytest.approx(pooled / weights)
    assert bits_per_weight(model) == 32


def test_layers_that_cannot_be_quantized_are_named(profile, model):
    class Odd(nn.Linear):
        pass

    target = copy.deepcopy(model)
    mlp = target.model.layers[0].mlp
    odd = Odd(32, 54, bias=False)
    odd.weight = mlp.up_proj.weight
    mlp.up_proj = odd
    part = dataclasses.replace(
        profile, layers={k: v for k, v in profile.layers.items() if k != "model.layers.1.mlp.up_proj"}
    )
    with pytest.warns(
        UserWarning, match=r"2 layers.*layers\.0\.mlp\.up_proj.*Odd.*layers\.1\.mlp\.up_proj \(not in"
    ) as caught:
        out = quantize_model(target, part, config_of(), progress=False)
    assert len(caught) == 1
    assert set(out.la_aciq.skipped) == {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    assert type(out.model.layers[0].mlp.up_proj) is Odd
    assert type(out.model.layers[1].mlp.up_proj) is nn.Linear


def test_tied_heads_are_left_alone_and_untied_ones_need_the_profile(model, profile):
    out = quantized(model, profile, ignore=())
    assert out.la_aciq.skipped == {"lm_head": "its weight is tied to another layer's"}
    untied = tiny_llama(tie=False)
    measured = calibrated(untied, ignore=())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = quantize_model(untied, measured, config_of(ignore=()), progress=False)
    assert isinstance(out.lm_head, LanguageAwareLinear)
    # Generation reads the last position's logits alone: the head's input is shorter than the pass.
    with la_aciq.language("sw"):
        last = logits(out, IDS[:1], logits_to_keep=1)
        torch.testing.assert_close(last, logits(out, IDS[:1])[:, -1:], rtol=1e-4, atol=1e-4)


def test_the_profile_of_another_model_is_refused(profile):
    with pytest.raises(LaAciqError, match="another model"):
        quantized(tiny_llama(seed=1), profile)


def test_a_quantized_model_is_not_quantized_again(model, profile):
    with pytest.raises(LaAciqError, match="quantized already"):
        quantized(quantized(model, profile), profile)


def test_settings_that_are_not_the_profiles(model, profile):
    with pytest.raises(LaAciqError, match=r"group_size = 8.*16"):
        quantized(model, profile, group_size=8)
    with pytest.raises(LaAciqError, match=r"rotate = False.*rotate = True"):
        quantized(model, profile, rotate=False)
    # Without a table there is nothing to disagree about.
    quantized(model, profile, group_size=8, rotate=False, clip="absmax")
    quantized(model, profile, group_size=8, rotate=False, activations=16)


def test_a_broken_weight_is_found_before_anything_is_changed(model):
    target = copy.deepcopy(model)
    profile = calibrated(target)
    with torch.no_grad():
        target.model.layers[1].mlp.down_proj.weight[1, 1] = float("nan")  # not among the values of the fingerprint
    with pytest.raises(LaAciqError, match=r"model\.layers\.1\.mlp\.down_proj"):
        quantize_model(target, profile, config_of(), inplace=True, progress=False)
    assert not any(isinstance(module, LanguageAwareLinear) for module in target.modules())


@pytest.mark.parametrize("fault", ["nan", "indefinite"])
def test_broken_second_moments_are_found_before_anything_is_changed(model, profile, fault):
    last = "model.layers.1.mlp.down_proj"
    matrices = dict(profile.second_moments)
    site = profile.layers[last]
    matrices[site] = matrices[site].copy()
    matrices[site][0, 1] = matrices[site][1, 0] = np.nan if fault == "nan" else 1e9
    broken = dataclasses.replace(profile, second_moments=SecondMoments.of(matrices))
    target = copy.deepcopy(model)
    with pytest.raises(LaAciqError, match=r"second moments of site|down_proj.*semidefinite"):
        quantize_model(target, broken, config_of(), inplace=True, progress=False)
    assert not any(isinstance(module, LanguageAwareLinear) for module in target.modules())
    # It can still be quantized.
    quantize_model(target, profile, config_of(), inplace=True, progress=False)


def test_nothing_left_to_quantize(model, profile):
    with pytest.raises(LaAciqError, match="no layer to quantize"):
        quantized(model, profile, ignore=("*",))


def test_a_model_like_another_shares_its_weights_and_nothing_else(model, profile):
    first = quantized(model, profile, kv=4, sharing="pooled")
    second = quantize_model(model, profile, config_of(sharing="language"), like=first, progress=False)
    alone = quantized(model, profile, sharing="language")
    for name in second.la_aciq.layers:
        layer, other = second.get_submodule(name), first.get_submodule(name)
        assert layer._buffers["weight_codes"] is other._buffers["weight_codes"]
    with la_aciq.language("sw"):
        torch.testing.assert_close(logits(second, IDS), logits(alone, IDS), rtol=0, atol=0)


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    made = MixtralForCausalLM._from_config(MixtralConfig(**sizes)).eval()
    return made, calibrated(made)


@pytest.mark.filterwarnings("ignore:1 layers are left")  # the router
def test_second_moments_are_factorized_once_for_all_that_read_an_input(mixture, monkeypatch):
    model, profile = mixture
    calls, inverse = [], weights._inverse
    monkeypatch.setattr(weights, "_inverse", lambda factor: calls.append(1) or inverse(factor))
    out = quantized(model, profile)
    assert len(out.la_aciq.layers) == 5
    assert len(calls) == len(profile.second_moments) == 4  # of q, k and v; o; gate_up_proj; down_proj


@pytest.mark.filterwarnings("ignore:1 layers are left")
def test_experts_like_those_of_a_model_that_left_them_alone(mixture):
    first = quantized(*mixture, weights=16, activations=16, kv=4)
    second = quantize_model(*mixture, config_of(), like=first, progress=False)
    alone = quantized(*mixture)
    with la_aciq.language("sw"):
        assert torch.equal(logits(second, IDS), logits(alone, IDS))


def test_other_weights_are_not_shared(model, profile):
    first = quantized(model, profile)
    other = quantize_model(model, profile, config_of(codebook="midtread"), like=first, progress=False)
    alone = quantized(model, profile, codebook="midtread")
    torch.testing.assert_close(logits(other, IDS), logits(alone, IDS), rtol=0, atol=0)


def test_like_must_be_this_model_quantized(model, profile):
    with pytest.raises(LaAciqError, match="like: it is not quantized"):
        quantize_model(model, profile, config_of(), like=model, progress=False)


def test_weights_are_rounded_by_the_second_moments_where_the_profile_has_them(model, profile):
    out = quantized(model, profile, activations=16)
    assert out.la_aciq.config.rounding == "feedback"
    nearest = quantized(model, profile, activations=16, rounding="nearest")
    assert nearest.la_aciq.config.rounding == "nearest"
    for name in out.la_aciq.layers:
        layer = out.get_submodule(name)
        weight = la_aciq.ops.rotate(model.get_submodule(name).weight.detach(), layer.signs)
        products = torch.from_numpy(profile.second_moments[profile.layers[name]])
        for given, expected in ((products, layer), (None, nearest.get_submodule(name))):
            codes, clips = quantize_weight(weight, GROUP, "midrise", given)
            assert torch.equal(codes, expected.portable_weight)
            assert torch.equal(clips, expected.weight_clip)


def test_without_second_moments_weights_are_rounded_to_nearest_and_the_result_says_so(model, profile):
    without = dataclasses.replace(profile, second_moments=None)
    out = quantized(model, without, activations=16)
    assert out.la_aciq.config.rounding == "nearest"
    expected = quantized(model, profile, activations=16, rounding="nearest")
    for (name, tensor), other in zip(out.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    with pytest.raises(LaAciqError, match=r"rounding = 'feedback' needs a profile with second moments .* has none"):
        quantized(model, without, rounding="feedback")
    with pytest.raises(LaAciqError, match="rotate = False, this one has those of inputs with rotate = True"):
        quantized(model, profile, activations=16, rounding="feedback", rotate=False)
    # 16-bit weights are not rounded at all.
    assert quantized(model, without, weights=16, rounding="feedback").la_aciq.config.weights == 16


def test_shared_weights_are_those_of_the_same_rounding(model, profile):
    first = quantized(model, profile)
    again = quantize_model(model, profile, config_of(clip="absmax"), like=first, progress=False)
    other = quantize_model(model, profile, config_of(rounding="nearest"), like=first, progress=False)
    name = first.la_aciq.layers[0]
    weights = [one.get_submodule(name)._buffers["weight_codes"].data_ptr() for one in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_without_values_becomes_a_quantized_one_without_values(model, profile, inplace):
    out = quantized(model, profile, kv=4, kv_clip="static")
    empty = copy.deepcopy(model).to("meta")
    made = quantize_model(empty, profile, config_of(kv=4, kv_clip="static"), inplace=inplace, progress=False)
    assert (made is empty) == inplace
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in made.state_dict().items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in out.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in made.state_dict().values())
    assert made.la_aciq.config == out.la_aciq.config
    assert bits_per_weight(made) == bits_per_weight(out)
    assert logits(made, IDS.to("meta")).shape == logits(out, IDS).shape


def test_a_model_without_some_of_its_values_is_refused(model, profile):
    partly = copy.deepcopy(model)
    partly.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(LaAciqError, match=r"layers\.1\.mlp\.up_proj\.weight' is on the meta device"):
        quantized(partly, profile)


@pytest.mark.parametrize(
    "objective",
    [
        {"language_objective": "minimax"},
        {"language_objective": "variance", "language_penalty": 50.0},
        {"language_objective": "weighted", "language_weights": {"sw": 1.0}},
        {"language_objective": "minimax", "language_weights": {"SW": 1.0, "en": 2}},
    ],
)
@pytest.mark.parametrize("sharing", ["pooled", "language"])
def test_the_language_objective_chooses_the_shared_clips(model, profile, tmp_path, objective, sharing):
    usual = quantized(model, profile, clip="static", sharing=sharing)
    out = quantized(model, profile, clip="static", sharing=sharing, **objective)
    settings = {
        "penalty": objective.get("language_penalty", 1.0),
        "language_objective": objective["language_objective"],
    }
    weights = objective.get("language_weights")
    if weights is not None:
        settings["language_weights"] = {tag.lower(): weight for tag, weight in weights.items()}
    table = clipping.table(profile, sharing=sharing, **settings)
    different = 0
    for name in out.la_aciq.layers:
        layer = out.get_submodule(name)
        np.testing.assert_array_equal(layer.clips[0].numpy(), table.clips[name][0])
        different += not torch.equal(layer.clips[0], usual.get_submodule(name).clips[0])
    assert different
    la_aciq.save_quantized(out, tmp_path / "int4")
    assert la_aciq.load_quantized(tmp_path / "int4").la_aciq.config == out.la_aciq.config
    caches = [
        quantized(model, profile, kv=4, kv_clip="rms", sharing=sharing, **changes).la_aciq_cache
        for changes in ({}, objective)
    ]
    assert not torch.equal(*(next(cache.buffers())[0] for cache in caches))


def test_weights_of_languages_that_the_profile_lacks(model, profile):
    for language_weights, message in (
        ({"ja": 1}, r"language_weights: expected languages of the profile, en, sw, th, got 'ja'"),
        ({"sw": 1, "SW": 2}, "expected each language once, got 'sw' twice"),
    ):
        with pytest.raises(LaAciqError, match=message):
            quantized(model, profile, language_objective="weighted", language_weights=language_weights)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_progress_bar_has_the_layers_and_the_time_that_is_left(model, profile, capsys, inplace):
    quantized = quantize_model(copy.deepcopy(model), profile, config_of(), inplace=inplace)
    count = len(quantized.la_aciq.layers)
    assert re.search(rf"Quantizing: 100%.* {count}/{count} \[00:\d\d<00:00, .*layer", capsys.readouterr().err)
    quantize_model(copy.deepcopy(model), profile, config_of(), inplace=inplace, progress=False)
    assert capsys.readouterr().err == ""

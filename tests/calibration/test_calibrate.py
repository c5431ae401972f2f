"""Calibration against the same statistics worked out in float64 from what the layers were given."""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from byte_llama import byte_llama
from torch import nn
from torch.nn.utils import prune
from transformers import (
    RwkvConfig,
    RwkvForCausalLM,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

import la_aciq
from la_aciq.errors import LaAciqError
from la_aciq.models import fingerprint
from la_aciq.ops import rotation
from la_aciq.profile import Profile

TAGS = ("en", "sw", "th")
SEQLEN, TOKENS, GROUP = 24, 60, 16
LAYER = "model.layers.1.mlp.down_proj"


def random_ids(tags=TAGS, n=400):
    """Token ids by language, each from its own part of the vocabulary."""
    random = np.random.default_rng(7)
    return {tag: random.integers(80 * i, 80 * i + 90, n) % 256 for i, tag in enumerate(tags)}


def calibrated(model=None, texts=None, **changes):
    arguments = {"seqlen": SEQLEN, "tokens": TOKENS, "group_size": GROUP, "center": False, "progress": False} | changes
    return la_aciq.calibrate(
        byte_llama() if model is None else model, random_ids() if texts is None else texts, **arguments
    )


@pytest.fixture(scope="module")
def profile():
    return calibrated()


@pytest.fixture(scope="module")
def seen():
    """What each layer was given and gave, float64 [tokens, K] by language, collected by running the whole model."""
    model = byte_llama()
    record = {}

    def keep(name):
        def hook(module, args, output):
            record.setdefault(name, []).append(args[0][0].double().numpy())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(keep(name))
    result = {}
    for tag, ids in random_ids().items():
        record.clear()
        for start in range(0, TOKENS, SEQLEN):
            with torch.no_grad():
                model(torch.from_numpy(ids[start : min(start + SEQLEN, TOKENS)])[None])
        result[tag] = {name: [chunk.copy() for chunk in chunks] for name, chunks in record.items()}
    return result


def rotated(x, seed=0):
    """H diag(s) x / sqrt(b) by SciPy's Hadamard matrix, block by block."""
    k = x.shape[-1]
    b = rotation.block_size(k)
    y = (x * rotation.signs(k, seed)).reshape(-1, k // b, b)
    return (y @ scipy.linalg.hadamard(b).T / np.sqrt(b)).reshape(x.shape)


def groups_of(x, size):
    return [x[:, start : start + size].ravel() for start in range(0, x.shape[1], size)]


def check_row(moments, values):
    """Moments [groups] against the values of each group."""
    assert moments.count.tolist() == [v.size for v in values]
    # Inputs were float32, rotated in float32: errors of a few 1e-7 of the largest element.
    scale = [np.abs(v).max() for v in values]
    np.testing.assert_allclose(moments.mean, [v.mean() for v in values], rtol=0, atol=1e-6 * max(scale))
    np.testing.assert_allclose(moments.variance, [v.var() for v in values], rtol=1e-5)
    np.testing.assert_allclose(moments.kurtosis, [scipy.stats.kurtosis(v) for v in values], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.max, [v.max() for v in values], atol=1e-6 * max(scale))
    np.testing.assert_allclose(moments.min, [v.min() for v in values], atol=1e-6 * max(scale))
    counts = moments.histogram[..., 0]
    assert counts.sum(-1).tolist() == [v.size for v in values]
    edges = la_aciq.ops.streaming.histogram_edges()
    for group, v in zip(counts, values, strict=True):
        exact = np.histogram(np.abs(v), edges)[0]
        # An element within rounding of an edge may fall on its other side.
        assert np.abs(np.cumsum(group) - np.cumsum(exact)).max() <= 2


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("layer", [LAYER, "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"])
def test_every_row_and_group_has_the_statistics_of_its_tokens(seen, profile, layer, rotate):
    own = profile if rotate else calibrated(rotate=False)
    basis = rotated if rotate else lambda x: x
    site = own.sites[own.layers[layer]]
    assert own.entries == ("und", *TAGS, "sink")
    assert site.moments.shape == (len(own.entries), -(-site.k // GROUP))
    rest = {tag: np.concatenate([basis(chunk)[1:] for chunk in seen[tag][layer]]) for tag in TAGS}
    for tag in TAGS:
        check_row(site.moments[own.entries.index(tag)], groups_of(rest[tag], GROUP))
    check_row(site.moments[0], groups_of(np.concatenate(list(rest.values())), GROUP))
    first = np.concatenate([basis(chunk)[:1] for tag in TAGS for chunk in seen[tag][layer]])
    check_row(site.moments[-1], groups_of(first, GROUP))


@pytest.mark.parametrize("layer", [LAYER, "model.layers.0.self_attn.o_proj"])
def test_inputs_are_measured_less_the_mean_of_their_language(seen, layer):
    own = calibrated(center=True)
    site, center = own.sites[own.layers[layer]], own.centers[own.layers[layer]]
    rest = {tag: np.concatenate([chunk[1:] for chunk in seen[tag][layer]]) for tag in TAGS}
    means = np.stack([x.mean(axis=0) for x in rest.values()])
    first = np.concatenate([chunk[:1] for tag in TAGS for chunk in seen[tag][layer]])
    expected = np.stack([means.mean(axis=0), *means, first.mean(axis=0)])
    np.testing.assert_allclose(center, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert center.dtype == np.float32
    for tag, mean in zip(TAGS, means, strict=True):
        check_row(site.moments[own.entries.index(tag)], groups_of(rotated(rest[tag] - mean), GROUP))
    check_row(site.moments[-1], groups_of(rotated(first), GROUP))
    assert set(own.centers) == {name for name, one in own.sites.items() if one.kind == "input"}


def test_layers_that_read_the_same_tensor_share_a_site(profile):
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert {profile.layers[attention + p] for p in ("q_proj", "k_proj", "v_proj")} == {attention + "q_proj"}
    assert {profile.layers[mlp + p] for p in ("gate_proj", "up_proj")} == {mlp + "gate_proj"}
    assert profile.layers[attention + "o_proj"] == attention + "o_proj"
    assert len(profile.sites) == 2 * 6
    assert "lm_head" not in profile.layers


def test_the_head_is_measured_where_it_is_not_ignored(seen):
    own = calibrated(ignore=["model.layers.*"])
    assert [layer for layer in own.layers if not layer.startswith("cache.")] == ["lm_head"]
    values = np.concatenate([rotated(chunk)[1:] for chunk in seen["en"]["lm_head"]])
    check_row(own.sites["lm_head"].moments[1], groups_of(values, GROUP))


def test_group_size_zero_is_one_group_per_token():
    own = calibrated(group_size=0)
    assert own.sites[LAYER].group_size == 100
    assert own.sites[LAYER].moments.shape == (5, 1)


def test_the_model_is_left_as_it_was():
    model = byte_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrated(model)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bfloat16_models_are_measured_in_float32():
    site = calibrated(byte_llama().to(torch.bfloat16)).sites[LAYER]
    assert np.isfinite(site.moments.state[..., :5]).all()


def test_memory_does_not_grow_with_the_text():
    model, texts = byte_llama(), random_ids(n=6000)

    def peak(tokens):
        tracemalloc.start()
        calibrated(model, texts, tokens=tokens)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(240)  # whatever is made once
    assert peak(2400) < 1.2 * peak(240)


LAYOUT_PASSES = 5  # before the first text, to find the layouts of layers' inputs


class TestResuming:
    @staticmethod
    def interrupt_in_pass(model, number):
        passes = iter(range(1, number + 1))

        def hook(module, args, kwargs):
            if next(passes) == number:
                raise KeyboardInterrupt

        return model.model.register_forward_pre_hook(hook, with_kwargs=True)

    def test_an_interrupted_calibration_goes_on_and_ends_bit_for_bit_the_same(self, tmp_path):
        model = byte_llama()
        calibrated(model).save(tmp_path / "uninterrupted")
        # Three windows per language: the eighth pass over them is in the middle of the third language.
        handle = self.interrupt_in_pass(model, LAYOUT_PASSES + 8)
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, resume=tmp_path / "partial")
        handle.remove()
        assert Profile.load(tmp_path / "partial").languages == ("en", "sw")
        passes = []
        handle = model.model.register_forward_pre_hook(lambda module, args: passes.append(1))
        resumed = calibrated(model, resume=tmp_path / "partial")
        handle.remove()
        assert len(passes) == LAYOUT_PASSES + 3
        resumed.save(tmp_path / "resumed")
        for name in ("profile.json", "profile.safetensors"):
            assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes()

    def test_an_interruption_in_the_first_language_leaves_nothing(self, tmp_path):
        model = byte_llama()
        self.interrupt_in_pass(model, LAYOUT_PASSES + 2)
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, resume=tmp_path / "partial")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_of_something_else_is_refused_before_anything_is_measured(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        model = byte_llama()
        self.interrupt_in_pass(model, 1)
        with pytest.raises(LaAciqError, match="did not write it"):
            calibrated(model, resume=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"seqlen": 20}, "seqlen"),
            ({"group_size": 20}, "group_size"),
            ({"seed": 1}, "rotation"),
            ({"tokens": 48}, "the text for 'en'"),
            ({"texts": {**random_ids(), "sw": random_ids(n=401)["sw"][1:]}}, "the text for 'sw'"),
            ({"texts": {"en": random_ids()["en"]}}, "the text for 'sw'"),
            ({"model": byte_llama(1)}, "fingerprint"),
        ],
    )
    def test_what_was_made_otherwise_is_not_continued(self, tmp_path, changes, what):
        calibrated(resume=tmp_path / "partial")
        with pytest.raises(LaAciqError, match=f"differs in {what}"):
            calibrated(resume=tmp_path / "partial", **changes)


class TestRefused:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, value):
        model = byte_llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
        with pytest.raises(LaAciqError, match=r"weight 'model\.layers\.1\.mlp\.up_proj\.weight' has 1 NaN or infinite"):
            calibrated(model)

    def test_activations_that_overflow_name_the_layer(self):
        model = byte_llama()
        model.model.layers[0].mlp.up_proj.weight.data *= 1e30
        model.model.layers[0].mlp.gate_proj.weight.data *= 1e30
        with pytest.raises(LaAciqError, match=r"the input of layer 'model\.layers\.0\.mlp\.down_proj' has \d+ NaN"):
            calibrated(model)

    def test_outputs_that_overflow_name_the_layer(self):
        model = byte_llama()
        model.model.layers[1].self_attn.v_proj.weight.data *= 1e38
        with pytest.raises(LaAciqError, match=r"the value of layer 'cache\.1\.value' has"):
            calibrated(model)

    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_a_layer_without_inputs(self):
        model = byte_llama()
        model.model.layers[0].mlp.empty = nn.Linear(0, 4)
        with pytest.raises(LaAciqError, match=r"'model\.layers\.0\.mlp\.empty' has no input features \(K = 0\)"):
            calibrated(model)

    def test_a_layer_that_gets_no_rows_has_no_statistics(self):
        model = byte_llama()
        mlp = model.model.layers[0].mlp
        mlp.expert = nn.Linear(40, 8)
        plain = mlp.forward
        mlp.forward = lambda x: plain(x) + mlp.expert(x[:, :0]).sum()
        own = calibrated(model)
        site = own.sites[own.layers["model.layers.0.mlp.expert"]]
        assert site.moments.count.sum() == 0
        assert np.array_equal(own.sites[LAYER].moments.state, calibrated().sites[LAYER].moments.state)

    def test_a_model_without_linear_layers(self):
        with pytest.raises(LaAciqError, match="no linear layers"):
            calibrated(ignore=["*"])

    def test_token_ids_outside_the_vocabulary(self):
        with pytest.raises(LaAciqError, match="token ids from 0 to 256; the model knows 0 to 255"):
            calibrated(texts={"en": np.arange(257)})

    def test_too_short_a_text(self):
        with pytest.raises(LaAciqError, match="'sw' is too short: 60 tokens are needed, and it has 59"):
            calibrated(texts={"en": np.zeros(60, dtype=int), "sw": np.zeros(59, dtype=int)})

    def test_more_positions_than_the_model_has(self):
        with pytest.raises(LaAciqError, match="seqlen = 513 is longer than the 512 positions"):
            calibrated(seqlen=513)

    @pytest.mark.parametrize("group_size", [-2, 7])
    def test_an_odd_group(self, group_size):
        with pytest.raises(LaAciqError, match=f"group_size = {group_size}"):
            calibrated(group_size=group_size)

    def test_something_else_than_a_language_model(self):
        with pytest.raises(LaAciqError, match="is not a language model of Hugging Face transformers"):
            calibrated(nn.Sequential(nn.Linear(4, 4)))


class TestFingerprint:
    def test_it_is_the_models_own(self):
        assert fingerprint(byte_llama(0)) == fingerprint(byte_llama(0)) == fingerprint(byte_llama(0).train())
        assert fingerprint(byte_llama(0)) != fingerprint(byte_llama(1))

    def test_weights_dtype_and_settings_change_it(self):
        model, plain = byte_llama(), fingerprint(byte_llama())
        assert fingerprint(byte_llama().to(torch.bfloat16)) != plain
        model.model.norm.weight.data[0] += 1
        assert fingerprint(model) != plain
        model = byte_llama()
        model.config.hidden_act = "gelu"
        assert fingerprint(model) != plain

    def test_what_a_config_says_of_its_place_does_not(self):
        model = byte_llama()
        model.config.name_or_path = "somewhere/else"
        model.config.transformers_version = "9"
        assert fingerprint(model) == fingerprint(byte_llama())


class TestSecondMoments:
    """The sum of x x^T of every input token, sink included, against float64 products of what the layers were given."""

    def expected(self, seen, layer, tags=TAGS):
        x = rotated(np.concatenate([np.concatenate(seen[tag][layer]) for tag in tags]))
        return x.T @ x

    def check(self, found, expected):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, found.T)
        scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
        assert np.abs(found - expected).max() <= 1e-5 * scale.max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)

    def test_they_are_those_of_all_tokens(self, profile, seen):
        inputs = {name for name, site in profile.sites.items() if site.kind == "input"}
        assert set(profile.second_moments) == inputs
        assert len(profile.second_moments) == len(inputs)
        for name in inputs:
            self.check(profile.second_moments[name], self.expected(seen, name))

    def test_they_can_be_left_out(self):
        assert calibrated(second_moments=False).second_moments is None

    def test_merged_parts_are_those_of_all_texts(self, seen):
        texts = random_ids()
        parts = [calibrated(texts={tag: texts[tag]}) for tag in TAGS]
        self.check(Profile.merge(*parts).second_moments[LAYER], self.expected(seen, LAYER))
        with pytest.raises(LaAciqError, match="with and without second moments"):
            Profile.merge(parts[0], calibrated(texts={"sw": texts["sw"]}, second_moments=False))

    def test_saved_and_loaded_bit_for_bit(self, profile, tmp_path):
        profile.save(tmp_path / "profile")
        loaded = Profile.load(tmp_path / "profile")
        for name, matrix in profile.second_moments.items():
            np.testing.assert_array_equal(loaded.second_moments[name], matrix)
        for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            np.testing.assert_array_equal(copied.second_moments[LAYER], profile.second_moments[LAYER])
        # Replacing the folder leaves what is loaded as it was.
        calibrated(texts={"en": random_ids()["en"]}).save(tmp_path / "profile", force=True)
        np.testing.assert_array_equal(loaded.second_moments[LAYER], profile.second_moments[LAYER])

    @pytest.mark.parametrize("damage", ["edited", "cut short", "gone"])
    def test_a_damaged_file_is_refused_by_name(self, profile, tmp_path, damage):
        profile.save(tmp_path / "profile")
        file = tmp_path / "profile" / "second_moments.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(content if damage == "edited" else content[:-5])
        with pytest.raises(LaAciqError, match=r"second_moments\.safetensors"):
            Profile.load(tmp_path / "profile")

    def test_a_resumed_run_has_the_same_bits_and_its_own_settings(self, profile, tmp_path, monkeypatch):
        def interrupted(self, folder, force=False, save=Profile.save):
            save(self, folder, force)
            if len(self.languages) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(Profile, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrated(resume=tmp_path / "part")
        monkeypatch.undo()
        with pytest.raises(LaAciqError, match="differs in second_moments"):
            calibrated(resume=tmp_path / "part", second_moments=False)
        resumed = calibrated(resume=tmp_path / "part")
        for name, matrix in profile.second_moments.items():
            np.testing.assert_array_equal(resumed.second_moments[name], matrix)


def test_a_model_whose_first_pass_fails_is_refused_by_name():
    model = byte_llama()
    model.model.register_forward_pre_hook(lambda *_: {}["no such layer"])
    texts = {"en": np.arange(256) % 60}
    with pytest.raises(LaAciqError, match=r"LlamaForCausalLM cannot be calibrated: its first forward pass.*KeyError"):
        la_aciq.calibrate(model, texts, seqlen=64, tokens=128, group_size=16, progress=False)


def test_a_model_that_rescales_its_weights_is_refused_before_it_runs():
    sizes = {"vocab_size": 256, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    model = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=1)).eval()
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(LaAciqError, match=r"RwkvForCausalLM divides weights in place .* load it with rescale_every=0"):
        calibrated(model)
    assert passes == []
    ids = torch.from_numpy(random_ids()["sw"][None, :12])
    plain = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=0)).eval()
    plain.load_state_dict(model.state_dict())
    unscaled = copy.deepcopy(model)
    profile = calibrated(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)  # "the same"
    with pytest.raises(LaAciqError, match="rescale_every=0"):
        la_aciq.quantize_model(unscaled, profile, la_aciq.QuantConfig(group_size=GROUP))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: torch.nn.utils.weight_norm(layer),
        lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_layer_whose_weight_is_computed_is_left_alone_by_name(change):
    model = byte_llama()
    name = "model.layers.0.mlp.up_proj"
    change(model.get_submodule(name))
    ids = torch.from_numpy(random_ids()["sw"][None, :12])
    profile = calibrated(model)
    with pytest.warns(UserWarning, match=rf"{name}.* \(unsupported kind of layer"):
        quantized = la_aciq.quantize_model(model, profile, la_aciq.QuantConfig(group_size=GROUP), progress=False)
    assert name not in quantized.la_aciq.layers
    assert len(quantized.la_aciq.layers) == 13
    with torch.no_grad(), la_aciq.language("sw"):
        assert quantized(ids).logits.isfinite().all()


@pytest.mark.parametrize("start", [None, 5])
def test_a_decoders_text_begins_with_what_generate_begins_with(start):
    """T5Gemma's configuration has no decoder_start_token_id."""
    part = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    part |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    model = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=part, decoder=part)).eval()
    model.generation_config.decoder_start_token_id = start
    generated = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=1, do_sample=False)
    windows = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: windows.append(kwargs["decoder_input_ids"]), with_kwargs=True
    )
    la_aciq.calibrate(
        model, {"en": random_ids()["en"]}, seqlen=SEQLEN, tokens=TOKENS, group_size=GROUP, ignore=[], progress=False
    )
    # Batches of several rows are those that find layouts.
    assert {int(ids[0, 0]) for ids in windows if len(ids) == 1} == {int(generated[0, 0])}


def test_a_model_without_a_limit_of_positions():
    """XLNet says max_position_embeddings = -1."""
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=256, d_model=32, n_layer=1, n_head=4, d_inner=48)).eval()
    assert model.config.max_position_embeddings == -1
    profile = calibrated(model)
    assert profile.languages == TAGS
    assert any(name.endswith("ff.layer_1") for name in profile.layers)

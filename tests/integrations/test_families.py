"""Every family of models: calibrated, quantized, run on mixed languages, saved, loaded, quantized on load."""

import copy
import warnings

import numpy as np
import pytest
import tiny_llama
import torch
from scipy.linalg import hadamard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)

import la_aciq
from la_aciq.checkpoint import load_quantized
from la_aciq.errors import LaAciqError
from la_aciq.integrations.transformers import LaAciqConfig
from la_aciq.nn import LanguageAwareExperts, QuantConfig

VOCABULARY = 64
GROUP = 16

# What every family's configuration calls its sizes, as far as it has them.
SIZES = tiny_llama.SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "bos_token_id": 1}
GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "global_head_dim": 16,  # heads of another width in layers with full attention
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "eos_token_id": None,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 54,
    "decoder_ffn_dim": 54,
    "init_std": 0.3,
    "decoder_start_token_id": 2,
    "eos_token_id": 3,
}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64, "begin_suppress_tokens": None}
# A matrix product of all experts needs rows of whole 16 bytes.
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"intermediate_size": 56, "moe_intermediate_size": 24}

# Family, its own settings, and how many linear layers (a mixture's experts count as one) are quantized of two blocks.
DECODERS = [
    ("llama", {}, 14),
    ("mistral", {"sliding_window": 8}, 14),
    ("qwen2", {}, 14),
    ("qwen3", {}, 14),
    ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}, 14),
    ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 8}, 14),
    ("gemma4_text", GEMMA4, 19),
    ("phi3", {}, 8),
    ("gpt2", GPT2, 8),
    ("gpt_neox", {}, 8),
    ("opt", {"ffn_dim": 54, "word_embed_proj_dim": 32, "init_std": 0.3}, 12),
    ("bloom", {"n_layer": 2, "n_head": 4}, 8),
    ("xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 54, "init_std": 0.3}, 12),
    ("falcon", {"head_dim": None, "new_decoder_architecture": False, "alibi": False}, 8),
    ("olmo2", {}, 14),
    ("mixtral", EXPERTS, 10),
    ("qwen3_moe", EXPERTS, 10),
]
ENCODER_DECODERS = [
    ("m2m_100", BART, 32),
    ("mbart", BART, 32),
    ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 54, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}, 28),
]
ENCODERS = [("bert", {}, 13), ("xlm-roberta", {}, 13)]
# Models that compute one vector for each row of the batch, and how many layers are quantized, that vector's included.
POOLING = [
    (AutoModel, "bert", {}, 13),
    (AutoModel, "xlm-roberta", {}, 13),
    (AutoModelForSequenceClassification, "bert", {}, 14),
    (AutoModelForSequenceClassification, "xlm-roberta", {}, 14),
]
FAMILIES = [
    *(pytest.param(AutoModelForCausalLM, *family, id=family[0]) for family in DECODERS),
    *(pytest.param(AutoModelForSeq2SeqLM, *family, id=family[0]) for family in ENCODER_DECODERS),
    *(pytest.param(AutoModelForMaskedLM, *family, id=family[0]) for family in ENCODERS),
    pytest.param(AutoModelForSpeechSeq2Seq, "whisper", BART | WHISPER, 32, id="whisper"),
]


def tiny(auto, family, settings):
    torch.manual_seed(0)
    sizes = {name: value for name, value in (SIZES | settings).items() if name != "head_dim" or value is not None}
    return auto.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32).eval()


def spectrogram(seed):
    return torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(seed))


def texts(family):
    """Token ids by language, each from its own part of the vocabulary; for speech, calls."""
    random = np.random.default_rng(0)
    ids = {tag: random.integers(4 + 20 * i, 24 + 20 * i, 128) for i, tag in enumerate(("en", "sw", "th"))}
    if family != "whisper":
        return ids
    return {
        tag: [
            {"input_features": (1 + i) * spectrogram(i), "decoder_input_ids": torch.from_numpy(own[:24])[None]},
            {"input_features": (1 + i) * spectrogram(9 + i), "decoder_input_ids": torch.from_numpy(own[24:48])[None]},
        ]
        for i, (tag, own) in enumerate(ids.items())
    }


def inputs(family, model, batch=3):
    """A batch of the same tokens: only the language differs from row to row."""
    ids = torch.from_numpy(np.random.default_rng(1).integers(4, VOCABULARY, (1, 10))).expand(batch, -1)
    if family == "whisper":
        return {"input_features": spectrogram(5).expand(batch, -1, -1), "decoder_input_ids": ids}
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :7]
    return given


def logits(model, given, tags=("en", "sw", "th")):
    with torch.no_grad(), la_aciq.languages(tags):
        return model(**given).logits


def relative_error(found, exact):
    return float((found - exact).norm() / exact.norm())


def dequantized(layer):
    """The weight [N, K] that a quantized layer's codes stand for, in float64 and without the rotation."""
    k = layer.in_features
    packed = layer.portable_weight
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(len(packed), -1)[:, :k].numpy()
    alpha = np.repeat(layer.weight_clip.double().numpy(), GROUP, axis=1)[:, :k]
    weight = (codes - 7.5) * 2 * alpha / 15
    block = k & -k
    turned = weight.reshape(len(weight), -1, block) @ (hadamard(block) / np.sqrt(block))
    return turned.reshape(len(weight), k) * layer.signs.numpy()


def with_weights_of(model, out):
    """The unquantized model with the weights that the quantized one's codes stand for."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name in out.la_aciq.layers:
            module, layer = copied.get_submodule(name), out.get_submodule(name)
            if isinstance(layer, LanguageAwareExperts):
                for part in ("gate_up_proj", "down_proj"):
                    for index, weight in enumerate(getattr(module, part)):
                        weight.copy_(torch.from_numpy(dequantized(layer.get_submodule(f"{index}.{part}"))))
                continue
            weight = torch.from_numpy(dequantized(layer))
            module.weight.copy_(weight.T if type(module).__name__ == "Conv1D" else weight)
    return copied


@pytest.mark.parametrize(("auto", "family", "settings", "layers"), FAMILIES)
def test_family(auto, family, settings, layers, tmp_path):
    model = tiny(auto, family, settings)
    given = inputs(family, model)
    exact = logits(model, given)
    profile = la_aciq.calibrate(model, texts(family), seqlen=32, tokens=96, group_size=GROUP, progress=False)

    def quantized(**changes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # routers and convolutions are left alone, and named
            config = QuantConfig(**({"group_size": GROUP} | changes))
            return la_aciq.quantize_model(model, profile, config, progress=False)

    plain = quantized(activations=16, center=False)
    assert relative_error(logits(plain, given), logits(with_weights_of(model, plain), given)) < 1e-5
    w4a16 = quantized(activations=16)
    found = logits(w4a16, given)
    w4a8 = relative_error(logits(quantized(activations=8), given), found)
    assert 0 < w4a8 < 0.2  # a mixture may route a token elsewhere

    out = quantized()
    found = logits(out, given)
    assert w4a8 < relative_error(found, logits(w4a16, given)) < 0.7
    assert relative_error(found, exact) < 0.8
    # The same tokens in other languages, and each row on its own.
    assert all(not torch.equal(found[i], found[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    # An expert gets other tokens beside it then, and a product's order of addition depends on their number.
    assert relative_error(logits(out, given, ("th", "sw", "sw"))[1], found[1]) < 1e-5

    assert len(out.la_aciq.layers) == layers, out.la_aciq
    matrices = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    embeddings = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    left = matrices - embeddings - {*out.la_aciq.layers, *out.la_aciq.skipped}
    assert left <= {""}, "a layer was skipped silently"

    out.save_pretrained(tmp_path / "int4")
    loaded = load_quantized(tmp_path / "int4")
    assert torch.equal(logits(loaded, given), found)
    model.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LaAciqConfig(profile)
        on_load = type(model).from_pretrained(tmp_path / "model", quantization_config=config, dtype=torch.float32)
    assert torch.equal(logits(on_load, given), found)
    assert on_load.la_aciq.skipped == out.la_aciq.skipped

    if out.can_generate():
        assert torch.equal(*(generated(one, given) for one in (out, loaded)))
    if auto is AutoModelForCausalLM:
        cached = quantized(activations=16, kv=4, kv_clip="static")
        cached.save_pretrained(tmp_path / "kv4")
        assert torch.equal(*(generated(one, given) for one in (cached, load_quantized(tmp_path / "kv4"))))


def generated(model, given):
    """Five tokens more for each row, each in its language."""
    prompt = {key: value for key, value in given.items() if not key.startswith("decoder")}
    with la_aciq.languages(["en", "sw", "th"]):
        made = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert len(made) == 3
    return made


@pytest.mark.parametrize(("auto", "family", "settings", "layers"), POOLING, ids=lambda x: getattr(x, "__name__", None))
def test_a_vector_for_each_row_of_the_batch_has_its_language(auto, family, settings, layers):
    model = tiny(auto, family, settings)
    given = {"input_ids": torch.tensor([[5, 9, 12, 31, 3]]).expand(3, -1)}
    profile = la_aciq.calibrate(model, texts(family), seqlen=32, tokens=96, group_size=GROUP, progress=False)

    def pooled(of, tags):
        with torch.no_grad(), la_aciq.languages(tags):
            out = of(**given)
        return out.logits if hasattr(out, "logits") else out.pooler_output

    out, plain = (
        la_aciq.quantize_model(model, profile, QuantConfig(group_size=GROUP, **changes), progress=False)
        for changes in ({}, {"activations": 16, "center": False})
    )
    assert len(out.la_aciq.layers) == layers, out.la_aciq
    tags = ("en", "sw", "th")
    assert relative_error(pooled(plain, tags), pooled(with_weights_of(model, plain), tags)) < 1e-5
    found = pooled(out, tags)
    assert all(not torch.equal(found[i], found[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    # Neither its neighbours nor the class of first tokens: the same as in a batch of one language.
    for i, tag in enumerate(tags):
        torch.testing.assert_close(pooled(out, (tag,) * 3)[i], found[i], rtol=1e-5, atol=1e-5)


def test_beams_of_speech_have_the_language_of_their_row():
    model = tiny(AutoModelForSpeechSeq2Seq, "whisper", BART | WHISPER)
    profile = la_aciq.calibrate(model, texts("whisper"), seqlen=32, tokens=96, group_size=GROUP, progress=False)
    out = la_aciq.quantize_model(model, profile, QuantConfig(group_size=GROUP), progress=False)
    heard = {"input_features": spectrogram(5).expand(3, -1, -1), "max_new_tokens": 4, "num_beams": 2}
    heard |= {"return_dict_in_generate": True, "output_scores": True}
    with la_aciq.languages(["en", "sw", "th"]):
        together = out.generate(**heard).sequences_scores
    for i, tag in enumerate(("en", "sw", "th")):
        with la_aciq.language(tag):
            torch.testing.assert_close(out.generate(**heard).sequences_scores[i], together[i], rtol=1e-5, atol=1e-5)
    assert (together - together.roll(1)).abs().min() > 1e-3
    with la_aciq.languages(["en", "sw"]), pytest.raises(LaAciqError, match="2 tags for 3 rows"):
        out.generate(**heard)

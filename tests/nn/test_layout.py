"""How the rows of a layer's input belong to tokens: found in calibration, saved, and never taken from a coincidence."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from tiny_llama import random_texts
from torch import nn

import la_aciq
from la_aciq import QuantConfig
from la_aciq.errors import LaAciqError
from la_aciq.nn import LanguageState, languages, quantize_model
from la_aciq.nn.layout import LayoutDetector, detect_layouts, ids_in_layout

transformers.logging.set_verbosity_error()

ENTRIES = ("und", "en", "sw", "sink")
UND, EN, SW, SINK = range(4)


class Model(nn.Module):
    """Layers that read the tokens' embeddings in one layout after the other."""

    config = None

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.names = ("plain", "turned", "flat", "turned_flat", "between", "heads", "pooled", "padded", "places")
        for name in (*self.names, "picked", "both"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        padded = nn.functional.pad(x, (0, 0, 0, 16 - x.shape[1] % 16))
        self.plain(x)
        self.turned(x.transpose(0, 1))
        self.flat(x.flatten(0, 1))
        self.turned_flat(x.transpose(0, 1).flatten(0, 1))
        self.between(x[:, None].expand(-1, 5, -1, -1))
        self.heads(x[:, :, None].expand(-1, -1, 5, -1))
        self.pooled(x[:, 0])
        self.padded(padded)
        self.places(self.embedding.weight[None, :13])
        self.picked(x[x[..., 0] > 0])
        self.both(x)
        self.both(self.embedding.weight[None, :11])


def detected():
    torch.manual_seed(0)
    model = Model()
    state = LanguageState(ENTRIES)
    state.attach(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    call = {"input_ids": torch.arange(50)[None]}
    with torch.no_grad():
        return detect_layouts(model, call, LayoutDetector(layers, state.shape_of_pass, None), torch.device("cpu"))


def test_layouts_are_found():
    assert detected() == {
        "plain": "batch tokens",
        "turned": "tokens batch",
        "flat": "batch*tokens",
        "turned_flat": "tokens*batch",
        "between": "batch n tokens",
        "heads": "batch tokens",
        "pooled": "batch",
        "padded": "batch",
        "places": "none",
        "picked": None,
        "both": None,
    }


IDS = torch.tensor([[SINK, SW, SW], [SINK, EN, EN], [EN, SINK, EN]], dtype=torch.int32)
BATCH = torch.tensor([SW, EN, EN], dtype=torch.int32)


def test_as_many_rows_as_tokens_are_no_coincidence():
    """The layout decides, where every shape would fit."""
    assert torch.equal(ids_in_layout("batch tokens", (3, 3), IDS, BATCH), IDS)
    assert torch.equal(ids_in_layout("tokens batch", (3, 3), IDS, BATCH), IDS.T)
    assert torch.equal(ids_in_layout("batch*tokens", (9,), IDS, BATCH), IDS.flatten())
    assert torch.equal(ids_in_layout("tokens*batch", (9,), IDS, BATCH), IDS.T.flatten())
    between = ids_in_layout("batch n tokens", (3, 3, 3), IDS, BATCH)
    assert torch.equal(between, IDS[:, None].expand(3, 3, 3))
    assert torch.equal(ids_in_layout("batch", (3, 3), IDS, BATCH), BATCH)
    assert torch.equal(ids_in_layout("n batch", (3, 3), IDS, BATCH), BATCH.expand(3, 3))
    assert ids_in_layout("none", (3, 3), IDS, BATCH) is None
    assert torch.equal(ids_in_layout("batch tokens", (3, 7), None, BATCH), BATCH)  # an encoder of features


@pytest.mark.parametrize(
    ("layout", "leading"),
    [
        ("batch tokens", (3, 2)),
        ("batch tokens", (9,)),
        ("tokens batch", (3,)),
        ("batch*tokens", (3, 3)),
        ("batch n tokens", (3, 3)),
        ("batch", (2, 3)),
        ("n batch", (3, 2)),
    ],
)
def test_an_input_of_another_layout_is_refused(layout, leading):
    with pytest.raises(LaAciqError, match="the language of its rows is unknown"):
        ids_in_layout(layout, leading, IDS, BATCH)


def test_the_tokens_that_a_head_keeps():
    state = LanguageState(ENTRIES)
    read = []

    class Head(nn.Module):
        def forward(self, input_ids, logits_to_keep=0):
            hidden = torch.zeros(*input_ids.shape, 8)
            places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            read.append(state.ids_for(hidden[:, places], "batch kept").tolist())

    model = Head()
    state.attach(model)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with languages(["sw", "en"]):
        model(ids)
        model(ids, logits_to_keep=2)
        model(ids, logits_to_keep=torch.tensor([3, 0]))
    assert read == [
        [[SINK, SW, SW, SW], [SINK, EN, EN, EN]],
        [[SW, SW], [EN, EN]],
        [[SW, SINK], [EN, SINK]],
    ]


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DEBERTA = SIZES | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]}
MIXTURE = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
LATENT = MIXTURE | {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
LED = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "attention_window": 8, "max_encoder_position_embeddings": 140,
    "max_decoder_position_embeddings": 140, "decoder_start_token_id": 2,
}  # fmt: skip
MODELS = {
    "DebertaV2ForMaskedLM": (DEBERTA, {"none"}),
    "DebertaV2ForMaskedLM, shared": (DEBERTA | {"share_att_key": True}, {None}),
    "LongformerForMaskedLM": (SIZES | {"attention_window": 8, "max_position_embeddings": 140}, {"batch", "n batch"}),
    "DeepseekV2ForCausalLM": (SIZES | LATENT, {"batch", "batch*tokens"}),
    "DeepseekV3ForCausalLM": (SIZES | LATENT, {"batch", "batch*tokens"}),
    "DogeForCausalLM": (SIZES | {"num_key_value_heads": 2}, {"batch"}),
    "LEDForConditionalGeneration": (LED, {"batch", "n batch", "batch memory"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_architectures_whose_inputs_have_layouts_of_their_own(name, tmp_path):
    """Each row of a batch, with as many rows as tokens and with fewer, is as if alone; with a cache as in one pass."""
    class_name = name.split(",")[0]
    sizes, kinds = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(vocab_size=61, pad_token_id=0, eos_token_id=None, **sizes)).eval()
    texts = {tag: 3 + ids % 50 for tag, ids in random_texts().items()}
    profile = la_aciq.calibrate(model, texts, seqlen=64, tokens=128, group_size=16, progress=False)
    layouts = profile.metadata["layouts"]
    assert set(layouts.values()) - {"batch tokens"} == kinds
    alone = [layer for layer, layout in layouts.items() if layout is None]
    for clip in ("static", "absmax"):
        config = QuantConfig(group_size=16, clip=clip)
        with pytest.warns(UserWarning, match="are no tokens, or of several kinds") if alone else nullcontext():
            quantized = quantize_model(model, profile, config, progress=False)
        assert set(alone) == {layer for layer in alone if layer in quantized.la_aciq.skipped}
        assert quantized.la_aciq.layouts == {layer: layouts[layer] for layer in quantized.la_aciq.layers}
        for batch, tokens in ((2, 12), (12, 12), (3, 7)):
            ids = 3 + torch.arange(batch * tokens).reshape(batch, tokens) * 7 % 50
            tags = (["sw", "th", "en"] * batch)[:batch]
            want = [logits(quantized, row[None], [tag]) for row, tag in zip(ids, tags, strict=True)]
            torch.testing.assert_close(logits(quantized, ids, tags), torch.cat(want), rtol=1e-4, atol=1e-5)
        if "CausalLM" in name:
            ids, tags = ids[:, :7], ["sw", "th", "en"]
            with torch.no_grad(), languages(tags):
                output = quantized(ids[:, :6], use_cache=True)
                step = quantized(ids[:, 6:], past_key_values=output.past_key_values, use_cache=True).logits
            torch.testing.assert_close(step, logits(quantized, ids, tags)[:, -1:], rtol=1e-4, atol=1e-5)
    la_aciq.save_quantized(quantized, tmp_path / "int4")
    loaded = la_aciq.load_quantized(tmp_path / "int4")
    assert loaded.la_aciq.layouts == quantized.la_aciq.layouts
    assert torch.equal(logits(loaded, ids, tags), logits(quantized, ids, tags))


def logits(model, ids, tags):
    decoder = {"decoder_input_ids": ids.flip(1)[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad(), languages(tags):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder).logits

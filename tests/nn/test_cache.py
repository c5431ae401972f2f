"""The INT4 key and value cache: what it gives back, against its definition in float64, and what generation does."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from nearest_value import nearest
from scipy.linalg import hadamard
from tiny_llama import random_texts, tiny_llama
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

import la_aciq
from la_aciq.errors import LaAciqError
from la_aciq.nn import LanguageAwareCache, LanguageState, QuantConfig, quantize_model
from la_aciq.nn.cache import LanguageAwareLayer
from la_aciq.nn.first_token import cache_name
from la_aciq.nn.kv import KeyValueClips

SINKS, WINDOW, BLOCK = 4, 32, 64
HEADS, DIM = 2, 8
ROWS = ("und", "en", "sw", "sink")


class Pass:
    """What a layer asks of the running pass."""

    def __init__(self, entries, starts=None):
        self.entries, self.starts, self.layer = entries, starts, None

    def batch_ids(self, batch, device):
        return torch.tensor(self.entries, dtype=torch.int32)

    def check_batch_ids(self, ids):
        assert ids.tolist() == self.entries

    def starts_of_batch(self, batch, device):
        return None if self.starts is None else torch.tensor(self.starts) - self.layer._length


def layer_of(clip="absmax", codebook="midrise", starts=None, sliding_window=None):
    config = QuantConfig(kv=4, kv_clip=clip, codebook=codebook)
    tables = None
    if clip != "absmax":
        tables = KeyValueClips({0: 2 * HEADS}, config, LanguageState(ROWS))
        random = np.random.default_rng(3)
        tables.fill({0: torch.from_numpy(random.uniform(1.5, 3.5, (len(ROWS), 2 * HEADS)).astype(np.float32))})
    layer = LanguageAwareLayer(0, tables, Pass([2, 1], starts), config, sliding_window)
    layer._state.layer = layer
    return layer


def states(tokens, batch=2, seed=0, dtype=torch.float32):
    """Keys with channels far from zero, and values; the first token is larger than all."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    keys += 6 * torch.randn(batch, HEADS, 1, DIM, generator=generator)
    keys[:, :, 0] *= 20
    return keys.to(dtype), values.to(dtype)


def bfloat16(x):
    return torch.from_numpy(np.asarray(x)).to(torch.bfloat16).double().numpy()


def expected(x, coded, layer, half, starts=(0, 0), first=0):
    """x [batch, heads, tokens, dim] as the cache gives it back when the tokens before `coded` are codes, float64."""
    out = x.double().numpy().copy()
    clip, codebook = layer._config.kv_clip, layer._config.codebook
    rotation = hadamard(DIM) / np.sqrt(DIM)
    for row, head in np.ndindex(out.shape[:2]):
        for begin in range(0, coded, BLOCK):
            block = out[row, head, begin : begin + BLOCK].copy()
            number = np.arange(begin, begin + BLOCK)
            mean = 0.0
            counted = number >= starts[row] + SINKS
            if half == 0 and counted.any():
                mean = bfloat16(block[counted].mean(axis=0))
            rotated = (block - mean) @ rotation
            if clip == "absmax":
                alpha = 0.9 * np.abs(rotated).max(axis=1, keepdims=True)
            else:
                alpha = float(layer._tables.get_buffer("0_clip")[layer._state.entries[row], half * HEADS + head])
                if clip == "rms":
                    alpha = alpha * np.sqrt((rotated**2).mean(axis=1, keepdims=True))
            # A dynamic clip is stored in bfloat16, after it was used to round.
            rounded = nearest(rotated / alpha, 1.0, 4, codebook) * (alpha if clip == "static" else bfloat16(alpha))
            kept = (number >= starts[row]) & (number < starts[row] + SINKS)
            out[row, head, begin : begin + BLOCK] = np.where(kept[:, None], block, rounded @ rotation + mean)
    return out


def coded_after(pieces):
    """How many tokens are codes before each piece, and at the end: blocks, of which at least WINDOW tokens are kept."""
    coded, length, before = 0, 0, []
    for piece in pieces:
        before.append(coded)
        length += piece
        coded += max(length - coded - WINDOW, 0) // BLOCK * BLOCK
    return [*before, coded]


def check(actual, want):
    """Equal up to float32, except where a value lies between two codes."""
    difference = np.abs(actual.double().numpy() - want)
    assert (difference > 1e-4).mean() < 2e-3
    assert difference.max() < 3


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize("clip", ["absmax", "rms", "static"])
def test_what_is_read_back(clip, codebook):
    layer = layer_of(clip, codebook)
    pieces = [70, 1, 60, 1, 1, 150, 1]
    keys, values = states(sum(pieces))
    end = 0
    for piece, coded in zip(pieces, coded_after(pieces), strict=False):
        begin, end = end, end + piece
        seen = layer.update(keys[:, :, begin:end], values[:, :, begin:end])
        for half, (x, out) in enumerate(zip((keys, values), seen, strict=True)):
            assert out.shape == (2, HEADS, end, DIM)
            check(out, expected(x[:, :, :end], coded, layer, half))
            assert torch.equal(out[:, :, :SINKS], x[:, :, :SINKS])
            exact = min(WINDOW, begin)
            assert torch.equal(out[:, :, begin - exact :], x[:, :, begin - exact : end])
    assert layer.get_seq_length() == sum(pieces)
    # The centred keys are the point: without it the far channels would cost them most of their bits.
    error = (seen[0] - keys)[:, :, SINKS:192].square().mean()
    assert error < 0.02


def test_one_prompt_and_many_pieces_store_the_same():
    keys, values = states(300)
    whole, pieces = layer_of(), layer_of()
    whole.update(keys, values)
    for begin in range(0, 300, 7):
        pieces.update(keys[:, :, begin : begin + 7], values[:, :, begin : begin + 7])
    held = whole.keys, whole.values
    more = states(1, seed=1)
    for one, other, before in zip(whole.update(*more), pieces.update(*more), held, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[:, :, :-1], before)
    assert layer_of().keys is None


@pytest.mark.parametrize("starts", [(0, 3), (5, 0), (62, 66), (0, 150)])
def test_the_first_tokens_after_left_padding_are_kept(starts):
    layer = layer_of(starts=list(starts))
    keys, values = states(240)
    for begin in range(0, 240, 80):
        layer.update(keys[:, :, begin : begin + 80], values[:, :, begin : begin + 80])
    seen = layer.update(*states(1, seed=1))
    for half, (x, out) in enumerate(zip((keys, values), seen, strict=True)):
        check(out[:, :, :-1], expected(x, 192, layer, half, starts))
        for row, start in enumerate(starts):
            assert torch.equal(out[row, :, start : start + SINKS], x[row, :, start : start + SINKS])


@pytest.mark.parametrize("window", [8, 50, 100])
def test_sliding_windows_see_what_transformers_does_and_forget_the_rest(window):
    layer, theirs = layer_of(sliding_window=window), DynamicSlidingWindowLayer(window)
    full = layer_of()
    pieces = [130, 1, 1, 40, 1, 100, 1]
    keys, values = states(sum(pieces))
    end = 0
    for piece in pieces:
        begin, end = end, end + piece
        assert layer.get_mask_sizes(piece) == theirs.get_mask_sizes(piece)
        added = keys[:, :, begin:end], values[:, :, begin:end]
        ours, other, everything = layer.update(*added), theirs.update(*added), full.update(*added)
        for mine, their, all_ in zip(ours, other, everything, strict=True):
            assert mine.shape == their.shape
            torch.testing.assert_close(mine, all_[:, :, all_.shape[2] - mine.shape[2] :], rtol=0, atol=0)
        assert layer.get_seq_length() == theirs.get_seq_length() == end
    assert sum(stored(layer)) < sum(stored(full))
    assert layer._length - layer._first <= window + WINDOW + 2 * BLOCK
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-200)


def test_a_sliding_window_that_records_can_go_back():
    keys, values = states(300)
    layer, theirs = layer_of(sliding_window=40), layer_of()
    layer.update(keys[:, :, :200], values[:, :, :200])
    layer.activate_past_recording()
    for begin in range(200, 300, 50):
        layer.update(keys[:, :, begin : begin + 50], values[:, :, begin : begin + 50])
    layer.crop(-90)
    theirs.update(keys[:, :, :210], values[:, :, :210])
    more = states(1, seed=1)
    assert layer.get_seq_length() == 210
    assert layer.get_mask_sizes(1) == (40, 171)
    # Within the window, tokens that were codes before the crop stay rounded.
    for mine, all_ in zip(layer.update(*more), theirs.update(*more), strict=True):
        assert (mine - all_[:, :, -40:]).abs().max() < 3
        assert torch.equal(mine[:, :, -1], all_[:, :, -1])


@pytest.mark.parametrize("removed", [1, 31, 40, 100, 290, 300])
def test_crop(removed):
    keys, values = states(300)
    layer = layer_of("static")
    layer.update(keys, values)
    before = layer.update(*states(1, seed=1))
    layer.crop(-1 - removed)
    left = 300 - removed
    assert layer.get_seq_length() == left
    more = states(100, seed=2)
    seen = layer.update(*more)
    for new, old, added in zip(seen, before, more, strict=True):
        torch.testing.assert_close(new[:, :, :left], old[:, :, :left], rtol=0, atol=1e-5)
        assert torch.equal(new[:, :, left:], added)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        layer.crop(3)


def test_rows_of_the_batch_are_reordered_selected_and_repeated():
    keys, values = states(200)
    order = torch.tensor([1, 1, 0])

    def filled(pick, clip="rms"):
        layer = layer_of(clip, starts=[0, 7])
        layer._state.entries, layer._state.starts = [[2, 1][i] for i in pick], [[0, 7][i] for i in pick]
        layer.update(keys[pick], values[pick])
        return layer

    changed = filled([0, 1])
    changed.reorder_cache(order)
    changed._state.entries = [1, 1, 2]
    selected = filled([0, 1])
    selected.batch_repeat_interleave(2)
    selected.batch_select_indices(torch.tensor([False, True, False, True]))
    selected.reorder_cache(torch.tensor([1, 1, 0]))
    selected._state.entries = [1, 1, 2]
    more = states(1, batch=3, seed=1)
    want = filled([1, 1, 0]).update(*more)
    for layer in (changed, selected):
        assert layer.batch_size == 3
        for one, other in zip(layer.update(*more), want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def stored(layer):
    """Bytes of the memory behind every tensor a layer holds."""
    tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()


@pytest.mark.parametrize("piece", [4096, 64, 1])
def test_bytes_per_token(piece):
    """At 4,096 tokens of heads of 64 channels: at most 0.30 of what float16 takes."""
    layer = layer_of()
    keys, values = torch.randn(2, 2, 3, 4096, 64, dtype=torch.float16)
    if piece == 1:  # in steps of one at the end, where the store grows
        layer.update(keys[:, :, :3900], values[:, :, :3900])
    worst = 0.0
    for begin in range(layer.get_seq_length(), 4096, piece):
        layer.update(keys[:, :, begin : begin + piece], values[:, :, begin : begin + piece])
        if begin + piece > 3900:
            worst = max(worst, layer.nbytes / (2 * layer.elements))
    assert layer.elements == 2 * 2 * 3 * 4096 * 64
    assert worst <= 0.30
    assert sum(stored(layer)) <= layer.nbytes + 64 * 1024
    layer.reset()
    assert layer.nbytes == layer.elements == layer.get_seq_length() == 0
    assert sum(stored(layer)) < 64 * 1024


def test_another_batch_dtype_or_odd_head_is_refused():
    layer = layer_of()
    layer.update(*states(3))
    with pytest.raises(LaAciqError, match="a batch of 2 rows and got 3"):
        layer.update(*states(1, batch=3))
    with pytest.raises(LaAciqError, match=r"float32 on cpu and got torch\.bfloat16"):
        layer.update(*states(1, dtype=torch.bfloat16))
    with pytest.raises(LaAciqError, match="even number of channels"):
        layer_of().update(torch.zeros(1, 1, 1, 5), torch.zeros(1, 1, 1, 5))


# --- In a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def profile(model):
    return la_aciq.calibrate(model, random_texts(), seqlen=128, tokens=256, group_size=16, progress=False)


def quantized(model, profile, **changes):
    settings = {"weights": 4, "activations": 16, "kv": 4, "group_size": 16} | changes
    return quantize_model(model, profile, QuantConfig(**settings), progress=False)


IDS = torch.from_numpy(np.random.default_rng(5).integers(1, 60, (3, 150)))


def generate(model, ids=IDS, **settings):
    return model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **settings)


def test_the_profile_has_the_keys_and_values_that_the_cache_rounds(model, profile):
    keys, ids = [], torch.from_numpy(random_texts()["sw"][:256])
    for window in ids.split(128):
        cache = DynamicCache()
        with torch.no_grad():
            model(window[None], past_key_values=cache)
        keys.append(cache.layers[1].keys[0].double().numpy())
    rotated = []
    for window in keys:
        for begin in range(0, 128, BLOCK):
            block = window[:, begin : begin + BLOCK]
            mean = bfloat16(block[:, SINKS if begin == 0 else 0 :].mean(axis=1, keepdims=True))
            rotated.append(((block - mean) @ hadamard(8) / np.sqrt(8))[:, 1 if begin == 0 else 0 :])
    site = profile.sites["cache.1.key"]
    assert (site.kind, site.layer_kind, site.k, site.group_size) == ("key", "key", 16, 8)
    measured = site.moments[profile.entries.index("sw")]
    both = np.concatenate(rotated, axis=1)
    assert measured.count.tolist() == [both[0].size] * 2
    np.testing.assert_allclose(measured.variance, both.var(axis=(1, 2)), rtol=1e-4)
    assert profile.layers["cache.0.value"] == "cache.0.value"


@pytest.mark.parametrize("clip", ["static", "rms", "absmax"])
def test_a_mixed_batch_generates_what_its_rows_do_alone(model, profile, clip):
    out = quantized(model, profile, kv_clip=clip)
    tags = ["th", "en", "sw"]
    together = generate(out, language=tags)
    assert isinstance(together.past_key_values, LanguageAwareCache)
    assert 0 < together.past_key_values.bits_per_element < 32
    for row, tag in enumerate(tags):
        alone = generate(out, IDS[row : row + 1], language=tag)
        assert torch.equal(alone.sequences[0], together.sequences[row])
    if clip == "static":
        assert [layer._language_ids.tolist() for layer in together.past_key_values.layers] == [[3, 1, 2]] * 2


def test_padding_changes_nothing_that_is_read(model, profile):
    out = quantized(model, profile)
    ids = torch.cat([torch.zeros(1, 9, dtype=torch.int64), IDS[:1]], dim=1)
    mask = (torch.arange(159) >= 9).long()[None]
    cache = LanguageAwareCache(out)
    with torch.no_grad():
        out(ids[:, :140], attention_mask=mask[:, :140], past_key_values=cache)
        out(ids[:, 140:], attention_mask=mask, past_key_values=cache)
    assert cache.layers[0]._starts.tolist() == [9]
    plain = DynamicCache()
    with torch.no_grad():
        model_keys = quantized(model, profile, kv=16)
        model_keys(ids, attention_mask=mask, past_key_values=plain)
    got = cache.layers[0]._read(0)[9 : 9 + SINKS, 0, :16]
    torch.testing.assert_close(got, plain.layers[0].keys[0, :, 9 : 9 + SINKS].transpose(0, 1).flatten(1))


def test_sequences_that_begin_after_the_first_chunk_keep_their_first_tokens(model, profile):
    ids = torch.cat([torch.zeros(3, 90, dtype=IDS.dtype), IDS], dim=1)
    starts = [90, 55, 0]
    settings = {"attention_mask": (torch.arange(240) >= torch.tensor(starts)[:, None]).long(), "language": "sw"}
    pieces = generate(quantized(model, profile), ids, prefill_chunk_size=40, **settings).past_key_values.layers[0]
    exact = generate(quantized(model, profile, kv=16), ids, **settings).past_key_values.layers[0]
    assert pieces._starts.tolist() == starts
    for row, first in enumerate(starts):
        kept = slice(first, first + SINKS)
        torch.testing.assert_close(pieces.keys[row, :, kept], exact.keys[row, :, kept], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pieces.values[row, :, kept], exact.values[row, :, kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("filled", [False, True])
def test_a_copied_cache_belongs_to_the_same_model_and_is_its_own(model, profile, filled):
    out = quantized(model, profile, kv_clip="static")

    def read(cache, first, last, tag="sw"):
        with torch.no_grad(), la_aciq.language(tag):
            return out(IDS[:1, first:last], past_key_values=cache).logits

    begun, start = LanguageAwareCache(out), 110 if filled else 0
    if filled:
        read(begun, 0, start)
    copied = copy.deepcopy(begun)
    assert all(layer._state is out.la_aciq.state for layer in copied.layers)
    assert all(layer._tables is out.la_aciq_cache for layer in copied.layers)
    logits = read(copied, start, 140)
    assert begun.get_seq_length() == start
    assert torch.equal(logits, read(begun, start, 140))
    for one, other in zip(begun.layers, copied.layers, strict=True):
        assert one._language_ids.tolist() == other._language_ids.tolist() == [out.la_aciq.state.entry("sw")]
        assert one._codes.data_ptr() != other._codes.data_ptr()
    with pytest.raises(LaAciqError, match="languages of the batch changed"):
        read(copied, 140, 141, "th")


def test_beams_return_sequences_and_prompt_lookup(model, profile):
    out = quantized(model, profile, kv_clip="static")
    beams = generate(out, language=["th", "en", "sw"], num_beams=3, num_return_sequences=2)
    assert beams.sequences.shape == (6, 156)
    assert beams.past_key_values.layers[0]._language_ids.tolist() == [3, 3, 3, 1, 1, 1, 2, 2, 2]
    alone = generate(out, IDS[1:2], language="en", num_beams=3, num_return_sequences=2)
    assert torch.equal(alone.sequences, beams.sequences[2:4])
    sampled = out.generate(IDS, max_new_tokens=2, do_sample=True, num_return_sequences=2, language=["th", "en", "sw"])
    assert sampled.shape == (6, 152)
    # Drafts are verified and taken back: the cache is cropped.
    looked_up = generate(out, IDS[:1], language="th", prompt_lookup_num_tokens=3)
    assert looked_up.sequences.shape[1] == 156


def test_an_empty_cache_of_transformers_becomes_int4_in_place(model, profile):
    out = quantized(model, profile)
    cache = DynamicCache(config=out.config)
    with torch.no_grad():
        first = out(IDS[:, :140], past_key_values=cache)
        assert first.past_key_values is cache
        assert isinstance(cache, LanguageAwareCache)
        assert cache.get_seq_length() == 140
        second = out(IDS[:, 140:], past_key_values=cache, use_cache=True)
        assert out(IDS, use_cache=False).past_key_values is None
        assert isinstance(out(IDS[:, :3]).past_key_values, LanguageAwareCache)
        body = out.model(IDS[:, :3], use_cache=True)
    assert second.past_key_values is cache
    assert isinstance(body.past_key_values, LanguageAwareCache)
    again = generate(out, past_key_values=DynamicCache())
    assert isinstance(again.past_key_values, LanguageAwareCache)
    plain = generate(quantized(model, profile, kv=16))
    assert type(plain.past_key_values) is DynamicCache


def test_a_cache_that_is_not_int4_is_named_once(model, profile):
    out = quantized(model, profile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(out, language="sw", **{cache_name(type(out).forward): LanguageAwareCache(out)})
        generate(out, language="sw")
    with pytest.warns(
        UserWarning, match="kv = 4, but the cache of the call is a StaticCache, which keeps keys and values"
    ) as caught:
        output = generate(out, language="sw", cache_implementation="static")
    assert type(output.past_key_values) is StaticCache
    assert sum("kv = 4" in str(one.message) for one in caught) == 1


def test_a_language_that_changes_under_its_cache(model, profile):
    out = quantized(model, profile, kv_clip="static")
    cache = LanguageAwareCache(out)
    with torch.no_grad():
        with la_aciq.language("en"):
            out(IDS, past_key_values=cache)
        with la_aciq.language("sw"), pytest.raises(LaAciqError, match="changed between prefill and decode"):
            out(IDS[:, :1], past_key_values=cache)
        with la_aciq.language("en"), pytest.raises(LaAciqError, match="a batch of 3 rows and got 2"):
            out(IDS[:2, :1], past_key_values=cache)


def test_sliding_window_models():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=54, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=40, initializer_range=0.3, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    mistral = MistralForCausalLM(config).eval()
    profile = la_aciq.calibrate(mistral, random_texts(), seqlen=128, tokens=128, group_size=16, progress=False)
    out = quantized(mistral, profile)
    cache = LanguageAwareCache(out)
    with torch.no_grad():
        plain = quantized(mistral, profile, kv=16)(IDS, use_cache=False).logits
        pieces = [out(piece, past_key_values=cache).logits for piece in IDS.split(10, dim=1)]
    assert all(layer.is_sliding for layer in cache.layers)
    # Rounding moves the logits a little; a wrong mask or a wrong token would move them as far as they go.
    assert (torch.cat(pieces, dim=1) - plain).std() < 0.3 * plain.std()
    assert generate(out).sequences.shape == (3, 156)


def test_the_decoder_of_an_encoder_decoder():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=54, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    t5 = T5ForConditionalGeneration(config).eval()
    profile = la_aciq.calibrate(t5, random_texts(), seqlen=64, tokens=64, group_size=16, progress=False)
    out = quantized(t5, profile)
    output = out.generate(
        IDS[:, :20], max_new_tokens=110, min_new_tokens=110, num_beams=2, language=["en", "sw", "th"],
        return_dict_in_generate=True,
    )  # fmt: skip
    cache = output.past_key_values
    assert isinstance(cache.self_attention_cache, LanguageAwareCache)
    assert cache.self_attention_cache.layers[1]._coded == 64
    assert type(cache.cross_attention_cache) is DynamicCache  # what it holds never grows; it keeps 16 bits
    with torch.no_grad():
        direct = out(IDS[:, :20], decoder_input_ids=IDS[:, :3], use_cache=True).past_key_values
    assert isinstance(direct.self_attention_cache, LanguageAwareCache)


def test_models_without_an_int4_cache(model, profile):
    encoder = BertForMaskedLM(
        BertConfig(vocab_size=61, hidden_size=32, intermediate_size=54, num_hidden_layers=1, num_attention_heads=4)
    )
    measured = la_aciq.calibrate(encoder, random_texts(), seqlen=32, tokens=64, group_size=16, progress=False)
    with pytest.raises(LaAciqError, match="BertForMaskedLM does not generate"):
        quantized(encoder, measured)
    with pytest.raises(LaAciqError, match="kv=4"):
        LanguageAwareCache(model)
    part = {name: site for name, site in profile.sites.items() if not name.startswith("cache.")}
    bare = dataclasses.replace(profile, sites=part)
    with pytest.raises(LaAciqError, match="no keys and values"):
        quantized(model, bare, activations=16, kv_clip="static")


def test_attention_that_asks_for_views_of_keys_gets_contiguous_ones():
    """GPT-NeoX-Japanese, whose attention does not go through transformers' interface."""
    config = GPTNeoXJapaneseConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )
    model = GPTNeoXJapaneseForCausalLM(config).eval()
    measured = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)
    out = quantized(model, measured, activations=16)
    ids = IDS[:1, :150] % 58 + 3
    with torch.no_grad(), la_aciq.language("sw"):
        output = out.generate(
            ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True
        )
    layer = output.past_key_values.layers[0]
    assert layer._coded == BLOCK
    assert layer.keys.is_contiguous()
    assert layer.values.is_contiguous()
    assert output.sequences.shape == (1, 153)

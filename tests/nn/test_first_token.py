"""Which tokens are first ones: the rule by itself, and that a model gives what it gives each sequence alone."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers
from tiny_llama import random_texts, tiny_llama
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

import la_aciq
from la_aciq import QuantConfig
from la_aciq.errors import LaAciqError
from la_aciq.nn import LanguageState, quantize_model
from la_aciq.nn.first_token import cache_name, cache_of, first_of_memory

transformers.logging.set_verbosity_error()

IDS = torch.arange(1, 25).reshape(2, 12)
LOWEST = torch.finfo(torch.float32).min


class Decoder(nn.Module):
    """A decoder that says which of a pass's tokens are first ones."""

    def __init__(self, attention="sdpa", use_cache=False):
        super().__init__()
        self.config = transformers.PreTrainedConfig(use_cache=use_cache)
        self.config._attn_implementation_internal = attention
        self.state = LanguageState(("und", "sink"))
        self.state.attach(self)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        return self.state.ids_for(torch.zeros(*shape, 3)).tolist()


class Recurrent(Decoder):
    """A model with an argument of its own for what it has read."""

    def forward(self, input_ids=None, attention_mask=None, cache_params=None, state=None, **kwargs):
        return self.state.ids_for(torch.zeros(*input_ids.shape, 3)).tolist()


def tokens(batch=1, count=4):
    return torch.zeros(batch, count, dtype=torch.int64)


def filled(length, batch=1):
    cache = DynamicCache()
    if length:
        cache.update(torch.zeros(batch, 1, length, 2), torch.zeros(batch, 1, length, 2), 0)
    return cache


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def additive(mask, low=LOWEST):
    return torch.zeros(mask.shape).masked_fill(~mask, low)


PADDED = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])  # left padding
WANT_PADDED = [[0, 0, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("low", [None, LOWEST, -1e9, -float("inf")])
def test_masks_with_a_row_per_query(low):
    mask = causal(4, 4)[None, None] & PADDED.bool()[:, None, None]
    mask = mask if low is None else additive(mask, low)
    assert Decoder()(tokens(2), mask) == WANT_PADDED
    # The same by kind of layer, and where only some heads see it all.
    sliding = mask if low is None else additive(torch.eye(4, dtype=torch.bool)[None, None])
    assert Decoder()(tokens(2), {"sliding_attention": sliding, "full_attention": mask}) == WANT_PADDED
    narrow = mask.clone()
    narrow[..., :3] = False if low is None else low
    assert Decoder()(tokens(2), torch.cat([narrow, mask], dim=1)) == WANT_PADDED


def test_masks_of_both_directions():
    mask = PADDED.bool()[:, None, None]
    assert Decoder()(tokens(2), mask.expand(2, 1, 4, 4)) == WANT_PADDED
    assert Decoder()(tokens(2), mask) == WANT_PADDED  # one row for all queries
    assert Decoder()(tokens(2), PADDED[:, None].expand(2, 4, 4)) == WANT_PADDED  # BERT's, of ones and zeros


def test_a_block_diagonal_mask_begins_sequences():
    mask = torch.block_diag(causal(3, 3).int(), causal(1, 1).int()).bool()[None, None]
    assert Decoder()(tokens(), mask) == [[1, 0, 0, 1]]
    assert Decoder()(tokens(), additive(mask)) == [[1, 0, 0, 1]]


def test_a_block_mask():
    def visible(batch, head, query, key):
        return (query >= key) & ((query >= 3) == (key >= 3)) & (key > 0)

    mask = create_block_mask(visible, 1, 1, 4, 4, device="cpu", BLOCK_SIZE=4)
    assert Decoder("flex_attention")(tokens(), mask) == [[0, 1, 0, 1]]


def test_masks_in_a_continuation():
    left = torch.tensor([[0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]])
    want = [[0, 1], [0, 0]]  # the first sequence begins after padding as long as the first chunk
    assert Decoder()(tokens(2, 2), left, past_key_values=filled(4, 2)) == want
    mask = causal(2, 6)[None, None] & left.bool()[:, None, None]
    assert Decoder()(tokens(2, 2), mask, past_key_values=filled(4, 2)) == want
    assert Decoder()(tokens(2, 2), additive(mask), past_key_values=filled(4, 2)) == want
    # A static cache has places for tokens to come.
    static = torch.cat([mask, torch.zeros(2, 1, 2, 3, dtype=torch.bool)], dim=3)
    assert Decoder()(tokens(2, 2), static, past_key_values=filled(4, 2)) == want
    # A token of a tree of guesses sees what came before, though not its neighbour.
    tree = torch.cat([torch.ones(1, 1, 2, 4, dtype=torch.bool), torch.eye(2, dtype=torch.bool)[None, None]], dim=3)
    assert Decoder()(tokens(1, 2), tree, past_key_values=filled(4)) == [[0, 0]]


def test_a_sliding_window_that_has_moved():
    config = transformers.MistralConfig(
        num_hidden_layers=1, sliding_window=4, hidden_size=8, num_attention_heads=1, num_key_value_heads=1
    )
    cache = DynamicCache(config=config)
    cache.update(torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 9, 8), 0)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    assert Decoder()(tokens(1, 1), mask, past_key_values=cache) == [[0]]
    mask[..., :3] = False  # sees itself alone
    assert Decoder()(tokens(1, 1), mask, past_key_values=cache) == [[1]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4), r"\[batch, keys\]"),
        (torch.ones(1, 1, 3, 4, dtype=torch.bool), "1 or 4 rows for the queries, got 3"),
        (torch.ones(1, 1, 4, 7, dtype=torch.bool), "expected 4 keys, of 0 cached tokens and 4 new ones, got 7"),
        (torch.ones(1, 1, 4, 4, dtype=torch.int64), "expected bool, or floats to add"),
        (torch.full((1, 4, 4), 0.5), "expected bool, or floats to add"),
        ({"chunked_attention": causal(4, 4)[None, None]}, "chunked attention does not say"),
        ({"chunked_attention": None, "sliding_attention": None}, "do not say where a sequence begins"),
        ([1, 1, 1, 1], "got list"),
    ],
)
def test_masks_that_do_not_tell_are_refused(mask, message):
    with pytest.raises(LaAciqError, match=message):
        Decoder()(tokens(), mask)


@pytest.mark.parametrize("starts", [[0, 3], [5, 0], [1, 7]])
def test_position_ids_that_begin_again(starts):
    """As transformers has it without mask and cache: what does not go up by one begins a sequence."""
    positions = torch.tensor([[starts[0], starts[0] + 1, starts[1], starts[1] + 1]])
    assert Decoder()(tokens(), position_ids=positions) == [[1, 0, 1, 0]]
    rows = torch.cat([positions, torch.arange(4)[None]])
    assert Decoder()(tokens(2), position_ids=rows) == [[1, 0, 1, 0], [1, 0, 0, 0]]
    assert Decoder()(inputs_embeds=torch.zeros(1, 4, 8), position_ids=positions) == [[1, 0, 1, 0]]
    flash = Decoder("flash_attention_2")(tokens(), position_ids=positions)
    assert flash == [[1, 0, int(starts[1] == 0), 0]]


def test_position_ids_of_padded_rows_and_of_continuations():
    for padding in (0, 1):
        positions = torch.tensor([[padding, padding, 0, 1], [0, 1, 2, 3]])
        assert Decoder()(tokens(2), PADDED, positions) == WANT_PADDED
    assert Decoder()(tokens(2), PADDED.flip(1), torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]])) == [[1, 0, 0, 0]] * 2
    assert Decoder()(tokens(1, 2), position_ids=torch.tensor([[5, 6]]), past_key_values=filled(5)) == [[0, 0]]
    assert Decoder()(tokens(1, 3), position_ids=torch.arange(3).expand(3, 1, 3)) == [[1, 0, 0]]  # of an image's axes


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_cache": True}, "pass use_cache=False"),
        ({"attention_mask": torch.ones(1, 4)}, "without attention_mask"),
        ({"past_key_values": filled(4)}, "begin a sequence at 0 where"),
    ],
)
def test_packed_sequences_that_the_model_would_mix_are_refused(kwargs, message):
    with pytest.raises(LaAciqError, match=message):
        Decoder()(tokens(), position_ids=torch.tensor([[0, 1, 0, 1]]), **kwargs)


def test_bounds_of_packed_sequences():
    bounds = torch.tensor([0, 3, 4], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    positions = torch.tensor([[0, 1, 2, 0]])
    for more in (packed, {"seq_idx": torch.tensor([[0, 0, 0, 1]])}):
        assert Decoder()(tokens(), position_ids=positions, **more) == [[1, 0, 0, 1]]
        assert Decoder("flash_attention_2")(tokens(), **more) == [[1, 0, 0, 1]]
        assert Recurrent()(tokens(), **more) == [[1, 0, 0, 1]]
        with pytest.raises(LaAciqError, match="pass position_ids"):
            Decoder()(tokens(), **more)
        with pytest.raises(LaAciqError, match="begin sequences at different tokens"):
            Decoder()(tokens(), position_ids=torch.tensor([[0, 1, 0, 1]]), **more)
        with pytest.raises(LaAciqError, match="attention_mask hides tokens"):
            Decoder("flash_attention_2")(tokens(), torch.tensor([[0, 1, 1, 1]]), **more)
    with pytest.raises(LaAciqError, match="expected bounds from 0 to at most 4"):
        Decoder("flash_attention_2")(tokens(), cu_seq_lens_q=torch.tensor([0, 3, 5]))
    # The second sequence goes on from a cache.
    paged = packed | {"cu_seq_lens_k": torch.tensor([0, 3, 9], dtype=torch.int32)}
    assert Decoder("flash_attention_2")(tokens(), **paged) == [[1, 0, 0, 0]]


class Memory:
    """A cache of a class of its own."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def test_caches_that_keep_no_count():
    empty, begun = transformers.MambaConfig(num_hidden_layers=2, hidden_size=8), None
    empty = DynamicCache(config=empty)
    begun = copy.deepcopy(empty)
    for layer in begun.layers:
        layer.update_conv_state(torch.zeros(1, 16, 5), conv_kernel_size=4)
    assert Recurrent()(tokens(1, 2), cache_params=empty) == [[1, 0]]
    assert Recurrent()(tokens(1, 2), cache_params=begun) == [[0, 0]]
    left = torch.tensor([[0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1]])
    assert Recurrent()(tokens(2, 2), left, cache_params=begun) == [[0, 1], [0, 0]]
    with pytest.raises(LaAciqError, match="from the start of the sequences"):
        Recurrent()(tokens(1, 2), torch.tensor([[0, 1]]), cache_params=begun)
    position = torch.tensor([5, 6])
    assert Recurrent()(tokens(1, 2), cache_params=begun, cache_position=position) == [[0, 0]]
    assert Recurrent()(tokens(1, 2), cache_params=Memory(seqlen_offset=0)) == [[1, 0]]
    assert Recurrent()(tokens(1, 2), cache_params=Memory(seqlen_offset=5)) == [[0, 0]]
    state = [torch.zeros(1, 8, 2) for _ in range(5)]
    state[4] -= 1e30
    assert Recurrent()(tokens(1, 2), state=state) == [[1, 0]]
    state[1][0, 0, 0] = 0.1
    assert Recurrent()(tokens(1, 2), state=state) == [[0, 0]]


def test_other_ways_to_carry_a_past():
    mems = [torch.zeros(5, 1, 8)]
    assert Recurrent()(tokens(1, 2), mems=mems) == [[0, 0]]
    assert Recurrent()(tokens(1, 2), mems=[None]) == [[1, 0]]
    assert Recurrent()(tokens(1, 2), cache={"slen": 5}) == [[0, 0]]
    assert Recurrent()(tokens(1, 2), past_buckets_states=Memory(get_start_idx=lambda: 5)) == [[0, 0]]
    assert Decoder()(tokens(1, 2), cache_position=torch.tensor([5, 6])) == [[0, 0]]
    for name, value in {"past_key_values": ((),), "past_states": [1], "conv_cache": torch.zeros(1)}.items():
        with pytest.raises(LaAciqError, match=f"{name}: "):
            Recurrent()(tokens(1, 2), **{name: value})


def test_a_model_that_keeps_its_state_inside():
    model = Decoder()
    model.block = nn.Module()
    model.block.recurrent_states = None
    model.state = LanguageState(("und", "sink"))
    model._forward_pre_hooks.clear()
    model._forward_hooks.clear()
    model.state.attach(model)
    assert model(tokens(1, 2)) == [[1, 0]]
    assert model(tokens(1, 1), past_key_values=filled(4)) == [[0]]
    assert model(tokens(1, 1), past_key_values=filled(0)) == [[1]]
    for call in ({"input_ids": tokens(1, 1)}, {"input_ids": tokens(1, 2), "position_ids": torch.tensor([[4, 5]])}):
        with pytest.raises(LaAciqError, match="keeps what it has read in its modules"):
            model(**call)


def test_xlnet_marks_padding_by_one():
    assert Recurrent()(tokens(2), input_mask=1 - PADDED) == WANT_PADDED


@pytest.mark.parametrize("form", [2, 3, 4])
def test_the_memory_of_an_encoder(form):
    mask = PADDED.bool()
    mask = mask if form == 2 else mask[:, None].expand(2, 5, 4) if form == 3 else mask[:, None, None]
    assert first_of_memory(mask, 4, torch.device("cpu")).int().tolist() == WANT_PADDED
    assert first_of_memory(None, 4, torch.device("cpu")).int().tolist() == [[1, 0, 0, 0]]


# Whole models.


@pytest.fixture(scope="module")
def llama():
    model = tiny_llama(tie=False)
    profile = la_aciq.calibrate(model, random_texts(), seqlen=64, tokens=128, group_size=16, progress=False)
    return model, profile


CONFIGS = {
    "static": {"clip": "static"},
    "absmax": {},
    "static, no sink": {"clip": "static", "sink": False},
    "static, kv = 4": {"clip": "static", "kv": 4},
}


@pytest.fixture(scope="module", params=CONFIGS)
def quantized(request, llama):
    return quantize_model(*llama, QuantConfig(group_size=16, **CONFIGS[request.param]), progress=False)


def logits(model, ids, **kwargs):
    with torch.no_grad(), la_aciq.language("sw"):
        return model(ids, **kwargs).logits


def close(actual, want):
    torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-4)


def alone(model, *sequences):
    """The logits of each sequence in a call of its own, one after the other."""
    return torch.cat([logits(model, ids[None], use_cache=False)[0] for ids in sequences])


def test_packed_sequences_are_each_as_if_alone(quantized):
    first, second = IDS[0, :7], IDS[1, :5]
    packed, positions = torch.cat([first, second])[None], torch.cat([torch.arange(7), torch.arange(5)])[None]
    want = alone(quantized, first, second)
    close(logits(quantized, packed, position_ids=positions, use_cache=False)[0], want)
    bounds = torch.tensor([0, 7, 12], dtype=torch.int32)
    more = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    close(logits(quantized, packed, position_ids=positions, use_cache=False, **more)[0], want)
    mask = torch.block_diag(causal(7, 7).int(), causal(5, 5).int()).bool()[None, None]
    for form in (mask, additive(mask)):
        close(logits(quantized, packed, position_ids=positions, attention_mask=form, use_cache=False)[0], want)
    with pytest.raises(LaAciqError, match="use_cache=False"):
        logits(quantized, packed, position_ids=positions)


@pytest.mark.parametrize("form", ["left", "left with positions", "left in four dimensions", "right"])
def test_padded_rows_are_each_as_if_alone(quantized, form):
    lengths = (4, 9, 12)
    rows = [IDS[number % 2, :length] for number, length in enumerate(lengths)]
    ids, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if form == "right" else slice(12 - len(row), 12)
        ids[number, place], mask[number, place] = row, 1
    kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if form == "right":
        del kwargs["position_ids"]
    if "four" in form:
        kwargs["attention_mask"] = causal(12, 12)[None, None] & mask.bool()[:, None, None]
    close(logits(quantized, ids, **kwargs)[mask.bool()], alone(quantized, *rows))
    if form != "right":
        embeddings = quantized.get_input_embeddings()(ids)
        close(logits(quantized, None, inputs_embeds=embeddings, **kwargs)[mask.bool()], alone(quantized, *rows))


@pytest.mark.parametrize("cached", [DynamicCache, StaticCache])
@pytest.mark.parametrize("form", [None, 2, 4])
def test_chunks_of_padded_rows(quantized, cached, form):
    """The shorter sequence begins in the second chunk, or in the third."""
    padding = 0 if form is None else 7
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache() if cached is DynamicCache else StaticCache(config=quantized.config, max_cache_len=16)
    outputs = []
    for begin, end in ((0, 5), (5, 7), (7, 8), (8, 12)):
        kwargs = {"past_key_values": cache, "position_ids": positions[:, begin:end]}
        if form == 2:
            kwargs["attention_mask"] = mask[:, :end]
        elif form == 4:
            places = 16 if cached is StaticCache else end
            whole = torch.zeros(2, 1, 12, 16, dtype=torch.bool)
            whole[..., :12] = causal(12, 12) & mask.bool()[:, None, None]
            kwargs["attention_mask"] = whole[:, :, begin:end, :places]
        with pytest.warns(UserWarning, match="kv = 4") if _warns(quantized, cache) else nullcontext():
            outputs.append(logits(quantized, IDS[:, begin:end], **kwargs))
    close(torch.cat(outputs, dim=1)[mask.bool()], alone(quantized, IDS[0, padding:], IDS[1]))


def _warns(model, cache):
    return type(cache) is StaticCache and model.la_aciq.config.kv == 4 and model.la_aciq.state._make_cache._warn


def generated(model, ids, **kwargs):
    """Logits [steps, vocabulary] of generation, and those of one pass over what was generated."""
    with la_aciq.language("sw"):
        output = model.generate(
            ids,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            **kwargs,
        )
    whole = logits(model, output.sequences[:, :-1], use_cache=False)[:, ids.shape[1] - 1 :]
    return torch.stack(output.logits, dim=1), whole


def test_generation_however_it_is_done(quantized, llama):
    ids = IDS[:1, :9]
    close(*generated(quantized, ids))
    close(*generated(quantized, ids, assistant_model=llama[0]))
    close(*generated(quantized, torch.cat([ids, ids], dim=1), prompt_lookup_num_tokens=3))
    cache = DynamicCache(config=quantized.config)
    logits(quantized, ids[:, :5], past_key_values=cache)
    close(*generated(quantized, ids, past_key_values=cache))
    close(*generated(quantized, ids, prefill_chunk_size=4))


COMMON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": None}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
STATE_SPACES = {
    "Mamba": {"state_size": 8, "expand": 2},
    "Mamba2": {"state_size": 8, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "FalconMamba": {"state_size": 8},
    "Rwkv": {"attention_hidden_size": 32, "intermediate_size": 48, "context_length": 128, "rescale_every": 0},
    "Jamba": {
        **ATTENTION,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 4,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "Bamba": {**ATTENTION, **MAMBA, "attn_layer_indices": [1]},
    "FalconH1": {**ATTENTION, **MAMBA, "head_dim": 8, "mamba_d_ssm": 64},
    "GraniteMoeHybrid": {**ATTENTION, **MAMBA, **LINEAR, "shared_intermediate_size": 48, "num_local_experts": 0},
    "Lfm2": {**ATTENTION, "layer_types": ["conv", "full_attention"]},
    "RecurrentGemma": {
        **ATTENTION,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "lru_width": 32,
        "attention_window_size": 64,
        "head_dim": 8,
    },
}
PAST = ("cache", "past_key_values", "cache_params", "state")


@pytest.mark.filterwarnings("ignore:.*layers are left as they are")
@pytest.mark.parametrize("name", STATE_SPACES)
def test_state_spaces_decode_what_one_pass_gives(name):
    """By hand, and by `generate`."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**COMMON | STATE_SPACES[name])
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    texts = {tag: 3 + ids % 50 for tag, ids in random_texts().items()}
    profile = la_aciq.calibrate(model, texts, seqlen=64, tokens=128, group_size=16, progress=False)
    ids = torch.arange(3, 19)[None]
    for settings in ({"clip": "static"}, {}, {"clip": "static", "sink": False}):
        quantized = quantize_model(model, profile, QuantConfig(group_size=16, **settings), progress=False)
        close(*generated(quantized, ids))
        whole = logits(quantized, ids, use_cache=False)[0, -3:]
        with torch.no_grad(), la_aciq.language("sw"):
            output = quantized(ids[:, :-3], use_cache=True)
        past = next((argument for argument in PAST if getattr(output, argument, None) is not None), None)
        if past is None:  # its recurrent layers keep their states themselves, and its output has no cache
            with pytest.raises(LaAciqError, match="keeps what it has read in its modules"):
                logits(quantized, ids[:, -3:-2], use_cache=True)
            continue
        for place in range(-3, 0):
            kwargs = {past: output[past], "use_cache": True}
            if name == "Bamba":
                kwargs["position_ids"] = torch.tensor([[len(ids[0]) + place]])  # which it does not count by itself
            with torch.no_grad(), la_aciq.language("sw"):
                output = quantized(ids[:, ids.shape[1] + place :][:, :1], **kwargs)
            close(output.logits[0, -1], whole[place])


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export")
def test_export_and_tracing_are_refused(llama, sink, tmp_path):
    """The program would keep the language of its example."""
    quantized = quantize_model(*llama, QuantConfig(group_size=16, clip="static", sink=sink), progress=False)
    kwargs = {"input_ids": IDS, "use_cache": False}
    with pytest.raises(LaAciqError, match="cannot be exported or traced"):
        torch.export.export(quantized, (), kwargs, strict=False)
    with pytest.raises(Unsupported, match="cannot be exported or traced"):  # PyTorch's, with our reason in it
        torch.export.export(quantized, (), kwargs, strict=True)
    with pytest.raises(LaAciqError, match="cannot be exported or traced"):
        torch.jit.trace(quantized, (IDS,), check_trace=False)
    with pytest.raises(LaAciqError, match="cannot be exported or traced"):  # PyTorch's other exporter is torch.export
        torch.onnx.export(quantized, (IDS,), tmp_path / "model.onnx", dynamo=False)
    with pytest.raises(LaAciqError, match="cannot be exported or traced"):
        torch.export.export(quantized.model, (IDS,), {"use_cache": False}, strict=False)


class Called(nn.Module):
    """What transformers' decoders are to the state: `forward` takes a cache under one name."""

    def __init__(self, state):
        super().__init__()
        self.state, self.seen, self.caches = state, [], []

    def run(self, input_ids, cache):
        self.seen.append(self.state.ids_for(torch.zeros(*input_ids.shape, 3)).tolist())
        self.caches.append(cache)


class Before(Called):
    def forward(self, input_ids, past_key_values=None, position_ids=None, use_cache=True):
        self.run(input_ids, past_key_values)


class Since(Called):
    def forward(self, input_ids, cache=None, position_ids=None, use_cache=True, **old):
        self.run(input_ids, old.get("past_key_values") if cache is None else cache)


class Unlike(Called):
    def forward(self, input_ids, cache: dict[str, Tensor] | None = None, use_cache=True):
        self.run(input_ids, cache)


@pytest.mark.parametrize(
    ("kind", "name", "called"),
    [
        (Before, "past_key_values", "past_key_values"),
        (Since, "cache", "cache"),
        (Since, "cache", "past_key_values"),  # which 5.24 still takes
        (Unlike, None, "cache"),
    ],
)
def test_the_cache_has_one_of_two_names(kind, name, called):
    """transformers 5.24 renamed the argument; XLM's of the new name is a dictionary."""
    assert cache_name(kind.forward) == name
    model = kind(LanguageState(("und", "sw", "sink")))
    new = object()
    model.state.attach(model, lambda module, arguments: new if cache_of(arguments) is None else None)
    past = {"slen": 3} if kind is Unlike else DynamicCache()
    if kind is not Unlike:
        past.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
    ids = torch.ones(1, 2, dtype=torch.int64)
    with la_aciq.language("sw"):
        model(ids)
        model(ids, **{called: past})
    assert model.seen == [[[2, 1]], [[1, 1]]]
    assert model.caches == ([None, past] if kind is Unlike else [new, past])
    if kind is not Unlike:
        with la_aciq.language("sw"), pytest.raises(LaAciqError, match="position_ids begin a sequence at 0 where"):
            model(ids, position_ids=torch.tensor([[0, 1]]), **{called: past})

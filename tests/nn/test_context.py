"""Which entry of the clip tables each token of a forward pass reads."""

import asyncio
import contextvars
import copy
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from la_aciq.errors import LaAciqError
from la_aciq.nn import LanguageState, language, languages
from la_aciq.nn.entries import _match

ENTRIES = ("und", "en", "sw", "pt", "sink")
UND, EN, SW, PT, SINK = range(5)


class Cache:
    """As much of a transformers cache as the state asks for."""

    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


class Spy(nn.Module):
    """A model that keeps the ids its layers would read, and does what `inside` says in the middle of its pass."""

    def __init__(self, inside=None):
        super().__init__()
        self.state = LanguageState(ENTRIES)
        self.state.attach(self)
        self.inside = inside

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None):
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        ids = self.state.ids_for(torch.zeros(*inputs.shape[:2], 3))
        if self.inside is not None:
            self.inside()
        return ids.clone()


def ids(batch=1, tokens=4):
    return torch.zeros(batch, tokens, dtype=torch.int64)


def test_no_context_reads_the_pooled_entry_and_the_sink():
    assert Spy()(ids(2)).tolist() == [[SINK, UND, UND, UND]] * 2


def test_one_language_for_the_batch():
    with language("sw"):
        out = Spy()(ids(2))
    assert out.tolist() == [[SINK, SW, SW, SW]] * 2
    assert out.dtype == torch.int32


def test_a_language_per_row_and_embeddings_as_input():
    with languages(["sw", "en"]):
        assert Spy()(inputs_embeds=torch.zeros(2, 3, 8)).tolist() == [[SINK, SW, SW], [SINK, EN, EN]]


def test_left_padding_moves_the_sink():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    with languages(["sw", "en", "pt"]):
        out = Spy()(ids(3), attention_mask=mask)
    assert out.tolist() == [[SW, SW, SINK, SW], [SINK, EN, EN, EN], [PT, PT, PT, SINK]]
    # By position as well as by name.
    assert Spy()(ids(1), mask[:1])[0].tolist() == [UND, UND, SINK, UND]


def test_decode_steps_and_later_chunks_have_no_sink():
    model = Spy()
    with language("sw"):
        assert model(ids(1, 1), past_key_values=Cache(7)).tolist() == [[SW]]
        assert model(ids(1, 2), past_key_values=Cache(torch.tensor(7))).tolist() == [[SW, SW]]
        assert model(ids(1, 2), past_key_values=Cache(0)).tolist() == [[SINK, SW]]


def test_first_token_in_a_later_chunk_after_long_padding():
    mask = torch.tensor([[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
    out = Spy()(ids(2, 2), attention_mask=mask, past_key_values=Cache(4))
    assert out.tolist() == [[UND, SINK], [UND, UND]]


def test_entries_without_a_sink():
    state = LanguageState(("und", "en"))
    model = nn.Module()
    model.forward = lambda input_ids: state.ids_for(torch.zeros(1, 2, 3)).clone()
    state.attach(model)
    with language("en"):
        assert model(ids(1, 2)).tolist() == [[1, 1]]


def test_regional_tags_are_served_by_their_language_and_unknown_ones_counted():
    model = Spy()
    with language("pt-br"):
        assert model(ids())[0, 1] == PT
    with languages(["th", "en"]):
        assert model(ids(2))[:, 1].tolist() == [UND, EN]
    with language("th"):
        model(ids(3))
    with language("und"):
        model(ids())
    with language("th-Thai-TH"):
        model(ids())
    assert model.state.unserved == {"th": 5}


def test_what_clients_send_is_kept_in_bounds():
    model = Spy()
    for variant in range(200):
        with language(f"th-x-{variant}"):
            model(ids())
    assert model.state.unserved == {"th": 200}
    assert _match.cache_info().currsize <= _match.cache_info().maxsize == 4096


def test_contexts_nest_and_end():
    model = Spy()
    with language("sw"):
        with language("en"):
            assert model(ids())[0, 1] == EN
        assert model(ids())[0, 1] == SW
    assert model(ids())[0, 1] == UND


def test_ids_of_a_shape_keep_their_address():
    state = LanguageState(ENTRIES)
    model = nn.Module()
    model.forward = lambda input_ids: state.ids_for(torch.zeros(*input_ids.shape, 3)).data_ptr()
    state.attach(model)
    first = {shape: model(ids(*shape)) for shape in [(1, 4), (2, 9), (1, 700)]}
    with language("sw"):
        assert {shape: model(ids(*shape)) for shape in reversed(first)} == first
    # Many lengths share few buffers: at most two entries per token of the longest, and per row of the largest batch.
    for tokens in range(1, 300):
        model(ids(1, tokens))
    assert state._buffers.elements <= 2 * (1024 + 2)


def test_passes_in_and_out_of_inference_mode_share_the_buffer():
    model = Spy()
    with torch.inference_mode(), language("sw"):
        model(ids())
    with language("en"):
        assert model(ids())[0, 1] == EN
    with torch.inference_mode(), language("sw"):
        assert model(ids())[0, 1] == SW


def test_flattened_and_shortened_inputs():
    seen = []
    state = LanguageState(ENTRIES)
    model = nn.Module()

    def forward(input_ids):
        seen.append(state.ids_for(torch.zeros(6, 5)))
        seen.append(state.ids_for(torch.zeros(2, 1, 5)))
        seen.append(state.ids_for(torch.zeros(2, 3, 4, 5)))
        state.ids_for(torch.zeros(7, 5))

    model.forward = forward
    state.attach(model)
    with languages(["sw", "en"]), pytest.raises(RuntimeError, match=r"\[7, 5\].*\[2, 3\]"):
        model(ids(2, 3))
    assert seen[0].tolist() == [SINK, SW, SW, SINK, EN, EN]
    assert seen[1].tolist() == [[SW], [EN]]
    assert seen[2].tolist() == [[SINK, SW, SW], [SINK, EN, EN]]


def test_outside_a_pass_there_are_no_ids():
    assert LanguageState(ENTRIES).ids_for(torch.zeros(1, 4, 3)) is None


def test_two_threads_at_once_are_refused_and_never_mixed():
    inside, go_on = threading.Event(), threading.Event()

    def wait():
        inside.set()
        assert go_on.wait(20)

    model = Spy(wait)
    results = []

    def run():
        with language("sw"):
            results.append(model(ids()))

    thread = threading.Thread(target=run, name="first-caller")
    thread.start()
    assert inside.wait(20)
    with language("en"), pytest.raises(RuntimeError, match=r"two threads.*first-caller"):
        model(ids())
    go_on.set()
    thread.join()
    assert results[0].tolist() == [[SINK, SW, SW, SW]]
    # Once the first is through, the second may go.
    with language("en"):
        assert model(ids())[0, 1] == EN


def test_a_thread_does_not_inherit_the_language():
    model, results = Spy(), []
    with language("sw"):
        thread = threading.Thread(target=lambda: results.append(model(ids())))
        thread.start()
        thread.join()
    assert results[0][0, 1] == UND


def test_a_thread_runs_under_the_context_it_is_handed():
    model, results = Spy(), []
    with language("sw"):
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(lambda: results.append(model(ids())),))
        thread.start()
        thread.join()
    assert results[0][0, 1] == SW


def test_a_pass_without_a_language_warns_once():
    model = Spy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with language("und"):
            model(ids())
        with languages(["th"]):
            model(ids())
        twin = copy.deepcopy(model)
    for one in (model, twin):
        with pytest.warns(UserWarning, match=r"no language set.*la_aciq\.language\('sw'\)") as caught:
            one(ids())
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one(ids())
    without = Spy()
    without.state._entries._warn = LanguageState(("und", "sink"))._entries._warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without(ids())
        assert not LanguageState(ENTRIES, by_language=False)._entries._warn


def test_asyncio_tasks_keep_their_own_language():
    model = Spy()

    async def serve(tag):
        with language(tag):
            await asyncio.sleep(0.001)
            return int(model(ids())[0, 1])

    async def all_of_them():
        return await asyncio.gather(*(serve(tag) for tag in ("sw", "en", "pt") * 4))

    assert asyncio.run(all_of_them()) == [SW, EN, PT] * 4


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_a_pass_that_fails_does_not_block_the_next(error):
    def fail():
        raise error

    model = Spy(fail)
    with pytest.raises(type(error)):
        model(ids())
    model.inside = None
    with language("sw"):
        assert model(ids())[0, 1] == SW


def test_an_interrupted_thread_that_has_ended_does_not_block_others():
    def fail():
        raise KeyboardInterrupt

    model = Spy(fail)

    def run():
        with pytest.raises(KeyboardInterrupt):
            model(ids())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    model.inside = None
    assert model(ids())[0, 1] == UND


def test_a_copy_has_a_state_of_its_own():
    model = Spy()
    with language("th"):
        model(ids())
    twin = copy.deepcopy(model)
    assert twin.state is not model.state
    with language("sw"):
        assert twin(ids())[0, 1] == SW
    assert twin.state.unserved == {}
    assert model.state.unserved == {"th": 1}


class Body(nn.Module):
    """A model whose body can be called alone, as in transformers."""

    def __init__(self):
        super().__init__()
        self.base_model = Spy()
        self.state = self.base_model.state = LanguageState(ENTRIES)
        self.base_model._forward_pre_hooks.clear()
        self.base_model._forward_hooks.clear()
        self.state.attach(self)

    def forward(self, input_ids):
        return self.base_model(input_ids), self.state.ids_for(torch.zeros(*input_ids.shape, 3))


def test_the_body_alone_and_within_the_model():
    model = Body()
    with language("th"):
        model(ids(2))
    assert model.state.unserved == {"th": 2}
    with language("sw"):
        inside, after = model(ids())
        assert inside.tolist() == after.tolist() == [[SINK, SW, SW, SW]]
        assert model.base_model(ids()).tolist() == [[SINK, SW, SW, SW]]
    assert model.state.ids_for(torch.zeros(1, 4, 3)) is None


def test_an_interruption_in_the_body():
    def interrupt():
        raise KeyboardInterrupt

    model = Body()
    model.base_model.inside = interrupt
    with pytest.raises(KeyboardInterrupt), language("en"):
        model(ids())
    model.base_model.inside = None
    with language("sw"):
        assert model.base_model(ids())[0, 1] == SW
        assert model(ids())[0][0, 1] == SW
    results = []
    thread = threading.Thread(target=lambda: results.append(model(ids())[0]))
    thread.start()
    thread.join()
    assert results[0][0, 1] == UND


def test_another_batch_size_is_refused():
    with languages(["sw", "en"]), pytest.raises(LaAciqError, match="2 tags for a batch of 3"):
        Spy()(ids(3))


@pytest.mark.parametrize("tag", ["", "x y", "klingon-language", "e" * 100])
def test_tags_that_are_not_bcp47_are_refused_at_the_with_statement(tag):
    with pytest.raises(LaAciqError, match="tag"), language(tag):
        pass
    with pytest.raises(LaAciqError, match="tag"), languages(["en", tag]):
        pass


def test_languages_of_a_single_string_is_a_type_error():
    with pytest.raises(TypeError, match="one tag per row"), languages("sw"):
        pass


def test_a_call_without_tokens_is_refused():
    with pytest.raises(LaAciqError, match="input_ids"):
        Spy()(torch.zeros(3))


def test_entries_must_start_with_und():
    with pytest.raises(ValueError, match="must start with 'und'"):
        LanguageState(("en", "und"))


def test_old_names_work_and_say_the_new_ones():
    state = LanguageState(ENTRIES)
    with pytest.warns(DeprecationWarning, match=r"LanguageState\.rows is now LanguageState\.entries"):
        assert state.rows == state.entries == ENTRIES
    with pytest.warns(DeprecationWarning, match=r"LanguageState\.row is now LanguageState\.entry"):
        assert state.row("sw") == state.entry("sw") == SW


class Part(nn.Module):
    """An encoder or decoder that keeps the ids its layers would read."""

    def __init__(self, state, reads="input_ids", embeds=False):
        super().__init__()
        self.state, self.main_input_name, self.seen = state, reads, {}
        self.embeddings = nn.Embedding(1, 1) if embeds else None

    def get_input_embeddings(self):
        if self.embeddings is None:
            raise NotImplementedError
        return self.embeddings

    def forward(self, input_ids=None, encoder_hidden_states=None, **inputs):
        read = inputs.get(self.main_input_name, input_ids)
        tokens = 2 * read.shape[1] if read.is_floating_point() else read.shape[1]
        self.seen["tokens"] = self.state.ids_for(torch.zeros(len(read), tokens, 5)).clone()
        if encoder_hidden_states is not None:
            self.seen["memory"] = self.state.ids_for(encoder_hidden_states).clone()
        return torch.zeros(len(read), tokens, 8)


class EncoderDecoder(nn.Module):
    def __init__(self, reads="input_ids", decodes="input_ids", embeds=False, mask_name="encoder_attention_mask"):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True)
        self.state = LanguageState(ENTRIES)
        self.encoder, self.decoder = Part(self.state, reads, embeds), Part(self.state, decodes, True)
        self.mask_name = mask_name
        self.state.attach(self)

    def get_encoder(self):
        return self.encoder

    def get_decoder(self):
        return self.decoder

    def forward(self, decoder_input_ids, attention_mask=None, **inputs):
        self.decoder(
            **{self.decoder.main_input_name: decoder_input_ids, self.mask_name: attention_mask},
            encoder_hidden_states=self.encoder(attention_mask=attention_mask, **inputs),
        )


@pytest.mark.parametrize("decoded", [1, 3, 4])
@pytest.mark.parametrize("mask_name", ["encoder_attention_mask", "encoder_padding_mask"])  # the second one is FSMT's
@pytest.mark.parametrize("reads", ["input_ids", "input_values"])  # SpeechT5's parts read ids under the second name
def test_encoder_and_decoder_have_positions_of_their_own(decoded, mask_name, reads):
    model = EncoderDecoder(reads, reads, embeds=True, mask_name=mask_name)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    with languages(["sw", "ja"]):
        model(ids(2, decoded), attention_mask=mask, **{reads: ids(2, 3)})
    assert model.encoder.seen["tokens"].tolist() == [[SINK, SW, SW], [UND, SINK, UND]]
    # Cross-attention reads the encoder's positions, also where there are as many as the decoder's.
    assert model.decoder.seen["memory"].tolist() == [[SINK, SW, SW], [UND, SINK, UND]]
    assert model.decoder.seen["tokens"].tolist() == [[SINK, *[SW] * (decoded - 1)], [SINK, *[UND] * (decoded - 1)]]
    assert model.state.unserved == {"ja": 1}  # once, not once for each part
    assert model.state.ids_for(torch.zeros(2, 3, 5)) is None


def test_an_encoder_of_features_has_languages_and_no_first_token():
    model = EncoderDecoder("input_features")
    with languages(["sw", "en"]):
        model(ids(2, 3), input_features=torch.zeros(2, 80, 7))
    assert model.encoder.seen["tokens"].tolist() == [SW, EN]
    assert model.decoder.seen["memory"].tolist() == [SW, EN]
    assert model.decoder.seen["tokens"].tolist() == [[SINK, SW, SW], [SINK, EN, EN]]


def test_rows_picked_out_of_the_pass_keep_their_languages():
    model = Spy()
    seen = []

    def inside():
        x = torch.zeros(6, 5)
        with model.state.picked(x, torch.tensor([5, 0, 1])):
            seen.append(model.state.ids_for(torch.zeros(3, 7)).tolist())
        seen.append(model.state.ids_for(x).tolist())

    model.inside = inside
    with languages(["sw", "en"]):
        model(ids(2, 3))
    assert seen == [[EN, SINK, SW], [SINK, SW, SW, SINK, EN, EN]]
    with model.state.picked(torch.zeros(6, 5), torch.tensor([1])):
        assert model.state.ids_for(torch.zeros(1, 7)) is None


def test_the_entry_that_all_tokens_have():
    model = Spy()
    rows = []
    model.inside = lambda: rows.append(model.state.common_entry)
    mask = torch.tensor([[0, 0, 0, 0, 0, 1]])
    with language("sw"):
        model(ids(2, 3))  # with first tokens
        model(ids(2, 1), past_key_values=Cache(7))
        model(ids(1, 1), mask, past_key_values=Cache(5))  # the first token after padding
    with languages(["sw", "en"]):
        model(ids(2, 1), past_key_values=Cache(7))
    with languages(["en", "en"]):
        model(ids(2, 1), past_key_values=Cache(7))
    model(ids(1, 1), past_key_values=Cache(7))
    assert rows == [None, SW, None, None, EN, UND]
    assert model.state.common_entry is None

"""Texts from files to windows of token ids."""

import json

import numpy as np
import pytest
import torch
from byte_llama import byte_tokenizer, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from la_aciq.calibration import TokenizedText, load_texts, tokenize
from la_aciq.errors import LaAciqError


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


class TestLoading:
    def test_a_folder_of_files_named_by_any_form_of_the_tag(self, tmp_path):
        write(tmp_path, sw="habari", deu="Guten Tag", **{"pt-br": "﻿bom dia"})
        assert load_texts(tmp_path) == {"de": "Guten Tag", "pt-BR": "bom dia", "sw": "habari"}

    def test_jsonl_puts_the_lines_of_a_language_together(self, tmp_path):
        lines = [("sw", "moja"), ("en", "one\u2028line"), ("swa", "mbili")]
        file = tmp_path / "texts.jsonl"
        file.write_text(
            "\n".join(json.dumps({"language": a, "text": b}, ensure_ascii=False) for a, b in lines) + "\n\n"
        )
        assert load_texts(file) == {"sw": "moja\n\nmbili", "en": "one\u2028line"}

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"english": "hello"}, r"english\.txt: language tag 'english' is not BCP-47"),
            ({"und": "hello"}, r"und\.txt: 'und' names no language"),
            ({"und-Latn": "hello"}, r"und-Latn\.txt: 'und-Latn' names no language"),
            ({"mul_US": "hello"}, "'mul_US' names no language"),
            ({"sw": "habari", "swa": "habari"}, "one of 2 files for the language 'sw'"),
            ({"sw": " \n"}, "the text for 'sw' is empty"),
            ({"sw": b"habari \xe9\xa8"}, "not UTF-8: byte 7"),
            ({"sw": "habari".encode("utf-16")}, "not UTF-8: byte 0"),
            ({}, r"has no \.txt files"),
        ],
    )
    def test_a_folder_that_cannot_be_read(self, tmp_path, files, message):
        with pytest.raises(LaAciqError, match=message) as error:
            load_texts(write(tmp_path, **files))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"language": "sw", "text": "a"}\n{"language": ', "line 2 is not JSON"),
            ('["sw", "a"]', 'line 1: expected an object with the strings "language" and "text"'),
            ('{"language": "sw", "text": 3}', "line 1: expected an object"),
            ('{"language": "klingon", "text": "a"}', "line 1: language tag 'klingon'"),
            ('{"language": "sw", "text": ""}', "line 1: the text for 'sw' is empty"),
            ('{"language": "zxx-x-code", "text": "a"}', "line 1: 'zxx-x-code' names no language"),
            (
                '{"language": "en", "text": "a"}\n{"language": "sw", "text": "a \\ud83d b"}',
                r"line 2: the text for 'sw' has a lone surrogate, U\+D83D, as character 2",
            ),
            ("[" * 100_000, "line 1 is not JSON"),
            ("\n \n", "is empty"),
        ],
    )
    def test_a_jsonl_file_that_cannot_be_read(self, tmp_path, content, message):
        file = tmp_path / "texts.jsonl"
        file.write_text(content)
        with pytest.raises(LaAciqError, match=message):
            load_texts(file)

    def test_a_character_that_json_escapes_as_a_pair_of_surrogates(self, tmp_path):
        (tmp_path / "texts.jsonl").write_text('{"language": "en", "text": "a \\ud83d\\ude00 b"}\r\n')
        assert load_texts(tmp_path / "texts.jsonl") == {"en": "a 😀 b"}

    def test_no_such_place(self, tmp_path):
        with pytest.raises(LaAciqError, match="not found"):
            load_texts(tmp_path / "nowhere")


class TestTokenizing:
    def test_byte_counts_of_a_byte_tokenizer(self):
        text = "aé๛𝄞b"  # 1, 2, 3, 4 and 1 bytes of UTF-8
        own = tokenize({"th": text}, byte_tokenizer())["th"]
        assert len(own.ids) == 11
        # The bytes of a character belong to the first of its tokens.
        assert own.byte_ends.tolist() == [1, 3, 3, 6, 6, 6, 10, 10, 10, 10, 11]

    @settings(max_examples=50, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
    def test_byte_ends_of_any_text_reach_its_end(self, text):
        own = tokenize({"en": text}, byte_tokenizer())["en"]
        assert own.byte_ends[-1] == len(text.encode())
        assert (np.diff(own.byte_ends) >= 0).all()

    def test_a_list_of_strings_is_paragraphs(self):
        tokenizer = byte_tokenizer()
        joined = tokenize({"en": "one\n\ntwo"}, tokenizer)["en"]
        assert tokenize({"en": ["one", "two"]}, tokenizer)["en"].ids.tolist() == joined.ids.tolist()

    @pytest.mark.parametrize("ids", [[3, 1, 2], torch.tensor([3, 1, 2]), np.array([3, 1, 2], dtype=np.int32)])
    def test_token_ids_need_no_tokenizer(self, ids):
        own = tokenize({"swa": ids})["sw"]
        assert own.ids.dtype == np.int64
        assert own.ids.tolist() == [3, 1, 2]
        assert own.byte_ends is None

    def test_a_tokenizer_that_begins_texts_with_a_token(self):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        assert tokenize({"en": "a"}, tokenizer)["en"].bos is None  # it has one and does not use it
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
        own = tokenize({"en": "abcde"}, tokenizer)["en"]
        assert own.bos == 256
        assert 256 not in own.ids

    @pytest.mark.parametrize(
        ("texts", "error", "message"),
        [
            ({}, LaAciqError, "texts is empty"),
            ({"en": ""}, LaAciqError, "the text for 'en' is empty"),
            ({"en": []}, LaAciqError, "the text for 'en' is empty"),
            ({"xx": "a"}, LaAciqError, "BCP-47"),
            ({"und-Latn": "a"}, LaAciqError, "'und-Latn' names no language"),
            ({"en": "a", "sw": "\udca9"}, LaAciqError, r"the text for 'sw' has a lone surrogate, U\+DCA9"),
            ({"en": ["a", "b\ud83d"]}, LaAciqError, r"the text for 'en' has a lone surrogate, U\+D83D"),
            ({"de": "a", "deu": "b"}, LaAciqError, "the language 'de' twice"),
            ({"en": torch.zeros(3)}, TypeError, "one-dimensional token ids"),
            ({"en": torch.zeros((2, 3), dtype=torch.int64)}, TypeError, "one-dimensional token ids"),
            ({"en": 3}, TypeError, "one-dimensional token ids"),
        ],
    )
    def test_texts_that_are_none(self, texts, error, message):
        with pytest.raises(error, match=message):
            tokenize(texts, byte_tokenizer())

    def test_a_string_without_a_tokenizer(self):
        with pytest.raises(TypeError, match="tokenizer is needed"):
            tokenize({"en": "a"})


class TestWindows:
    @settings(max_examples=60, deadline=None)
    @given(n=st.integers(2, 200), seqlen=st.integers(2, 50), skip=st.integers(0, 50), bos=st.sampled_from([None, 999]))
    def test_windows_cover_the_tokens_once_and_count_their_bytes(self, n, seqlen, skip, bos):
        ids = np.arange(n + skip + 7)
        widths = ids % 4
        text = TokenizedText(ids, np.cumsum(widths), bos)
        windows = text.windows("en", tokens=n, seqlen=seqlen, skip=skip)
        read = [w.ids if bos is None else w.ids[1:] for w in windows]
        assert np.concatenate(read).tolist() == list(range(skip, skip + n))
        for window in windows:
            assert len(window.ids) <= seqlen
            assert bos is None or window.ids[0] == bos
            assert window.byte_counts.tolist() == widths[window.ids[1:]].tolist()

    def test_too_short_a_text_says_how_much_is_needed(self):
        text = TokenizedText(np.arange(100))
        with pytest.raises(LaAciqError, match="the text for 'sw' is too short: 101 tokens are needed, and it has 100"):
            text.windows("sw", tokens=101, seqlen=10)
        with pytest.raises(
            LaAciqError, match="60 tokens after 50 for calibration are needed, 110 in all, and it has 100"
        ):
            text.windows("sw", tokens=60, seqlen=10, skip=50)

    @pytest.mark.parametrize(
        "bad", [{"seqlen": 1, "tokens": 4}, {"seqlen": 4, "tokens": 1}, {"seqlen": 4, "tokens": 4, "skip": -1}]
    )
    def test_sizes_that_make_no_window(self, bad):
        with pytest.raises(LaAciqError, match="at least 2"):
            TokenizedText(np.arange(100)).windows("en", **bad)

    def test_texts_of_the_tests_are_as_long_as_they_say(self):
        assert 4000 <= len(sentences("th")) < 4200

"""Language tags, against BCP-47 (RFC 5646) and the IANA registry."""

import pytest
import torch
from tiny_llama import random_texts, tiny_llama

import la_aciq
from la_aciq.errors import LaAciqError
from la_aciq.nn import QuantConfig, quantize_model
from la_aciq.tags import canonical, match


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("sw", "sw"),
        ("pt-br", "pt-BR"),
        ("DEU", "de"),
        ("zho", "zh"),
        ("zh-hans-cn", "zh-Hans-CN"),
        ("iw", "he"),  # the registry's replacement of a withdrawn code
        ("yue", "yue"),
        ("Und", "und"),
        ("und-Latn", "und"),
        ("UND_us", "und"),
        ("und-x-mixed", "und"),
        ("mul", "und"),
        ("Mul-x-foo", "und"),
        ("mis-Thai", "und"),
        ("zxx_Latn", "und"),
        ("root", "und"),
        ("i-default", "und"),
        ("no", "no"),
        ("sh", "sr-Latn"),
        ("pt_BR", "pt-BR"),
        ("x-ours", "x-ours"),
        ("qaa-Latn", "qaa-Latn"),
    ],
)
def test_canonical_form(tag, expected):
    assert canonical(tag) == expected
    assert canonical(canonical(tag)) == expected


@pytest.mark.parametrize(
    "tag", ["", "english", "xx", "e", "en_us_!", "en--US", "sw\n", "../../etc", "a" * 65, "123", " pt", "ｅｎ"]
)
def test_what_is_not_a_tag_is_refused_in_one_sentence(tag):
    with pytest.raises(LaAciqError, match="BCP-47") as error:
        canonical(tag)
    assert "\n" not in str(error.value)


def test_a_tag_is_a_string():
    with pytest.raises(TypeError, match="language tag"):
        canonical(None)


@pytest.mark.parametrize(
    ("tag", "rows", "expected"),
    [
        ("sw", ["und", "en", "sw"], "sw"),
        ("pt-BR", ["und", "en", "pt"], "pt"),
        ("pt-BR", ["und", "pt", "pt-BR"], "pt-BR"),
        ("deu", ["und", "de"], "de"),
        ("zh-Hans-CN", ["und", "zh"], "zh"),
        ("sw", ["und", "en"], "und"),
        ("da", ["und", "no"], "und"),  # close, and yet another language
        ("und", ["und", "en"], "und"),
        ("en", ["und"], "und"),
        *((tag, ["und", "en", "ru", "th", "x-other"], "und") for tag in ("und-Latn", "und-US", "und_Cyrl", "mul-US")),
        *((tag, ["und", "en", "ru", "th", "x-other"], "und") for tag in ("mis-Thai", "zxx-Latn", "x-ours", "qaa-US")),
        ("no", ["und", "nb"], "nb"),
        ("nn", ["und", "nb"], "und"),
    ],
)
def test_the_row_that_serves_a_tag(tag, rows, expected):
    assert match(tag, rows) == expected


def test_a_tag_that_names_no_language_runs_as_und_and_is_not_unserved():
    model = tiny_llama()
    settings = {"seqlen": 64, "tokens": 128, "group_size": 16, "progress": False}
    profile = la_aciq.calibrate(model, random_texts(("en", "ru", "th")), **settings)
    quantized = quantize_model(model, profile, QuantConfig(group_size=16, clip="static"), progress=False)
    ids = torch.arange(1, 13)[None]

    def logits(tag):
        with torch.no_grad(), la_aciq.language(tag):
            return quantized(ids).logits

    undetermined, english = logits("und"), logits("en")
    assert not torch.equal(undetermined, english)
    for tag in ("und-Latn", "und-US", "und_Cyrl", "mul", "mis-Thai", "zxx-x-code", "i-default"):
        assert torch.equal(logits(tag), undetermined), tag
    assert not quantized.la_aciq.state.unserved
    logits("ko")
    assert dict(quantized.la_aciq.state.unserved) == {"ko": 1}

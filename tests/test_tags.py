"""Language tags, against BCP-47 (RFC 5646) and the IANA registry."""

import pytest

from la_aciq.errors import LaAciqError
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
    ],
)
def test_canonical_form(tag, expected):
    assert canonical(tag) == expected
    assert canonical(canonical(tag)) == expected


@pytest.mark.parametrize("tag", ["", "english", "xx", "e", "en_us_!", "en--US", "sw\n", "../../etc", "a" * 65, "123"])
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
    ],
)
def test_the_row_that_serves_a_tag(tag, rows, expected):
    assert match(tag, rows) == expected

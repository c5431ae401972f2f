"""Detects the language of a text with lingua's models (extra `detect`)."""

import functools
from typing import Any

from ...errors import LaAciqError
from ...tags import UND, canonical


def detect_language(text: str) -> str:
    """Return the language of a text as a canonical BCP-47 tag, `und` where lingua cannot tell.

    Args:
        text: plain text of any length.

    Raises:
        LaAciqError: lingua is not installed.
    """
    language = _detector().detect_language_of(text)
    return UND if language is None else canonical(language.iso_code_639_1.name.lower())


@functools.cache
def _detector() -> Any:
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError as error:
        raise LaAciqError("detecting languages needs lingua-language-detector; install la-aciq[detect]") from error
    return LanguageDetectorBuilder.from_all_languages().build()

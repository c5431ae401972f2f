"""Language tags: BCP-47 in, the entry of a table out.

Matching uses the CLDR distances of `langcodes`: `pt` serves `pt-BR`, `zh` serves `zh-Hans-CN`. The entry `und` (which
is BCP-47's "undetermined", and which every table has) serves a language without a close entry. It also serves every tag
that names no language, whatever its script or region is: `und-Latn` is `und`, and so are `mul-x-mixed`, `mis` and
`zxx`.
"""

from collections.abc import Iterable

import langcodes

from .errors import LaAciqError

UND = "und"
SINK = "sink"  # the entry of a sequence's first token, the attention sink; no language

# Subtags and tags of the registry that stand where a language would and name none: undetermined, several, uncoded,
# not language, and the language that a server uses by default.
_NO_LANGUAGE = frozenset({UND, "mul", "mis", "zxx"})
_DEFAULT_LANGUAGE = "i-default"
# The longest tag that a registry-conforming client sends is far shorter; a longer string is somebody's mistake.
_MAX_LENGTH = 64
# CLDR distance up to which one language's entry serves another. With 25, the default of langcodes, Norwegian would
# serve Danish; 10 keeps to the same language in another region or script.
_MAX_DISTANCE = 10


def canonical(tag: str) -> str:
    """The canonical form of a BCP-47 tag: `pt-br` -> `pt-BR`, `deu` -> `de`, `und-Latn` -> `und`.

    Args:
        tag: in upper or lower case, with hyphens or underscores.

    Returns:
        The canonical tag; `und` when the language subtag is und, mul, mis or zxx, and for i-default.

    Raises:
        LaAciqError: the tag is not well-formed BCP-47, or its language is not registered.
        TypeError: the tag is not a string.
    """
    if not isinstance(tag, str):
        raise TypeError(f"language tag must be a string such as 'sw', got {type(tag).__name__}")
    if not 0 < len(tag) <= _MAX_LENGTH:
        raise LaAciqError(
            f"language tag {tag[:20]!r} has {len(tag)} characters; expected a BCP-47 tag such as 'sw' or 'pt-BR'"
        )
    try:
        known = langcodes.tag_is_valid(tag)
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise LaAciqError(f"language tag {tag!r} is not BCP-47 (a language of the registry, such as 'sw' or 'pt-BR')")
    standard = str(langcodes.standardize_tag(tag))
    no_language = standard.partition("-")[0] in _NO_LANGUAGE or tag.lower().replace("_", "-") == _DEFAULT_LANGUAGE
    return UND if no_language else standard


def match(tag: str, available: Iterable[str]) -> str:
    """The entry that serves a language.

    Args:
        tag: a BCP-47 tag, canonical or not.
        available: the canonical tags of the entries.

    Returns:
        The entry's tag, or `und` when the tag names no language or no entry is close to it.

    Raises:
        LaAciqError: the tag is not BCP-47.
        TypeError: the tag is not a string.
    """
    wanted = canonical(tag)
    languages = [language for language in available if language != UND]
    if wanted in languages:
        return wanted
    if wanted == UND or not languages:
        return UND
    closest, _distance = langcodes.closest_match(wanted, languages, max_distance=_MAX_DISTANCE)
    return str(closest)

"""Language tags: BCP-47 in, the row of a table out.

Matching is `langcodes`' (CLDR distances): `pt-BR` is served by `pt`, `zh-Hans-CN` by `zh`; a language that no row is
close to is served by `und`, BCP-47's "undetermined", the pooled row every table has.
"""

from collections.abc import Iterable

import langcodes

from .errors import LaAciqError

UND = "und"
SINK = "sink"  # the entry of a sequence's first token, the attention sink; no language

# The longest tag that a registry-conforming client sends is far shorter; a longer string is somebody's mistake.
_MAX_LENGTH = 64
# CLDR distance up to which one language is served by another's row (langcodes' own default is 25, which lets Danish
# be served by Norwegian; 10 keeps to the same language in another region or script).
_MAX_DISTANCE = 10


def canonical(tag: str) -> str:
    """The canonical form of a BCP-47 tag: `pt-br` -> `pt-BR`, `deu` -> `de`, `UND` -> `und`.

    Raises `LaAciqError` when the tag is not well-formed BCP-47 or its language is not registered.
    """
    if not isinstance(tag, str):
        raise TypeError(f"language tag must be a string such as 'sw', got {type(tag).__name__}")
    if not 0 < len(tag) <= _MAX_LENGTH:
        raise LaAciqError(
            f"language tag {tag[:20]!r} has {len(tag)} characters; expected a BCP-47 tag such as 'sw' or 'pt-BR'"
        )
    if tag.lower() == UND:
        return UND
    try:
        known = langcodes.tag_is_valid(tag)
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise LaAciqError(f"language tag {tag!r} is not BCP-47 (a language of the registry, such as 'sw' or 'pt-BR')")
    return str(langcodes.standardize_tag(tag))


def match(tag: str, available: Iterable[str]) -> str:
    """The entry of `available` (canonical tags) that serves `tag`, or `und` when none is close.

    Raises `LaAciqError` for a tag that is not BCP-47.
    """
    wanted = canonical(tag)
    languages = [language for language in available if language != UND]
    if wanted in languages:
        return wanted
    if wanted == UND or not languages:
        return UND
    found, _distance = langcodes.closest_match(wanted, languages, max_distance=_MAX_DISTANCE)
    return str(found)

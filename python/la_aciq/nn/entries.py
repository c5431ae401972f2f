"""Which entry of a model's tables serves a language tag, and how often none did."""

import warnings
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from ..errors import LaAciqError
from ..tags import SINK, UND, match
from .request import GENERATING, REQUESTED

# Bounded: the tags are a server's clients'.
_match = lru_cache(maxsize=4096)(match)


class Entries:
    """The entries of a model's tables, by name.

    Attributes:
        names: "und" first, then languages, then the class of tokens "sink", if the tables have it; pooled tables have
            no languages.
        sink: The entry of "sink", or None.
        unserved: By primary language subtag, the rows of batches whose language has no entry where others have one.
    """

    def __init__(self, names: Sequence[str], by_language: bool) -> None:
        if not names or names[0] != UND:
            raise ValueError(f"entries must start with {UND!r}, got {list(names)!r}")
        self.names = tuple(names)
        self.sink = self.names.index(SINK) if SINK in self.names else None
        self.unserved: Counter[str] = Counter()
        self._languages = tuple(name for name in self.names[1:] if name != SINK)
        self._warn = by_language and bool(self._languages)

    def entry(self, tag: str) -> int:
        """The entry that serves a canonical BCP-47 tag, 0 (`und`) when no entry's language is close to it."""
        return self.names.index(_match(tag, self._languages))

    def of_batch(self, batch: int, counted: bool) -> list[int]:
        """The entry of each row of a batch under the language of the request.

        Args:
            batch: The number of rows.
            counted: Whether the rows that no entry serves have been counted for this pass.

        Raises:
            LaAciqError: `languages` has another number of tags than the batch has rows.
        """
        requested = REQUESTED.get()
        if isinstance(requested, tuple):
            # `generate` has compared the tags with the inputs; what is more now are their beams, side by side.
            repeats = batch // len(requested) if GENERATING.get() and requested else 1
            if len(requested) * repeats != batch:
                raise LaAciqError(
                    f"languages() has {len(requested)} tags for a batch of {batch} rows; expected one tag per row"
                )
            tags = [tag for tag in requested for _ in range(repeats)]
            entries = [self.entry(tag) for tag in tags]
            if not counted:
                for tag, entry in zip(tags, entries, strict=True):
                    self._count(tag, entry, 1)
            return entries
        if requested is None:
            if self._warn:
                self._warn = False
                warnings.warn(
                    "a model with statistics per language runs with no language set and uses the pooled ones; set one "
                    "in the thread that calls the model: `with la_aciq.language('sw'):`, or 'und' to pool on purpose",
                    stacklevel=2,
                )
            return [0] * batch
        entry = self.entry(requested)
        if not counted:
            self._count(requested, entry, batch)
        return [entry] * batch

    def _count(self, tag: str, entry: int, rows: int) -> None:
        if entry == 0 and tag != UND and self._languages:
            self.unserved[tag.partition("-")[0]] += rows

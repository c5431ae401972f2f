"""The text that models are evaluated on: windows of token ids by language, and the sizes of their segments.

Models with one tokenizer read the same windows, and a segment is 128 predicted tokens. Models with several tokenizers
read the same stretches of text, each as its own tokens, and a segment is a stretch of bytes: where a token reaches over
the border of two segments, its loss is divided in proportion to its bytes. The first bytes of a stretch are context and
are not counted, because a tokenizer without an id for the beginning leaves its first token unpredicted.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibration import TokenizedText, Window, tokenize
from ..errors import LaAciqError
from .loss import SEGMENT, Float64, segment_starts, segment_sums

CONTEXT = 64  # bytes


@dataclass(frozen=True)
class Reading:
    """A window that one model reads, and the segments that its losses are summed over.

    Attributes:
        window: the token ids.
        bounds: where the segments begin and end, in bytes of the stretch, int64 [segments + 1]; None where a segment is
            `SEGMENT` predicted tokens.
        size: of the stretch in bytes.
    """

    window: Window
    bounds: NDArray[np.int64] | None = None
    size: int = 0

    def key(self, tag: str) -> str:
        """A SHA-256 of everything that the sums depend on beside the model."""
        digest = hashlib.sha256(f"{tag} {SEGMENT} {self.size} ".encode())
        for numbers in (self.window.ids, self.window.byte_counts, self.bounds):
            digest.update(b"-" if numbers is None else np.asarray(numbers, dtype=np.int64).tobytes() + b" ")
        return digest.hexdigest()

    def sums(self, nats: NDArray[np.generic]) -> Float64:
        """Sums over the segments.

        Args:
            nats: of each predicted token, [t - 1].

        Returns:
            float64 [segments].
        """
        if self.bounds is None or self.window.byte_counts is None:
            return segment_sums([nats], [self.window])
        ends = self.size - self.window.byte_counts.sum() + np.cumsum(self.window.byte_counts)
        start = ends[0] - self.window.byte_counts[0]
        # Tokens that add no byte belong to the token before them, and to the next one at the start.
        last = np.append(np.diff(ends) > 0, True) & (ends > start)
        cumulative = np.cumsum(nats, dtype=np.float64)[last]
        return np.diff(np.interp(self.bounds, [start, *ends[last]], [0.0, *cumulative]))


@dataclass(frozen=True)
class HeldOut:
    """What losses are divided by, for each language.

    Attributes:
        sizes: by language, predicted tokens and units (bytes or tokens) of each segment, float64 [segments] each.
        unit: "byte" or "token".
        skipped: by language, the tokens left out at the start of the text.
        seqlen: tokens per window.
        tokens: tokens read per language.
    """

    sizes: dict[str, tuple[Float64, Float64]]
    unit: str
    skipped: dict[str, int]
    seqlen: int
    tokens: int

    def __post_init__(self) -> None:
        for tag, (sizes, _) in self.sizes.items():
            if len(sizes) < 2:
                raise LaAciqError(
                    f"tokens = {self.tokens}: an interval needs at least two segments of up to {SEGMENT} predicted "
                    f"tokens in each language, and the text for {tag!r} has {len(sizes)} in which the tokens add text; "
                    "give more tokens, or a longer seqlen"
                )


@dataclass(frozen=True)
class HeldOutWindows(HeldOut):
    """Windows of token ids, the same for every model. Segments are consecutive predicted tokens of one window."""

    windows: dict[str, list[Window]]

    @classmethod
    def cut(
        cls, tokenized: Mapping[str, TokenizedText], seqlen: int, tokens: int, skip: int | Mapping[str, int]
    ) -> "HeldOutWindows":
        """Cut texts into windows.

        Raises:
            LaAciqError: a text is too short, or has fewer than two segments.
        """
        skipped = {tag: skip if isinstance(skip, int) else int(skip.get(tag, 0)) for tag in tokenized}
        cut = {
            tag: text.windows(tag, tokens=tokens, seqlen=seqlen, skip=skipped[tag]) for tag, text in tokenized.items()
        }
        # A window without a segment predicts nothing: one token, or a few that are all of one character.
        windows = {tag: [window for window in several if len(segment_starts(window))] for tag, several in cut.items()}
        known = all(window.byte_counts is not None for several in windows.values() for window in several)
        sizes = {}
        for tag, several in windows.items():
            predicted = segment_sums([np.ones(len(window.ids) - 1) for window in several], several)
            counts = [window.byte_counts for window in several if window.byte_counts is not None]
            sizes[tag] = predicted, segment_sums(counts, several) if known else predicted
        return cls(sizes, "byte" if known else "token", skipped, seqlen, tokens, windows)

    @property
    def num_windows(self) -> int:
        """The windows of all languages."""
        return sum(map(len, self.windows.values()))

    def readings(self) -> dict[str, list[Reading]]:
        """The windows as every model reads them."""
        return {tag: [Reading(window) for window in windows] for tag, windows in self.windows.items()}


@dataclass(frozen=True)
class Stretch:
    """A stretch of text, and where its segments begin and end in bytes: int64 [segments + 1]."""

    text: str
    bounds: NDArray[np.int64]


@dataclass(frozen=True)
class HeldOutStretches(HeldOut):
    """Stretches of text, which each model reads as tokens of its own. Segments are bytes."""

    stretches: dict[str, list[Stretch]]

    @classmethod
    def cut(
        cls,
        texts: Mapping[str, str],
        tokenized: Mapping[str, TokenizedText],
        seqlen: int,
        tokens: int,
        skip: int | Mapping[str, int],
    ) -> "HeldOutStretches":
        """Cut texts into the stretches of the windows that a tokenizer would make of them.

        Args:
            texts: by canonical tag.
            tokenized: their tokens, with `byte_ends`.
            seqlen: tokens per stretch.
            tokens: tokens per language.
            skip: tokens left out at the start of each text.

        Raises:
            LaAciqError: a text is too short, has fewer than two segments, or its tokenizer does not tell which bytes
                a token has.
        """
        windows = HeldOutWindows.cut(tokenized, seqlen, tokens, skip)
        stretches: dict[str, list[Stretch]] = {}
        sizes: dict[str, tuple[Float64, Float64]] = {}
        for tag, text in tokenized.items():
            if text.byte_ends is None:
                raise LaAciqError("bits per byte need a fast tokenizer, which tells the bytes of each token")
            content = texts[tag].encode()
            ends = np.concatenate([[0], text.byte_ends])
            start = windows.skipped[tag]
            counts: list[NDArray[np.int64]] = []
            stretches[tag] = []
            for window in windows.windows[tag]:
                stop = start + len(window.ids) - (text.bos is not None)
                borders = ends[start : stop + 1] - ends[start]  # of the window's tokens
                segments = borders[SEGMENT:-1:SEGMENT]
                bounds = np.unique([CONTEXT, *segments[segments > CONTEXT], borders[-1]])
                if borders[-1] > CONTEXT:
                    stretches[tag].append(Stretch(content[ends[start] : ends[stop]].decode(), bounds))
                    counts.append(np.histogram(borders[1:] - 1, bounds)[0])  # a token belongs to its last byte
                start = stop
            bytes_ = [np.diff(stretch.bounds) for stretch in stretches[tag]]
            empty = np.zeros(0)
            sizes[tag] = (
                np.concatenate([empty, *counts]).astype(np.float64),
                np.concatenate([empty, *bytes_]).astype(np.float64),
            )
        return cls(sizes, "byte", windows.skipped, seqlen, tokens, stretches)

    def readings(self, tokenizer: Any, name: str) -> dict[str, list[Reading]]:
        """The stretches as a model with this tokenizer reads them.

        Raises:
            LaAciqError: the tokenizer does not tell which bytes a token has, or its first token is longer than the
                context of a stretch.
        """
        return {
            tag: [_reading(stretch, tag, tokenizer, name) for stretch in several]
            for tag, several in self.stretches.items()
        }


def _reading(stretch: Stretch, tag: str, tokenizer: Any, name: str) -> Reading:
    text = tokenize({tag: stretch.text}, tokenizer)[tag]
    window = text.windows(tag, tokens=len(text.ids), seqlen=len(text.ids) + 1)[0]
    if window.byte_counts is None:
        raise LaAciqError(f"{name}: bits per byte need a fast tokenizer, which tells the bytes of each token")
    size = len(stretch.text.encode())
    unpredicted = size - int(window.byte_counts.sum())
    if unpredicted > CONTEXT:
        raise LaAciqError(
            f"{name}: {unpredicted} bytes of a stretch of the text for {tag!r} are not predicted; expected at most the "
            f"{CONTEXT} of its first token"
        )
    return Reading(window, stretch.bounds, size)

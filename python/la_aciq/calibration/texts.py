"""Texts by language: from files to token ids cut into windows.

Calibration reads the start of each text and evaluation what follows, so that no clip is judged on the tokens it was
chosen for.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LaAciqError
from ..tags import UND, canonical

# How texts of one language are put together: as paragraphs.
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Window:
    """A stretch of text that a model reads as one sequence.

    Attributes:
        ids: int64 [t], the token ids that the model reads. It predicts ids[1:].
        byte_counts: int64 [t - 1], the bytes of UTF-8 text that each predicted token adds, or None when the text is
            not known. Several tokens may share one character; its bytes count with the first of these tokens.
    """

    ids: NDArray[np.int64]
    byte_counts: NDArray[np.int64] | None


@dataclass(frozen=True)
class TokenizedText:
    """The token ids of a text.

    Attributes:
        ids: int64 [n].
        byte_ends: int64 [n], bytes of UTF-8 text up to the end of each token, or None when the text is not known.
        bos: the id that every window starts with, for tokenizers that begin a text with such an id, else None.
    """

    ids: NDArray[np.int64]
    byte_ends: NDArray[np.int64] | None = None
    bos: int | None = None

    def windows(self, tag: str, *, tokens: int, seqlen: int, skip: int = 0) -> list[Window]:
        """Cut the text into the windows that a model reads.

        Without a `bos`, the model reads but does not predict the first token of a window. With a `bos`, it reads the
        bos before the window's tokens, and predicts all of them.

        Args:
            tag: the language, for error messages.
            tokens: how many tokens the windows hold together, at least 2.
            seqlen: the most ids in one window, at least 2. The last window may be shorter.
            skip: how many tokens at the start of the text are left out.

        Returns:
            The windows, in the order of the text.

        Raises:
            LaAciqError: the text is too short, or a number is too small.
        """
        if seqlen < 2 or tokens < 2 or skip < 0:
            raise LaAciqError(
                f"seqlen = {seqlen}, tokens = {tokens}, skip = {skip}; expected seqlen and tokens of at least 2"
            )
        if len(self.ids) < skip + tokens:
            after, total = (f" after {skip} for calibration", f", {skip + tokens} in all") if skip else ("", "")
            raise LaAciqError(
                f"the text for {tag!r} is too short: {tokens} tokens{after} are needed{total}, "
                f"and it has {len(self.ids)}"
            )
        step = seqlen if self.bos is None else seqlen - 1
        windows = []
        for start in range(skip, skip + tokens, step):
            stop = min(start + step, skip + tokens)
            ids = self.ids[start:stop]
            byte_counts = None
            if self.byte_ends is not None:
                before = self.byte_ends[start - 1] if start else 0
                byte_counts = np.diff(self.byte_ends[start:stop], prepend=before)
                byte_counts = byte_counts if self.bos is not None else byte_counts[1:]
            if self.bos is not None:
                ids = np.concatenate([[self.bos], ids])
            windows.append(Window(ids, byte_counts))
        return windows


def load_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read texts from a folder of `<tag>.txt` files, or from a JSONL file with "language" and "text".

    Lines of a JSONL file with the same language are put together as paragraphs.

    Args:
        path: the folder or the file; all files are UTF-8, with or without a byte order mark.

    Returns:
        The text of each language, by canonical tag.

    Raises:
        LaAciqError: a file cannot be read, a tag names no language, or a text is empty or no Unicode text. The message
            names the file and the line.
    """
    source = Path(path)
    if source.is_dir():
        files = sorted(source.glob("*.txt"))
        if not files:
            raise LaAciqError(
                f"texts folder {str(source)!r} has no .txt files; expected one <tag>.txt per language, such as sw.txt"
            )
        pieces = [(language_of(file.stem, str(file)), _read_utf8(file), str(file)) for file in files]
        tags = [tag for tag, _, _ in pieces]
        for tag, _, place in pieces:
            if tags.count(tag) > 1:
                raise LaAciqError(f"{place} is one of {tags.count(tag)} files for the language {tag!r}; expected one")
    elif source.is_file():
        pieces = _read_jsonl(source)
    else:
        raise LaAciqError(f"texts {str(source)!r} not found; expected a folder of <tag>.txt files or a .jsonl file")
    texts: dict[str, list[str]] = {}
    for tag, text, place in pieces:
        if not text.strip():
            raise LaAciqError(f"{place}: the text for {tag!r} is empty")
        _check_unicode(tag, text, f"{place}: ")
        texts.setdefault(tag, []).append(text)
    return {tag: _BETWEEN.join(paragraphs) for tag, paragraphs in texts.items()}


def tokenize(texts: Mapping[str, Any], tokenizer: Any = None) -> dict[str, TokenizedText]:
    """Turn texts into token ids.

    Args:
        texts: by BCP-47 tag a str, a list of str (put together as paragraphs), token ids (a one-dimensional integer
            tensor or array; then the tokenizer may be None), or a `TokenizedText`.
        tokenizer: a tokenizer of transformers.

    Returns:
        The token ids of each language, by canonical tag.

    Raises:
        LaAciqError: a text is empty or no Unicode text, or a tag is not BCP-47 or names no language.
        TypeError: a text is something else.
    """
    if not texts:
        raise LaAciqError("texts is empty; expected at least one language")
    bos = None if tokenizer is None else _bos(tokenizer)
    result: dict[str, TokenizedText] = {}
    for key, text in texts.items():
        tag = language_of(key, "texts")
        if tag in result:
            raise LaAciqError(f"texts has the language {tag!r} twice (as {key!r} the second time)")
        result[tag] = _tokenize_one(tag, text, tokenizer, bos)
        if len(result[tag].ids) == 0:
            raise LaAciqError(f"the text for {tag!r} is empty")
    return result


def check_ids(model: Any, texts: Mapping[str, TokenizedText], seqlen: int) -> None:
    """Check that a model can read these texts.

    Args:
        model: a model of transformers; of another one nothing is known, and nothing is checked.
        texts: the token ids by canonical tag.
        seqlen: tokens per window.

    Raises:
        LaAciqError: a window is longer than the model's positions, or a token id is not in its vocabulary.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and 0 < positions < seqlen:  # XLNet has -1 for any number
        raise LaAciqError(f"seqlen = {seqlen} is longer than the {positions} positions of {type(model).__name__}")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embeddings, "num_embeddings", None)
    if vocabulary is None:
        return
    for tag, text in texts.items():
        if text.ids.min() < 0 or text.ids.max() >= vocabulary:
            raise LaAciqError(
                f"texts[{tag!r}] has token ids from {text.ids.min()} to {text.ids.max()}; "
                f"the model knows 0 to {vocabulary - 1}"
            )


def _tokenize_one(tag: str, text: Any, tokenizer: Any, bos: int | None) -> TokenizedText:
    if isinstance(text, TokenizedText):
        return text
    if isinstance(text, Sequence) and not isinstance(text, str) and all(isinstance(item, str) for item in text):
        text = _BETWEEN.join(text)
    if not isinstance(text, str):
        ids = np.asarray(text)
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise TypeError(
                f"texts[{tag!r}]: expected a str, a list of str or one-dimensional token ids, "
                f"got {type(text).__name__} of {ids.dtype} {list(ids.shape)}"
            )
        return TokenizedText(ids.astype(np.int64))
    _check_unicode(tag, text)
    if tokenizer is None:
        raise TypeError(f"texts[{tag!r}] is a string, so a tokenizer is needed; got tokenizer=None")
    if not getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
        return TokenizedText(np.asarray(encoded["input_ids"], dtype=np.int64), None, bos)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # Offsets count characters of the text; the prefix sum turns them into bytes of UTF-8.
    codepoints = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codepoints > 0x7F).astype(np.int64) + (codepoints > 0x7FF) + (codepoints > 0xFFFF)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    ends = np.asarray([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
    return TokenizedText(
        np.asarray(encoded["input_ids"], dtype=np.int64), np.maximum.accumulate(bytes_before[ends]), bos
    )


def _bos(tokenizer: Any) -> int | None:
    """The id the tokenizer begins a text with, if it does so by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def language_of(tag: str, place: str) -> str:
    """The canonical tag of a text's language. Raises `LaAciqError`, naming the place, for a tag of no language."""
    try:
        language = canonical(tag)
    except LaAciqError as error:
        raise LaAciqError(f"{place}: {error}") from error
    if language == UND:
        raise LaAciqError(
            f"{place}: {tag!r} names no language; expected the tag of the language of the text, such as 'sw'"
        )
    return language


def _check_unicode(tag: str, text: str, place: str = "") -> None:
    """Raises `LaAciqError` for a text with a lone surrogate, which no encoding of Unicode can express."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LaAciqError(
            f"{place}the text for {tag!r} has a lone surrogate, U+{ord(text[error.start]):04X}, as character "
            f"{error.start}: half of a character that was cut in two; remove it or write the whole character"
        ) from error


def _read_utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LaAciqError(
            f"{file} is not UTF-8: byte {error.start} cannot be decoded; convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise LaAciqError(f"{file} cannot be read: {error.strerror}") from error


def _read_jsonl(file: Path) -> list[tuple[str, str, str]]:
    pieces = []
    for number, line in enumerate(_read_utf8(file).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file} line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LaAciqError(f'{place} is not JSON; expected {{"language": "sw", "text": "..."}}') from error
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("language", "text")):
            raise LaAciqError(f'{place}: expected an object with the strings "language" and "text"')
        pieces.append((language_of(entry["language"], place), entry["text"], place))
    if not pieces:
        raise LaAciqError(f"{file} is empty; expected one JSON object per line with the language and the text")
    return pieces

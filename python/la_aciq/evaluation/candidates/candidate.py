"""What `compare` asks of a candidate."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...calibration import Window
from ...errors import LaAciqError
from ..from_losses import Description

OTHER_VOCABULARY = (
    "it has another vocabulary than the tokenizer of the comparison; compare bits per byte alone (--bits_per_byte)"
)


@dataclass(frozen=True)
class TextsToRead:
    """What a candidate is going to read.

    Attributes:
        windows: by language, the windows of token ids.
        tokenizer: the tokenizer that cut them.
    """

    windows: Mapping[str, Sequence[Window]]
    tokenizer: Any

    def check_limits(self, name: str, positions: int | None, vocabulary: int | None) -> None:
        """Raises `LaAciqError` where a window is too long for a model, or has an id that the model does not know."""
        everything = [window.ids for windows in self.windows.values() for window in windows]
        longest, largest = max(map(len, everything)), max(int(ids.max()) for ids in everything)
        if positions is not None and 0 < positions < longest:
            raise LaAciqError(f"{name} reads at most {positions} tokens, and a window has {longest}")
        if vocabulary is not None and largest >= vocabulary:
            raise LaAciqError(
                f"{name} knows the token ids 0 to {vocabulary - 1}, and the texts have {largest}: {OTHER_VOCABULARY}"
            )

    def check_vocabulary(self, name: str, decode: Callable[[list[int]], str]) -> None:
        """Raises `LaAciqError` where the ids of a window are another text for a model.

        Args:
            name: of the model.
            decode: the model's text of ids.
        """
        for windows in self.windows.values():
            for window in windows:
                ids = self.text_ids(window)
                if comparable(decode(ids)) != comparable(self.tokenizer.decode(ids)):
                    raise LaAciqError(f"{name}: {OTHER_VOCABULARY}")

    def text_ids(self, window: Window) -> list[int]:
        """The ids of a window without the id that begins every text."""
        ids: list[int] = window.ids.tolist()
        return ids[1:] if ids[0] == getattr(self.tokenizer, "bos_token_id", None) else ids


def comparable(text: str) -> str:
    """A text without what decoders differ in: spaces at its ends, and characters that a window cuts in two."""
    return text.replace("\N{REPLACEMENT CHARACTER}", "").strip()


class OpenedModel(Protocol):
    """A candidate that is ready to read."""

    @property
    def description(self) -> Description:
        """What the report says of it."""

    def nats(self, window: Window, tag: str) -> NDArray[np.float32]:
        """Negative log-likelihood of each predicted token of a window in the language `tag`: float32 [t - 1].

        Raises:
            LaAciqError: a loss is not finite.
        """


class UnreachableError(LaAciqError):
    """A server does not answer."""


class Candidate(ABC):
    """A model whose losses can be measured.

    Attributes:
        name: in the report.
    """

    name: str
    # Whether `identity` tells the model from every other one.
    certain = True

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What its losses depend on beside the text, as JSON: they are kept under it."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """Its own tokenizer. Raises `LaAciqError` where there is none."""

    @abstractmethod
    def check(self, texts: TextsToRead) -> None:
        """Check, before hours of work, that the model can read these texts.

        Raises:
            UnreachableError: it is on another machine, which does not answer.
            LaAciqError: it cannot.
        """

    @abstractmethod
    def opened(self) -> AbstractContextManager[OpenedModel]:
        """The model in memory, as long as the block lasts."""

    @property
    def calibration_tokens(self) -> dict[str, int]:
        """By language, the tokens of its text that its clips were chosen on."""
        return {}


def sha256_of_files(files: Sequence[Path]) -> str:
    """A SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()} ".encode())
    return digest.hexdigest()

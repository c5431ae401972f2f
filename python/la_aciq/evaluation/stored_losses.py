"""Losses on disk, in the folder of a comparison, so that a run can go on where another one ended.

`losses/<sha256 of the model's identity>.jsonl` has a line for the identity, then, as they are measured, one for the
model's description and one for each window: `{"window": key, "language": tag, "nats": [one number per segment]}`. A key
is a SHA-256 of the window and of how its losses are summed, so that no other text or setting finds these losses. Lines
are only added. A line that an interrupted run did not finish is dropped.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LaAciqError
from .from_losses import Description
from .loss import Float64

SCHEMA = 1
FOLDER = "losses"
_LOCK = ".lock"
_AGAIN = "delete the file, and its losses are measured again"


@contextmanager
def locked_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder for losses in the output folder of a comparison, for this process alone.

    Both are made where they do not exist. The operating system frees the lock when the process ends, however it ends.

    Raises:
        LaAciqError: the output folder holds something else, another comparison is writing into it, or it cannot be
            made.
    """
    output = Path(path)
    folder = output / FOLDER
    if output.exists() and not output.is_dir():
        raise LaAciqError(f"output folder {str(path)!r} is not a folder; choose another path")
    if output.exists() and not folder.is_dir() and next(output.iterdir(), None) is not None:
        raise LaAciqError(
            f"output folder {str(path)!r} exists and holds no losses of a comparison; choose another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LaAciqError(
                    f"another comparison is writing into {str(path)!r}; wait for it, or choose another folder"
                ) from error
            yield folder
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(output):
            raise
        raise LaAciqError(f"output folder {str(path)!r} cannot be written: {error.strerror}") from error


class StoredLosses:
    """The losses of one model.

    Attributes:
        file: where they are kept.
        sums: by the key of a window, nats of its segments, float64 [segments].
        description: of the model, once it was in memory.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Read the file where there is one.

        Args:
            folder: of `locked_folder`.
            identity: of the model.

        Raises:
            LaAciqError: the file cannot be read, is damaged, or is another model's.
        """
        text = json.dumps(identity, sort_keys=True)
        self.file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"
        self._header = {"schema": SCHEMA, "identity": identity}
        self._length = 0
        self.sums: dict[str, Float64] = {}
        self.description: Description | None = None
        try:
            content = self.file.read_bytes() if self.file.exists() else b""
        except OSError as error:
            raise LaAciqError(f"{str(self.file)!r} cannot be read: {error.strerror}") from error
        whole, newline, _ = content.rpartition(b"\n")
        self._length = len(whole) + len(newline)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check_header(entry)
                elif "window" in entry:
                    self.sums[entry["window"]] = _numbers(entry["nats"])
                else:
                    self.description = Description(**entry["description"])
            except LaAciqError:
                raise
            except (ValueError, KeyError, TypeError) as error:
                raise LaAciqError(f"{str(self.file)!r} is damaged in line {number}: {_AGAIN}") from error

    def add(self, key: str, tag: str, sums: Float64) -> None:
        """Keep the losses of a window."""
        self.sums[key] = sums
        self._write({"window": key, "language": tag, "nats": [float(value) for value in sums]})

    def describe(self, description: Description) -> None:
        """Keep the description of the model, unless it is there."""
        if self.description != description:
            self.description = description
            self._write({"description": dataclasses.asdict(description)})

    def _check_header(self, header: Any) -> None:
        if header != self._header:
            raise LaAciqError(f"{str(self.file)!r} holds the losses of another model or another format: {_AGAIN}")

    def _write(self, entry: dict[str, Any]) -> None:
        entries = [entry] if self._length else [self._header, entry]
        lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in entries).encode()
        with self.file.open("r+b" if self.file.exists() else "xb") as opened:
            opened.truncate(self._length)
            opened.seek(self._length)
            opened.write(lines)
        self._length += len(lines)


def _numbers(values: Any) -> Float64:
    if not isinstance(values, list) or not all(isinstance(v, float) and math.isfinite(v) for v in values):
        raise ValueError("expected finite numbers")
    return np.array(values, dtype=np.float64)

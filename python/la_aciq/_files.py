"""Folders and files that are either complete or not there at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import LaAciqError


def check_output(path: str | os.PathLike[str], main_file: str, force: bool = False) -> None:
    """Raises `LaAciqError` when `new_folder` would refuse this path: to be called before hours of work, not after."""
    folder = Path(path)
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise LaAciqError(f"output folder {str(folder)!r} is not a folder; choose another path")
    empty = next(folder.iterdir(), None) is None
    if not force and not empty:
        raise LaAciqError(
            f"output folder {str(folder)!r} exists; choose another or pass --force (force=True) to replace it"
        )
    if not empty and not (folder / main_file).exists():
        raise LaAciqError(
            f"output folder {str(folder)!r} holds no {main_file}: la-aciq did not write it and will not replace it"
        )


@contextmanager
def new_folder(path: str | os.PathLike[str], main_file: str, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends, and is removed when the block fails.

    An existing folder is refused unless it is empty, or `force` is set and it holds `main_file`, the file by which
    LA-ACIQ knows a folder of this kind as its own. It stays as it was until the new one is complete.
    """
    check_output(path, main_file, force)
    folder = Path(path).absolute()
    temporary = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise LaAciqError(f"output folder {str(path)!r} cannot be made: {error.strerror}") from error
    try:
        yield temporary
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)

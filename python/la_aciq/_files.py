"""Folders and files that are either complete or not there at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from .errors import LaAciqError


class _Kind(NamedTuple):
    """What tells a folder of ours: what its main file must hold, and the only names (as patterns) there are in it."""

    ours: Callable[[dict[str, Any]], bool]
    names: tuple[str, ...]


def _has(*fields: str) -> Callable[[dict[str, Any]], bool]:
    return lambda content: content.keys() >= set(fields)


def _is_quantized(content: dict[str, Any]) -> bool:
    """Whether a config.json is that of a model quantized, or exported, by LA-ACIQ."""
    description = content.get("quantization_config")
    quantized = isinstance(description, dict) and description.get("quant_method") == "la_aciq"
    return quantized or isinstance(content.get("la_aciq"), dict)


_PROFILE = ("profile.json", "profile.safetensors", "second_moments.safetensors")
_KINDS = {
    "profile.json": _Kind(_has("format", "schema", "checksum"), _PROFILE),
    "report.json": _Kind(
        _has("schema", "settings", "texts", "configurations"),
        (
            *("report.json", "report.md", "changes.png", "clips.png", "layers.png"),
            *("profile", *(f"profile/{name}" for name in _PROFILE)),
        ),
    ),
    "config.json": _Kind(
        _is_quantized,
        (
            *("config.json", "generation_config.json", "README.md", "la_aciq", "la_aciq/clip_table.safetensors"),
            *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
            # What tokenizers and processors save.
            *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
            *("preprocessor_config.json", "processor_config.json"),
            *("vocab.json", "vocab.txt", "merges.txt", "*.model"),
        ),
    ),
}


def check_output(path: str | os.PathLike[str], main_file: str, force: bool = False) -> None:
    """Raises `LaAciqError` when `new_folder` would refuse this path: to be called before hours of work, not after."""
    folder = Path(path)
    try:
        _check_place(folder, main_file, force)
        _check_writable(folder.resolve())
    except OSError as error:
        raise LaAciqError(f"output folder {str(path)!r} cannot be made: {error.strerror}") from error


def _check_writable(folder: Path) -> None:
    """Raises OSError when no folder can be made where `new_folder` makes its temporary one."""
    parent = next(parent for parent in folder.parents if parent.exists())
    trial = parent / _temporary(folder).name
    trial.mkdir()
    trial.rmdir()


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new-{os.getpid()}")


def _check_place(folder: Path, main_file: str, force: bool) -> None:
    if Path.cwd().is_relative_to(folder.resolve()):
        raise LaAciqError(f"output folder {str(folder)!r} is or holds the working directory; choose a new folder")
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise LaAciqError(f"output folder {str(folder)!r} is not a folder; choose another path")
    if os.path.ismount(folder):
        raise LaAciqError(f"output folder {str(folder)!r} is a mount point; choose a new folder inside it")
    empty = next(folder.iterdir(), None) is None
    if not force and not empty:
        raise LaAciqError(
            f"output folder {str(folder)!r} exists; choose another or pass --force (force=True) to replace it"
        )
    if not empty:
        _check_ours(folder, main_file)


def _check_ours(folder: Path, main_file: str) -> None:
    """Raises `LaAciqError` unless the folder is one LA-ACIQ wrote, with nothing of anybody else's in it."""
    kind = _KINDS[main_file]
    try:
        content = json.loads((folder / main_file).read_bytes())
    except FileNotFoundError as error:
        raise LaAciqError(
            f"output folder {str(folder)!r} holds no {main_file}: la-aciq did not write it and will not replace it"
        ) from error
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not kind.ours(content):
        raise LaAciqError(
            f"output folder {str(folder)!r} has a {main_file} that la-aciq did not write, and will not be replaced"
        )
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    others = sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in kind.names))
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise LaAciqError(
            f"output folder {str(folder)!r} will not be replaced: it holds what la-aciq did not write ({shown})"
        )


@contextmanager
def new_folder(path: str | os.PathLike[str], main_file: str, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends, and is removed when the block fails.

    An existing folder is refused unless it is empty, or `force` is set and it is one LA-ACIQ wrote: `main_file` says
    which kind. It stays as it was until the new one is complete. A complete one that cannot take its place is kept.
    """
    check_output(path, main_file, force)
    folder = Path(path).resolve()
    temporary = _temporary(folder)
    replaced = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise LaAciqError(f"output folder {str(path)!r} cannot be made: {error.strerror}") from error
    try:
        yield temporary
        # safetensors makes files that their owner alone can read; a server often runs as another user.
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
    except OSError as error:
        raise LaAciqError(
            f"output folder {str(path)!r} cannot be put in place ({error.strerror}); "
            f"the complete result is kept in {str(temporary)!r}"
        ) from error
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def kept_when_interrupted(path: str | os.PathLike[str], *endings: str) -> Iterator[list[Path]]:
    """Folders beside `path`, one for each ending, where calibrations of the block keep their finished languages.

    The folders stay when the block fails, and are removed when it ends. The message of a KeyboardInterrupt says where
    they are.
    """
    folder = Path(path).resolve()
    partial_folders = [folder.with_name(folder.name + ending) for ending in endings]
    for partial in partial_folders:
        check_output(partial, "profile.json", force=True)
    try:
        yield partial_folders
    except KeyboardInterrupt as interrupt:
        existing = " and ".join(str(partial) for partial in partial_folders if partial.exists())
        if not existing:
            raise KeyboardInterrupt("no language was finished, nothing is kept") from interrupt
        raise KeyboardInterrupt(
            f"finished languages are kept in {existing}, and the same command goes on from there"
        ) from interrupt
    for partial in partial_folders:
        shutil.rmtree(partial, ignore_errors=True)

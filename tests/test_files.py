"""Output folders are complete or not there."""

import json
import os
from pathlib import Path

import pytest

from la_aciq._files import check_output, kept_when_interrupted, new_folder
from la_aciq.errors import LaAciqError

# Files by which la-aciq knows its folders, and what each needs to say.
MAIN_FILES = {
    "profile.json": {"format": "la-aciq profile", "schema": 1, "checksum": ""},
    "report.json": {"schema": 1, "settings": {}, "texts": {}, "configurations": []},
    "config.json": {"quantization_config": {"quant_method": "la_aciq"}},
}
PROFILE = "profile.json"
OURS = json.dumps(MAIN_FILES[PROFILE])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path):
    """A folder la-aciq wrote earlier."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / PROFILE).write_text(OURS)
    return folder


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "a" / "out", PROFILE) as temporary:
        (temporary / PROFILE).write_text("new")
        assert not (tmp_path / "a" / "out").exists()
    assert names(tmp_path / "a") == ["out"]
    assert names(tmp_path / "a" / "out") == [PROFILE]


def test_files_can_be_read_by_whoever_can_read_the_folder(tmp_path):
    with new_folder(tmp_path / "out", PROFILE) as temporary:
        (temporary / PROFILE).write_text(OURS)
        (temporary / PROFILE).chmod(0o600)  # as safetensors leaves its files
    folder = tmp_path / "out"
    assert (folder / PROFILE).stat().st_mode & 0o777 == folder.stat().st_mode & 0o666


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_new_and_everything_old(tmp_path, out, failure):
    def replace_and_fail():
        with new_folder(out, PROFILE, force=True) as temporary:
            (temporary / PROFILE).write_text("half")
            raise failure

    with pytest.raises(failure):
        replace_and_fail()
    assert names(tmp_path) == ["out"]
    assert (out / PROFILE).read_text() == OURS


def test_force_replaces_a_folder_of_the_same_kind(tmp_path, out):
    (out / "profile.safetensors").write_text("old")
    with new_folder(out, PROFILE, force=True) as temporary:
        (temporary / PROFILE).write_text("new")
    assert names(tmp_path) == ["out"]
    assert names(out) == [PROFILE]
    assert (out / PROFILE).read_text() == "new"


def test_an_existing_folder_is_refused_and_kept(out):
    with pytest.raises(LaAciqError, match="exists; choose another or pass --force"), new_folder(out, PROFILE):
        pass
    assert (out / PROFILE).read_text() == OURS


class TestForce:
    def test_a_folder_without_the_main_file(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(LaAciqError, match="did not write it"):
            check_output(tmp_path, PROFILE, force=True)

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema": 1, "tests": 12}', "\xff"])
    @pytest.mark.parametrize("main_file", MAIN_FILES)
    def test_a_file_of_the_main_files_name_from_somebody_else(self, tmp_path, main_file, content):
        (tmp_path / main_file).write_text(content, "latin-1")
        with pytest.raises(LaAciqError, match=f"has a {main_file} that la-aciq did not write"):
            check_output(tmp_path, main_file, force=True)

    @pytest.mark.parametrize("other", ["notes.txt", "profile/notes.txt", "plots/changes.png", ".git/config"])
    @pytest.mark.parametrize("main_file", MAIN_FILES)
    def test_something_else_in_the_folder(self, tmp_path, main_file, other):
        (tmp_path / main_file).write_text(json.dumps(MAIN_FILES[main_file]))
        check_output(tmp_path, main_file, force=True)
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("mine")
        with pytest.raises(LaAciqError, match=f"what la-aciq did not write .*{other}"):
            check_output(tmp_path, main_file, force=True)


def test_an_empty_folder_is_taken(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out, PROFILE) as temporary:
        (temporary / PROFILE).write_text("new")
    assert names(out) == [PROFILE]


def test_a_file_or_a_link_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(LaAciqError, match="is not a folder"):
            check_output(tmp_path / name, PROFILE, force=True)


def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LaAciqError, match="cannot be made: Not a directory"):
        check_output(tmp_path / "file" / "out", PROFILE)
    with pytest.raises(LaAciqError, match="cannot be made: File name too long"):  # the temporary folder's is longer
        check_output(tmp_path / ("a" * 250), PROFILE)

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(LaAciqError, match="cannot be made: Permission denied"):
        check_output(tmp_path / "a" / "b", PROFILE)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("path", [".", "..", "../here", "sub/..", "/"])
def test_the_working_directory_and_what_it_is_in_are_refused(tmp_path, monkeypatch, path):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(LaAciqError, match="is or holds the working directory"):
        check_output(path, PROFILE, force=True)
    check_output("sub", PROFILE)
    check_output("../there", PROFILE)


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(LaAciqError, match="is a mount point"):
        check_output(tmp_path, PROFILE)


@pytest.mark.parametrize("failing", ["the old folder away", "the new folder in"])
def test_a_complete_result_survives_a_rename_that_fails(tmp_path, out, monkeypatch, failing):
    rename = Path.rename

    def busy(self, target):
        moved = {f".out.old-{os.getpid()}": "the old folder away"}.get(target.name, "the new folder in")
        if moved == failing and self.name != f".out.old-{os.getpid()}":
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)

    def replace():
        with new_folder(out, PROFILE, force=True) as temporary:
            (temporary / PROFILE).write_text("hours of work")

    with pytest.raises(LaAciqError, match=r"cannot be put in place \(Device or resource busy\)") as error:
        replace()
    kept = tmp_path / f".out.new-{os.getpid()}"
    assert f"the complete result is kept in {str(kept)!r}" in str(error.value)
    assert (kept / PROFILE).read_text() == "hours of work"
    assert (out / PROFILE).read_text() == OURS
    assert names(tmp_path) == sorted([kept.name, "out"])


class TestKeptWhenInterrupted:
    @staticmethod
    def keep(tmp_path, failure=None, finished=(".partial",)):
        with kept_when_interrupted(tmp_path / "out", ".partial", ".more.partial") as parts:
            assert parts == [tmp_path / "out.partial", tmp_path / "out.more.partial"]
            for ending in finished:
                folder = tmp_path / f"out{ending}"
                folder.mkdir()
                (folder / PROFILE).write_text(OURS)
            if failure is not None:
                raise failure

    def test_success_leaves_nothing(self, tmp_path):
        self.keep(tmp_path)
        assert names(tmp_path) == []

    def test_an_interruption_says_what_it_leaves(self, tmp_path):
        with pytest.raises(KeyboardInterrupt, match=r"kept in \S*/out\.partial, and the same command goes on"):
            self.keep(tmp_path, KeyboardInterrupt)
        assert names(tmp_path) == ["out.partial"]

    def test_an_interruption_that_leaves_nothing_says_so(self, tmp_path):
        with pytest.raises(KeyboardInterrupt, match="nothing is kept"):
            self.keep(tmp_path, KeyboardInterrupt, finished=())

    def test_a_failure_leaves_what_is_finished(self, tmp_path):
        with pytest.raises(RuntimeError):
            self.keep(tmp_path, RuntimeError)
        assert names(tmp_path) == ["out.partial"]

    def test_somebody_elses_folder_of_that_name_is_refused_and_kept(self, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "notes.txt").write_text("mine")
        with pytest.raises(LaAciqError, match="did not write it"):
            self.keep(tmp_path, finished=())
        assert names(tmp_path / "out.partial") == ["notes.txt"]

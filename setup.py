"""Builds the C++ core `la_aciq._C`; everything else about the package is in pyproject.toml.

    LA_ACIQ_BUILD   unset: compile where PyTorch and a C++ compiler are found, else install as pure Python and say why
                    1: compile, anything missing is an error        0: pure Python
    LA_ACIQ_CUDA    unset: CUDA kernels too where PyTorch was built for CUDA and a fitting nvcc is found
                    1: with CUDA, anything missing is an error      0: without
    MAX_JOBS        compiler processes at a time (default: one per CPU)

PyTorch is imported from the environment the package will run in, so compile with `pip install --no-build-isolation`.
Under build isolation PyTorch is not importable and the result is a pure-Python package.

The kernels in csrc/cpu/kernels do not use PyTorch. csrc/cpu/kernels/isa has a file per instruction set, which is
compiled with the flags of that set; one set is chosen when the program runs, so the binary works on every x86-64 CPU.
The kernels in csrc/cuda do not use PyTorch either: nvcc compiles them for each architecture, with PTX of the newest for
later ones.
"""

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# -ffp-contract=off: a fused multiply-add where another CPU has none would give other codes for the same input.
COMMON_FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
# at::parallel_for is compiled into its caller, and runs on one thread where the caller is compiled without OpenMP.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []
WARNING_FLAGS = ["-Wall", "-Wextra"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "-mprefer-vector-width=512",
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns of its own intrinsics
]
# By the file of csrc/cpu/kernels/isa; baseline.cpp has none.
ISA_FLAGS = {
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx2vnni": [*AVX2_FLAGS, "-mavxvnni"],
    "avx512vnni": [*AVX512_FLAGS, "-mavx512vnni"],
    "avx512bf16": [*AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16"],
}

CUDA_ARCHITECTURES = ("80", "90", "100")
OLDEST_NVCC = (12, 8)  # the first that knows sm_100
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-lineinfo"),
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES),
    f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "--threads=4",  # the targets of a file side by side
]


class CoreNotBuilt(Exception):
    """Why the package is installed without its compiled core."""


# What a compiler needs beside itself, by what it cannot find, and where it comes from.
PROBE = """
#include <Python.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <concepts>
template <std::integral T> T same(T x) { return x; }
int probe() { return same(0); }
"""
MISSING_HEADERS = {
    "Python.h": "Python's headers are not installed (install python3-dev)",
    "omp.h": "OpenMP's header is not installed (install libgomp with GCC, libomp-dev with Clang)",
}


def find_compiler() -> str:
    """The C++ compiler setuptools will run, as a command line; it must make an object file, not merely exist."""
    compiler = os.environ.get("CXX", "c++" if shutil.which("c++") else "g++")
    words = shlex.split(compiler)
    if not words or shutil.which(words[0]) is None:
        raise CoreNotBuilt(f"no C++ compiler was found ({compiler})")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        includes = {f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")}
        result = subprocess.run(
            [*words, "-std=c++20", *OPENMP_FLAGS, *includes, "-c", str(source), "-o", f"{source}.o"],
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode != 0:
        said = [line for line in result.stderr.splitlines() if "error" in line] or ["it gave no reason"]
        for header, reason in MISSING_HEADERS.items():
            if header in said[0]:
                raise CoreNotBuilt(reason)
        raise CoreNotBuilt(f"{compiler} does not compile C++20 with {' '.join(OPENMP_FLAGS)}: {said[0]}")
    return compiler


def host_compiler() -> str:
    """The compiler itself in CXX, for nvcc: a launcher such as ccache comes before it, its flags after it."""
    return [path for word in shlex.split(os.environ["CXX"]) if (path := shutil.which(word))][-1]


@functools.cache
def find_cuda() -> Path | None:
    """The CUDA toolkit to build with, or None; the program stops where LA_ACIQ_CUDA=1 and something is missing."""
    wanted = os.environ.get("LA_ACIQ_CUDA")
    if wanted == "0":
        return None
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    # CUDA_HOME is where nvcc was found, which may be no more than a link to the toolkit.
    homes = [Path(home) for home in (CUDA_HOME, "/usr/local/cuda") if home]
    home = next((home for home in homes if (home / "include" / "cuda_runtime_api.h").exists()), None)
    if torch.version.cuda is None:
        missing = f"PyTorch {torch.__version__} was built without CUDA"
    elif home is None or not (home / "bin" / "nvcc").exists():
        missing = "nvcc and its headers were not found (set CUDA_HOME)"
    else:
        missing = why_nvcc_does_not_fit(home / "bin" / "nvcc", torch.version.cuda)
    if missing is None and home is not None:
        targets = ", ".join(f"sm_{arch}" for arch in CUDA_ARCHITECTURES)
        print(
            f"la-aciq: building with CUDA kernels for {targets}, which {home / 'bin' / 'nvcc'} compiles in minutes; "
            "LA_ACIQ_CUDA=0 leaves them out",
            file=sys.stderr,
        )
        return home
    if wanted == "1":
        sys.exit(f"LA_ACIQ_CUDA=1, but the CUDA kernels cannot be built: {missing}")
    print(f"la-aciq: building without the CUDA kernels: {missing}", file=sys.stderr)
    return None


def why_nvcc_does_not_fit(nvcc: Path, torch_cuda: str) -> str | None:
    """None where this nvcc can build for a PyTorch with CUDA `torch_cuda`, such as "12.8"."""
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return f"{nvcc} --version names no release"
    version = (int(release[1]), int(release[2]))
    if version >= OLDEST_NVCC and version[0] == int(torch_cuda.partition(".")[0]):
        return None
    oldest = ".".join(map(str, OLDEST_NVCC))
    return (
        f"{nvcc} is of CUDA {release[1]}.{release[2]}; "
        f"expected {oldest} or newer, of the same major version as PyTorch's CUDA {torch_cuda}"
    )


def core_extension() -> Extension:
    """The extension, or CoreNotBuilt with the reason there can be none."""
    if os.environ.get("LA_ACIQ_BUILD") == "0":
        raise CoreNotBuilt("LA_ACIQ_BUILD=0")
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise CoreNotBuilt(
            f"{error.name} cannot be imported here ({error}); "
            "install torch and pybind11, then use pip install --no-build-isolation"
        ) from error
    if sys.platform == "win32":
        raise CoreNotBuilt("the core has no Windows build")
    os.environ.setdefault("CXX", find_compiler())

    cuda = find_cuda()
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in suffixes)
    if not cuda:
        sources = [source for source in sources if "cuda" not in Path(source).parts]
    if not IS_X86:
        sources = [source for source in sources if isa_of(source) is None]
    headers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cuh"))
    return Extension(
        "la_aciq._C",
        sources=sources,
        depends=headers,
        include_dirs=[
            *(str(ROOT / "csrc"), pybind11.get_include()),  # before PyTorch's, which have a pybind11 of their own
            *cpp_extension.include_paths(),
            *([str(cuda / "include")] if cuda else []),
        ],
        library_dirs=[*cpp_extension.library_paths(), *([str(cuda / "lib64")] if cuda else [])],
        libraries=[
            *("c10", "torch", "torch_cpu", "torch_python"),
            *(("c10_cuda", "torch_cuda", "cudart") if cuda else ()),
        ],
        define_macros=[
            ("TORCH_EXTENSION_NAME", "_C"),
            ("_GLIBCXX_USE_CXX11_ABI", str(int(torch.compiled_with_cxx11_abi()))),
            *([("LA_ACIQ_CUDA", "1")] if cuda else []),
        ],
        language="c++",
    )


def isa_of(source: str) -> str | None:
    """The instruction set that a source is compiled for, None for that of every CPU."""
    path = Path(source)
    return path.stem if path.parent.name == "isa" and path.stem in ISA_FLAGS else None


def compile_cuda(source: str, cuda: Path, folder: Path) -> str:
    """The object file nvcc makes of a CUDA source."""
    target = folder / f"{source}.o"
    target.parent.mkdir(parents=True, exist_ok=True)
    host = ["-ccbin", host_compiler()]
    command = [str(cuda / "bin" / "nvcc"), *NVCC_FLAGS, *host, f"-I{ROOT / 'csrc'}", "-c", source, "-o", str(target)]
    print(" ".join(command))
    subprocess.run(command, check=True)
    return str(target)


class BuildCore(build_ext):
    """Compiles each source with the flags of its instruction set, several at a time."""

    def build_extension(self, ext: Extension) -> None:
        cuda = find_cuda()

        def compile_one(source: str) -> str:
            if cuda and source.endswith(".cu"):
                return compile_cuda(source, cuda, Path(self.build_temp))
            torch_free = "kernels" in Path(source).parts
            flags = COMMON_FLAGS + (WARNING_FLAGS if torch_free else OPENMP_FLAGS)
            isa = isa_of(source)
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=flags + (ISA_FLAGS[isa] if isa else []),
                depends=ext.depends,
            )[0]

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        # Linking over a library that a running process has mapped would change the code under it.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=ext.libraries,
            library_dirs=ext.library_dirs,
            extra_postargs=OPENMP_FLAGS,
            target_lang="c++",
        )

    def copy_extensions_to_source(self) -> None:
        """Editable installs: replace the library in the source tree, never overwrite it in place."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            in_tree, _ = self._get_inplace_equivalent(build_py, ext)
            Path(in_tree).unlink(missing_ok=True)
        super().copy_extensions_to_source()


try:
    extensions = [core_extension()]
except CoreNotBuilt as reason:
    if os.environ.get("LA_ACIQ_BUILD") == "1":
        sys.exit(f"LA_ACIQ_BUILD=1, but the C++ core cannot be built: {reason}")
    print(
        f"la-aciq: installing without the C++ core, {reason}. The reference in PyTorch runs instead.", file=sys.stderr
    )
    extensions = []

packages = [
    str(path.parent.relative_to(ROOT / "python")).replace("/", ".") for path in ROOT.glob("python/**/__init__.py")
]
setup(
    packages=[*sorted(packages), "la_aciq.kernels"],
    package_dir={"": "python", "la_aciq.kernels": "kernels"},
    package_data={
        "la_aciq": ["py.typed", "*.pyi", "ops/cuda_backends.json", "integrations/vllm/grafana.json"],
        "la_aciq.kernels": ["tuned.json"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": BuildCore},
)

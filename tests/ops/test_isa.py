"""The table of instruction sets in docs/kernels.md is what the core has, and what this CPU can run of it."""

import re
from pathlib import Path

import pytest
import torch
from op_helpers import _C

import la_aciq
from la_aciq.ops import reference

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "kernels.md").read_text("utf-8").partition("### Instruction sets\n")[2].partition("\n#")[0]
DOCUMENTED = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", SECTION, re.MULTILINE))
# The names the documentation uses, as the kernel of Linux has them.
FLAGS = {
    "AVX2": {"avx2"},
    "FMA": {"fma"},
    "F16C": {"f16c"},
    "AVX-VNNI": {"avx_vnni"},
    "AVX-512 F, BW, VL, DQ": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "AVX-512 VNNI": {"avx512_vnni"},
    "AVX-512 BF16": {"avx512_bf16"},
}


def needed(isa: str) -> set[str]:
    """The CPU flags of a documented set, with those of the set it stands on."""
    flags: set[str] = set()
    text = DOCUMENTED[isa]
    for base in re.findall(r"`(\w+)`", text):
        flags |= needed(base)
    for name, own in sorted(FLAGS.items(), key=lambda item: -len(item[0])):
        if name in text:
            flags |= own
            text = text.replace(name, "")
    assert re.fullmatch(r"(`\w+`|, |any CPU)*", text), f"{isa}: the test does not know {text!r}"
    return flags


def test_the_table_names_every_instruction_set():
    sources = "".join(path.read_text("utf-8") for path in sorted((ROOT / "csrc" / "cpu" / "kernels").rglob("*.cpp")))
    named = set(re.findall(r'#define LA_ACIQ_ISA "(\w+)"', sources))
    named |= set(re.findall(r'=\s+with\(\w+, "(\w+)"', sources))
    assert named == set(DOCUMENTED)


@pytest.mark.skipif(_C is None, reason="needs the compiled core")
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads the CPU's flags from /proc/cpuinfo")
def test_what_this_cpu_has_is_available():
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    assert _C.cpu_info()["available"] == [isa for isa in DOCUMENTED if needed(isa) <= has]


@pytest.mark.skipif(_C is None, reason="needs the compiled core")
def test_the_best_one_runs_unless_another_is_forced(generator):
    available = _C.cpu_info()["available"]
    assert _C.cpu_info()["isa"] == available[-1]
    x, signs = torch.randn(3, 48, generator=generator), torch.ones(48)
    expected = reference.rotate(x, signs, 16)
    try:
        for isa in DOCUMENTED:
            if isa in available:
                _C.force_isa(isa)
                assert _C.cpu_info()["isa"] == isa
                torch.testing.assert_close(la_aciq.rotate(x, signs, block_size=16), expected)
            else:
                with pytest.raises(ValueError, match="isa: expected one of"):
                    _C.force_isa(isa)
    finally:
        _C.force_isa(available[-1])

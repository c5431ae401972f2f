"""Inputs for the Triton kernels, drawn by hypothesis or named, and comparison of codes with the oracle."""

import importlib
import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from la_aciq.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODEBOOKS = ("midrise", "midtread")


def kernel(name: str):
    """The Triton operation, from its own module: la_aciq.kernels.quantize.quantize."""
    return getattr(importlib.import_module(f"la_aciq.kernels.{name}"), name)


@dataclass(frozen=True)
class Case:
    """A problem of the codes' operations. All tensors follow from the numbers, so a failure prints what is needed."""

    lead: tuple[int, ...] = (3,)
    k: int = 64
    group_size: int = 0
    dtype: torch.dtype = torch.float32
    codebook: str = "midrise"
    num_entries: int = 3
    ids_shape: tuple[int, ...] | None = None
    out_of_range: bool = False
    rotated: bool = False
    block_size: int = 0
    seed: int = 0
    layout: str = field(default="contiguous")

    @property
    def groups(self) -> int:
        return reference.group_count(self.k, self.group_size)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def x(self) -> Tensor:
        """Heavy tails, so that both end codes occur; strided as `layout` says."""
        numbers = torch.randn((*self.lead, self.k), generator=self.generator())
        numbers = (numbers * (1 + 3 * (numbers.abs() > 1.5))).to(self.dtype).to(DEVICE)
        if self.layout == "columns":
            wide = torch.full((*self.lead, 2 * self.k + 3), math.nan, dtype=self.dtype, device=DEVICE)
            wide[..., 3 : 3 + self.k] = numbers
            return wide[..., 3 : 3 + self.k]
        if self.layout == "every second":
            wide = torch.full((*self.lead, 2 * self.k), math.nan, dtype=self.dtype, device=DEVICE)
            wide[..., ::2] = numbers
            return wide[..., ::2]
        if self.layout == "transposed":
            return numbers.transpose(0, -1).contiguous().transpose(0, -1)
        return numbers

    def table(self) -> Tensor:
        table = torch.rand(self.num_entries, self.groups, generator=self.generator()) * 2 + 1
        return table.to(DEVICE)

    def language_ids(self) -> Tensor | None:
        if self.ids_shape is None:
            return None
        beyond = 3 if self.out_of_range else 0
        ids = torch.randint(-beyond, self.num_entries + beyond, self.ids_shape, generator=self.generator())
        return ids.to(torch.int32).to(DEVICE)

    def signs(self) -> Tensor | None:
        if not self.rotated:
            return None
        return (1 - 2 * torch.randint(0, 2, (self.k,), generator=self.generator())).to(torch.int8).to(DEVICE)


@st.composite
def cases(draw, rotation: bool = True) -> Case:
    lead = draw(st.sampled_from([(1,), (5,), (2, 3), (3, 1, 2), (2, 2, 2), ()]))
    k = draw(st.one_of(st.integers(1, 200), st.sampled_from([64, 96, 128, 192, 256, 576])))
    shapes = [None] + [lead[:i] for i in range(len(lead) + 1)]
    if len(lead) > 1:
        shapes += [(1, *lead[1:]), (*lead[:-1], 1), (lead[0], 1, *lead[2:])]
    rotated = rotation and draw(st.booleans())
    blocks = [0] + [b for b in (1, 2, 8, 32, 64) if k % b == 0]
    return Case(
        lead=lead,
        k=k,
        group_size=draw(st.sampled_from([0, 2, 6, 16, 64, 100, 256])),
        dtype=draw(st.sampled_from(DTYPES)),
        codebook=draw(st.sampled_from(CODEBOOKS)),
        num_entries=draw(st.integers(1, 5)),
        ids_shape=draw(st.sampled_from(shapes)),
        out_of_range=draw(st.booleans()),
        rotated=rotated,
        block_size=draw(st.sampled_from(blocks)) if rotated else 0,
        seed=draw(st.integers(0, 1000)),
        layout=draw(st.sampled_from(["contiguous", "columns", "every second", "transposed"])),
    )


NAMED = (
    Case(lead=(2,), k=4096, group_size=64, dtype=torch.bfloat16, rotated=True, ids_shape=(2,)),
    Case(lead=(2,), k=4096, rotated=True),
    Case(lead=(1,), k=16384, rotated=True, dtype=torch.float16),
    Case(lead=(1,), k=28672, rotated=True, dtype=torch.bfloat16),
    Case(lead=(2,), k=28671, group_size=100),
    Case(lead=(1,), k=32768, rotated=True),
    Case(lead=(40, 2), k=66, num_entries=1024, ids_shape=(40, 2), group_size=6),
    Case(lead=(2,), k=192, group_size=96, rotated=True, block_size=64),
    Case(lead=(1,), k=40000, group_size=20000),
)


def rotated64(case: Case) -> Tensor:
    """The oracle's float64 input of the codebook."""
    return reference._rotate64(case.x(), case.signs(), case.block_size)


def assert_codes(case: Case, packed: Tensor, clip_per_group: Tensor) -> None:
    """Codes equal the oracle's under the clips float64 [..., groups], except where x / Delta lies within the rounding
    of float32 (of the sums in a Hadamard block too) of a boundary: there either neighbour is right."""
    assert packed.dtype == torch.uint8
    assert packed.shape == (*case.lead, (case.k + 1) // 2)
    if case.k % 2:
        assert (packed[..., -1] >> 4 == 0).all()
    x = rotated64(case)
    clip = reference.per_element(clip_per_group, case.k, case.group_size)
    slack = x.abs() * 2.0**-20
    if case.rotated:
        slack = slack + torch.where(torch.isfinite(x), x, 0.0).abs().amax(-1, keepdim=True) * 2.0**-20
    slack = torch.nan_to_num(slack, posinf=0.0)
    codes = reference.unpack(packed, case.k).to(torch.float64)
    low, high = (reference.to_codes(x + sign * slack, clip, 4, case.codebook) for sign in (-1, 1))
    wrong = ~((codes >= low) & (codes <= high))
    assert not wrong.any(), f"{int(wrong.sum())} of {codes.numel()} codes are wrong"

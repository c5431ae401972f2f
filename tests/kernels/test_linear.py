"""linear on Triton against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from la_aciq.ops import reference

from .cases import CODEBOOKS, DEVICE, DTYPES, kernel


def problem(rows: int, n: int, k: int, group_size: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator).to(dtype).to(DEVICE)
    weight = torch.randint(0, 256, (n, (k + 1) // 2), generator=generator, dtype=torch.uint8)
    if k % 2:
        weight[:, -1] &= 15
    weight_clip = torch.rand(n, reference.group_count(k, group_size), generator=generator) + 0.5
    return x, weight.to(DEVICE), weight_clip.to(DEVICE)


def flip_bound(x: Tensor, dense: Tensor, options: dict) -> Tensor:
    """What it may change [rows, n] that an activation within float32 rounding of a boundary takes the other code."""
    bits = options.get("activation_bits", 16)
    if bits == 16:
        return torch.zeros((), device=x.device)
    y = reference._rotate64(x, options.get("signs"), options.get("block_size", 0))
    size = options.get("activation_group_size", 0)
    clip = reference.clip_per_group(options["clips"], options.get("language_ids"), x.shape[:-1])
    if options["activation_clip"] != "static":
        clip = reference.dynamic_clip(y, clip, size, options["activation_clip"]).double()
    clip = reference.per_element(clip, x.shape[-1], size)
    step = 2 * clip / (2**bits - 1)
    slack = (y.abs() + y.abs().amax(-1, keepdim=True)) * 2.0**-20
    codebook = options["activation_codebook"]
    low, high = (reference.to_codes(y + sign * slack, clip, bits, codebook) for sign in (-1, 1))
    return ((high - low) * step) @ dense.abs().T


def check(x: Tensor, weight: Tensor, weight_clip: Tensor, bias: Tensor | None = None, **options) -> None:
    out = kernel("linear")(x, weight, weight_clip, bias, **options)
    assert out.dtype == x.dtype
    expected = reference.linear(x.double(), weight, weight_clip, bias, **options)
    assert out.shape == expected.shape
    dense = reference.dequantize(
        weight,
        weight_clip,
        k=x.shape[-1],
        group_size=options.get("group_size", 0),
        codebook=options.get("weight_codebook", "midrise"),
        per_row=True,
        dtype=torch.float64,
    )
    # Rounding: float32 sums of |x| |w|, the output, and a rotated x in its own dtype where activations have 16 bits.
    sizes = reference._rotate64(x, options.get("signs"), options.get("block_size", 0)).abs() @ dense.abs().T
    eps = torch.finfo(x.dtype).eps
    allowed = sizes * 2.0**-18 + expected.abs() * eps + flip_bound(x, dense, options)
    if options.get("signs") is not None and options.get("activation_bits", 16) == 16:
        allowed = allowed + sizes * eps
    wrong = ~((out.double() - expected).abs() <= allowed)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} outputs are wrong"
    assert torch.equal(kernel("linear")(x, weight, weight_clip, bias, **options), out), "another result the second time"


@settings(deadline=None, max_examples=35)
@given(data=st.data())
def test_linear(data):
    draw = data.draw
    rows, n = draw(st.sampled_from([1, 3, 17, 33])), draw(st.sampled_from([1, 20, 70]))
    k = draw(st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 192, 576])))
    groups = st.sampled_from([0, 2, 10, 32, 64, 96, 256])
    group_size, activation_group_size = draw(groups), draw(groups)
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    x, weight, weight_clip = problem(rows, n, k, group_size, dtype, seed)
    options = {"group_size": group_size, "weight_codebook": draw(st.sampled_from(CODEBOOKS))}
    if draw(st.booleans()):
        options["signs"] = (1.0 - 2.0 * torch.randint(0, 2, (k,), generator=generator)).to(DEVICE)
    bits = draw(st.sampled_from([16, 8, 4]))
    if bits < 16:
        clip = torch.rand(3, reference.group_count(k, activation_group_size), generator=generator) + 2
        options |= {
            "activation_bits": bits,
            "activation_clip": draw(st.sampled_from(["static", "rms", "absmax"])),
            "clips": clip.to(DEVICE),
            "language_ids": torch.randint(-1, 4, (rows,), generator=generator).to(torch.int32).to(DEVICE),
            "activation_group_size": activation_group_size,
            "activation_codebook": draw(st.sampled_from(CODEBOOKS)),
        }
    bias = torch.randn(n, generator=generator).to(dtype).to(DEVICE) if draw(st.booleans()) else None
    check(x, weight, weight_clip, bias, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 65, 200])
def test_batches_that_choose_other_tiles(rows, dtype):
    x, weight, weight_clip = problem(rows, 70, 256, 64, dtype)
    check(x, weight, weight_clip, group_size=64)
    clip = torch.full((1, 4), 2.5, device=DEVICE)
    for bits in (8, 4):
        options = {"activation_bits": bits, "clips": clip, "activation_group_size": 64}
        check(x, weight, weight_clip, group_size=64, activation_clip="static", activation_codebook="midrise", **options)


@pytest.mark.gpu
def test_k_is_split_between_programs():
    """4096 columns of K in 64 segments: 16 partial sums, added in order."""
    x, weight, weight_clip = problem(2, 40, 4096, 64, torch.float16)
    check(x, weight, weight_clip, torch.ones(40, device=DEVICE), group_size=64)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["rows apart", "every second", "leading dimensions"])
def test_strided_input(layout):
    x, weight, weight_clip = problem(6, 20, 96, 32, torch.float32)
    if layout == "rows apart":
        x = torch.cat([x, x], dim=1)[:, :96]
    elif layout == "every second":
        x = torch.stack([x, x * 9], dim=-1)[..., 0]
    else:
        x = x.reshape(2, 3, 96)
    check(x, weight, weight_clip, group_size=32)


@pytest.mark.gpu
def test_a_clip_of_zero_gives_the_bias():
    """A row of zeros measured dynamically, and weights of a group that is all zero."""
    _, weight, weight_clip = problem(2, 20, 64, 32, torch.float32)
    bias = torch.randn(20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options = {"activation_bits": 8, "activation_clip": "absmax", "clips": torch.ones(1, 1, device=DEVICE)}
    out = kernel("linear")(torch.zeros(2, 64, device=DEVICE), weight, weight_clip, bias, group_size=32, **options)
    assert torch.equal(out, bias.expand(2, -1))
    ones = torch.ones(2, 64, device=DEVICE)
    assert torch.equal(kernel("linear")(ones, weight, weight_clip * 0, bias, group_size=32), bias.expand(2, -1))


@pytest.mark.gpu
def test_integer_products_are_exact():
    """Steps that are powers of two, sums below 2^24: the result is the exact sum, not a rounded one."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (3, 128), generator=generator)
    x = ((a - 127.5) / 128).to(torch.float32).to(DEVICE)
    _, weight, _ = problem(3, 20, 128, 0, torch.float32)
    weight_clip = torch.full((20, 1), 7.5, device=DEVICE)
    clip = torch.full((1, 1), 127.5 / 128, device=DEVICE)
    # The inputs are the codebook's own values, the middles of its cells, so no rounding decides a code.
    out = kernel("linear")(x, weight, weight_clip, activation_bits=8, clips=clip)
    dense = reference.unpack(weight, 128).double() - 7.5
    assert torch.equal(out.double(), x.double() @ dense.T)


@pytest.mark.gpu
def test_long_rows_measured_by_another_kernel():
    x, weight, weight_clip = problem(1, 4, 20000, 0, torch.float32)
    options = {"activation_bits": 8, "activation_clip": "absmax", "clips": torch.ones(1, 1, device=DEVICE)}
    check(x, weight, weight_clip, activation_codebook="midtread", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows_or_no_columns(rows):
    x, weight, weight_clip = problem(rows, 0 if rows else 5, 64, 0, torch.float32)
    assert kernel("linear")(x, weight, weight_clip).shape == (rows, 0 if rows else 5)

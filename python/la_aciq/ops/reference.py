"""What every operation computes, in float64 and plain PyTorch: the oracle of the tests and the fallback without a core.

Shapes, dtypes and arguments are those of the schemas in csrc/ops.cpp; the wrappers in functional.py have checked them.
Everything runs on any device and traces under torch.compile(fullgraph=True).

The codebook of B bits has N = 2^B levels and, for a clip alpha, the step Delta = 2 alpha / (N - 1):

    midrise    code = clamp(floor(x / Delta) + N/2, 0, N-1)              value = (code - (N-1)/2) Delta
    midtread   code = clamp(round_half_even(x / Delta) + N/2, 0, N-1)    value = (code - N/2) Delta

NaN takes code N/2, +-Inf the end codes. A clip alpha that is not finite and positive gives code N/2 and value 0.
"""

import math

import torch
from torch import Tensor

from . import rotation, rounding
from .streaming import HISTOGRAM_BINS


def group_count(k: int, group_size: int) -> int:
    return 1 if group_size == 0 else -(-k // group_size)


def entries_of(language_ids: Tensor | None, num_entries: int, lead: torch.Size) -> Tensor:
    """int64 [*lead]: the entry of the table that each row of x reads. None and ids out of range read entry 0."""
    if language_ids is None:
        return torch.zeros((), dtype=torch.int64).expand(lead)
    ids = language_ids.to(torch.int64)
    ids = torch.where((ids >= 0) & (ids < num_entries), ids, 0)
    return ids.reshape((*ids.shape, *[1] * (len(lead) - ids.dim()))).expand(lead)


def per_element(per_group: Tensor, k: int, group_size: int) -> Tensor:
    """[..., groups] -> [..., k]."""
    if group_size == 0:
        return per_group.expand(*per_group.shape[:-1], k)
    return per_group.repeat_interleave(group_size, dim=-1)[..., :k]


def clip_per_group(table: Tensor, language_ids: Tensor | None, lead: torch.Size) -> Tensor:
    """float64 [*lead, groups]: the table's entry for each row of x."""
    entries = entries_of(language_ids, table.shape[0], lead).to(table.device)
    return table.to(torch.float64)[entries]


def _valid(clips: Tensor) -> Tensor:
    return torch.isfinite(clips) & (clips > 0)


def to_codes(x: Tensor, clips: Tensor, bits: int, codebook: str) -> Tensor:
    """float64 codes 0 .. 2^bits - 1 of x [...] for clips that broadcast against it."""
    levels = 2**bits
    valid = _valid(clips)
    scaled = x.to(torch.float64) * (levels - 1) / (2 * torch.where(valid, clips, 1.0))
    scaled = torch.where(valid & ~torch.isnan(scaled), scaled, 0.0)
    rounded = torch.floor(scaled) if codebook == "midrise" else torch.round(scaled)
    return torch.clamp(rounded + levels // 2, 0, levels - 1)


def to_values(codes: Tensor, clips: Tensor, bits: int, codebook: str) -> Tensor:
    """float64 values of codes for clips that broadcast against them."""
    levels = 2**bits
    zero = (levels - 1) / 2 if codebook == "midrise" else levels // 2
    step = torch.where(_valid(clips), clips, 0.0) * 2 / (levels - 1)
    return torch.mul(codes.to(torch.float64) - zero, step)


def fake_quantize(x: Tensor, clips: Tensor, bits: int = 4, codebook: str = "midrise") -> Tensor:
    """x rounded to the codebook of `bits` bits, in the dtype of x. clips broadcasts against x."""
    clips = clips.to(torch.float64)
    return to_values(to_codes(x, clips, bits, codebook), clips, bits, codebook).to(x.dtype)


def pack(codes: Tensor) -> Tensor:
    """uint8 [..., ceil(K / 2)] of codes [..., K] in 0 .. 15: the even index in the low nibble, odd K padded with 0."""
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, k: int) -> Tensor:
    """uint8 [..., k] of uint8 [..., ceil(k / 2)]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :k]


def repack(weight: Tensor) -> Tensor:
    """int32 [ceil(N / 16), ceil(K / 8), 16] of uint8 [N, ceil(K / 2)]; see la_aciq.repack_weight."""
    n, width = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -width % 4, 0, -n % 16))
    lanes = padded.reshape(-1, 16, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return lanes.view(torch.int32).squeeze(-1)


def restore(repacked: Tensor, n: int, k: int) -> Tensor:
    """uint8 [n, ceil(k / 2)] of what repack made of it."""
    panels, eights, _ = repacked.shape
    lanes = repacked.unsqueeze(-1).contiguous().view(torch.uint8)  # [panels, eights, 16, 4]
    return lanes.transpose(1, 2).reshape(16 * panels, 4 * eights)[:n, : (k + 1) // 2].contiguous()


def rotate(x: Tensor, signs: Tensor, block_size: int = 0) -> Tensor:
    """y = H_b (signs * x) / sqrt(b) per block of b along the last dimension, in the dtype of x."""
    return _hadamard64(x, signs, block_size).to(x.dtype)


def _rotate64(x: Tensor, signs: Tensor | None, block_size: int) -> Tensor:
    return x.to(torch.float64) if signs is None else _hadamard64(x, signs, block_size)


def _hadamard64(x: Tensor, signs: Tensor, block_size: int) -> Tensor:
    # The values of real tensors only, and not of a GPU's, which would have to be waited for.
    if not torch.compiler.is_compiling() and signs.is_cpu and type(signs) is Tensor:
        others = (signs.abs() != 1).nonzero().flatten().tolist()
        if others:
            raise ValueError(f"signs: expected nothing but 1 and -1, got {signs[others[0]].item():g} at {others[0]}")
    k = x.shape[-1]
    block = block_size or rotation.block_size(k)
    y = (x.to(torch.float64) * signs.to(torch.float64)).reshape(*x.shape[:-1], k // block, block)
    half = 1
    while half < block:
        pairs = y.reshape(*x.shape[:-1], k // block, block // (2 * half), 2, half)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([even + odd, even - odd], dim=-2)
        half *= 2
    return torch.div(y.reshape(x.shape), math.sqrt(block))


def moments(
    x: Tensor, language_ids: Tensor | None = None, num_entries: int = 1, histogram: bool = False
) -> tuple[Tensor, Tensor]:
    """State float64 [num_entries, 8] and histogram int64 [num_entries, 258 or 0, 2]; streaming.py defines both."""
    lead = x.shape[:-1] if x.dim() else x.shape
    entries = entries_of(language_ids, num_entries, lead).to(x.device)
    values = x.to(torch.float64).reshape(-1)
    index = (entries.unsqueeze(-1) if x.dim() else entries).expand(x.shape).reshape(-1)
    finite = torch.isfinite(values)
    clean = torch.where(finite, values, 0.0)
    weight = finite.to(torch.float64)

    def total(per_element: Tensor) -> Tensor:
        return torch.zeros(num_entries, dtype=torch.float64, device=x.device).index_add(0, index, per_element)

    count = total(weight)
    divisor = count.clamp(min=1.0)
    mean = total(clean) / divisor
    deviation = (clean - mean[index]) * weight
    s2, s3, s4 = (total(deviation**p) for p in (2, 3, 4))
    # The powers are about the rounded mean; the residual takes them to the mean itself.
    residual = total(deviation) / divisor
    powers = [
        s2 - count * residual**2,
        s3 - 3 * residual * s2 + 2 * count * residual**3,
        s4 - 4 * residual * s3 + 6 * residual**2 * s2 - 3 * count * residual**4,
    ]
    low = torch.full((num_entries,), math.inf, dtype=torch.float64, device=x.device)
    low = low.scatter_reduce(0, index, torch.where(finite, values, math.inf), "amin")
    high = torch.full((num_entries,), -math.inf, dtype=torch.float64, device=x.device)
    high = high.scatter_reduce(0, index, torch.where(finite, values, -math.inf), "amax")
    state = torch.stack([count, mean + residual, *powers, low, high, total(1.0 - weight)], dim=-1)
    if not histogram:
        return state, torch.zeros(num_entries, 0, 2, dtype=torch.int64, device=x.device)

    magnitude = clean.abs().clamp(max=torch.finfo(torch.float32).max).to(torch.float32).to(torch.float64)
    significand, exponent = torch.frexp(magnitude)  # 1/2 <= significand < 1
    eighths = 16 * significand - 8
    inner = finite & (magnitude >= 2.0**-16) & (magnitude < 2.0**16)
    bins = torch.where(inner, 8 * (exponent + 15) + torch.floor(eighths) + 1, 0.0)
    bins = torch.where(magnitude >= 2.0**16, HISTOGRAM_BINS - 1, bins).to(torch.int64)
    low_bits = torch.where(inner, torch.frac(eighths) * 2**20, 0.0).to(torch.int64)
    increments = torch.stack([finite.to(torch.int64), low_bits], dim=-1)
    counts = torch.zeros(num_entries * HISTOGRAM_BINS, 2, dtype=torch.int64, device=x.device)
    counts = counts.index_add(0, index * HISTOGRAM_BINS + bins, increments)
    return state, counts.reshape(num_entries, HISTOGRAM_BINS, 2)


def quantize(
    x: Tensor,
    clips: Tensor,
    language_ids: Tensor | None = None,
    group_size: int = 0,
    codebook: str = "midrise",
    signs: Tensor | None = None,
    block_size: int = 0,
    tail_sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., ceil(K / 2)]; tail sums float64 [num_entries or 0, groups, 4]: the finite elements, those with
    |x| > clip, the sum of |x| over those, the non-finite elements (all after rotation)."""
    k = x.shape[-1]
    x = _rotate64(x, signs, block_size)
    clip = per_element(clip_per_group(clips, language_ids, x.shape[:-1]), k, group_size)
    codes = pack(to_codes(x, clip, 4, codebook))
    num_entries, groups = clips.shape
    if not tail_sums:
        return codes, torch.zeros(0, groups, 4, dtype=torch.float64, device=x.device)

    finite = torch.isfinite(x)
    beyond = finite & (x.abs() > clip)
    each = torch.stack([finite, beyond, torch.where(beyond, x.abs(), 0.0), ~finite], dim=-1)
    group = torch.arange(k, device=x.device) // (group_size or max(k, 1))
    entries = entries_of(language_ids, num_entries, x.shape[:-1]).to(x.device).unsqueeze(-1)
    index = (entries * groups + group).reshape(-1)
    tail = torch.zeros(num_entries * groups, 4, dtype=torch.float64, device=x.device)
    return codes, tail.index_add(0, index, each.reshape(-1, 4)).reshape(num_entries, groups, 4)


def dynamic_clip(x: Tensor, factor_per_group: Tensor, group_size: int, statistic: str) -> Tensor:
    """float32 [..., groups]: factor * rms or absmax of the finite elements of each group of x (float64 [..., K])."""
    k = x.shape[-1]
    groups = group_count(k, group_size)
    size = group_size or k

    def grouped(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, groups * size - k))
        return padded.reshape(*x.shape[:-1], groups, size)

    finite = torch.isfinite(x)
    clean = grouped(torch.where(finite, x, 0.0))
    if statistic == "absmax":
        measured = clean.abs().amax(-1)
    else:
        count = grouped(finite.to(torch.float64)).sum(-1)
        measured = (clean.square().sum(-1) / count.clamp(min=1.0)).sqrt()
    return torch.mul(factor_per_group, measured).to(torch.float32)


def quantize_dynamic(
    x: Tensor,
    clip_factor: Tensor,
    language_ids: Tensor | None = None,
    group_size: int = 0,
    statistic: str = "rms",
    codebook: str = "midrise",
    signs: Tensor | None = None,
    block_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., ceil(K / 2)] and the clips they were made with, float32 [..., groups]."""
    x = _rotate64(x, signs, block_size)
    factor = clip_per_group(clip_factor, language_ids, x.shape[:-1])
    row_clips = dynamic_clip(x, factor, group_size, statistic)
    clip = per_element(row_clips.to(torch.float64), x.shape[-1], group_size)
    return pack(to_codes(x, clip, 4, codebook)), row_clips


def dequantize(
    codes: Tensor,
    clips: Tensor,
    language_ids: Tensor | None = None,
    *,
    k: int,
    group_size: int = 0,
    codebook: str = "midrise",
    per_row: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values [..., k] in dtype. With per_row clips is [..., groups], the clips that quantize_dynamic returns."""
    clip = clips.to(torch.float64) if per_row else clip_per_group(clips, language_ids, codes.shape[:-1])
    return to_values(unpack(codes, k), per_element(clip, k, group_size), 4, codebook).to(dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_clip: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int = 0,
    weight_codebook: str = "midrise",
    signs: Tensor | None = None,
    block_size: int = 0,
    activation_bits: int = 16,
    activation_clip: str = "static",
    clips: Tensor | None = None,
    language_ids: Tensor | None = None,
    activation_group_size: int = 0,
    activation_codebook: str = "midrise",
) -> Tensor:
    """[..., N]: x [..., K], rotated if signs are given and rounded to activation_bits, times INT4 weights [N, K]."""
    k = x.shape[-1]
    y = _rotate64(x, signs, block_size)
    if activation_bits < 16 and clips is not None:
        per_group = clip_per_group(clips, language_ids, x.shape[:-1])
        if activation_clip != "static":
            per_group = dynamic_clip(y, per_group, activation_group_size, activation_clip).to(torch.float64)
        y = fake_quantize(y, per_element(per_group, k, activation_group_size), activation_bits, activation_codebook)
    dense = dequantize(
        restore(weight, weight_clip.shape[0], k) if weight.dtype == torch.int32 else weight,
        weight_clip,
        k=k,
        group_size=group_size,
        codebook=weight_codebook,
        per_row=True,
        dtype=torch.float64,
    )
    out = torch.nn.functional.linear(y, dense, None if bias is None else bias.to(torch.float64))
    return out.to(x.dtype)


def round_weights(
    weight: Tensor, second_moments: Tensor, factor: Tensor, group_size: int = 0, codebook: str = "midrise"
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, ceil(K / 2)] and clips float32 [N, groups]; rounding.py defines them."""
    codes, clips = rounding.round_weights(weight, second_moments, factor, group_size, codebook, torch.float64)
    return pack(codes), clips

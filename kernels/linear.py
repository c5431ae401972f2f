"""`linear`: x times INT4 weights, with 16-bit, INT8 or INT4 activations.

16-bit: the weights enter the tensor cores as the odd integers 2 code - 15 (mid-tread: code - 8), which bfloat16 and
float16 hold exactly; the sum over each group is scaled in float32.

INT8 and INT4: a first kernel rotates and quantizes x to int8 with one step per row and group, its clips looked up by
language or measured. Then int8 tensor cores: exact integers within a group, scaled in float32. The mid-rise codebook
of 4 bits maps to 2 code - 15; that of 8 bits, 2 code - 255, does not fit in int8 and enters as 2 (code - 128) + 1, the
ones as a row sum of the weights.

The loop over K goes by segments that lie within one group of the weights and one of the activations, so any two group
sizes work. The nibbles of a byte are the weights of an even and an odd column; they are never interleaved. Instead the
even and the odd columns of x are multiplied apart, from "planar" activations [rows, 2, half] where a first kernel runs
anyway.

Weights are the left operand: their nibbles become operands in registers, and a batch is the short side of the tile.
Few rows leave most of the device idle, so K is split between programs, which write float32 partial sums that a second
kernel adds in a fixed order: the same bits every time. float32 activations are multiplied in float32, not tf32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import tuning
from .common import (
    MAX_TILE,
    RowIds,
    as_rows,
    cut,
    hadamard_block,
    inverse_step_of,
    load_pieces,
    log2_block,
    multiprocessors,
    on_device,
    read_entry,
    read_table,
    rotation_fits,
    rotation_scale,
    row_ids,
    split_pairs,
    step_of,
    to_codes,
)
from .quantize_dynamic import measure, quantize_dynamic
from .rotate import rotated

# --- Activations ------------------------------------------------------------------------------------------------------


@triton.jit
def activations_kernel(
    x_ptr,  # [rows, K] float32, bfloat16 or float16
    clips_ptr,  # [num_entries, groups] float32: clips, or factors on the statistic
    language_ids_ptr,  # ids int32 [period]
    signs_ptr,  # [K]
    planar_ptr,  # [rows, 2, half]: even columns, odd columns; int8 codes, or values in the dtype of x for LEVELS 0
    steps_ptr,  # [rows, groups] float32
    rows,
    K,
    half,
    x_stride,
    group,
    width,
    per_group,
    per_row,
    groups,
    clips_stride_entry,
    clips_stride_group,
    num_entries,
    inner,
    period,
    rotation_scale,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    FIT: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    LEVELS: tl.constexpr,
    MIDRISE: tl.constexpr,
    MEASURED: tl.constexpr,
    RMS: tl.constexpr,
):
    x, row, group_index, start, mask = load_pieces(
        x_ptr,
        signs_ptr,
        rows,
        K,
        x_stride,
        group,
        width,
        per_group,
        per_row,
        rotation_scale,
        PIECES,
        WIDTH,
        FIT,
        LOG2_BLOCK,
    )
    if LEVELS > 0:
        entry = read_entry(language_ids_ptr, row, rows, num_entries, inner, period, HAS_IDS)
        clip = read_table(clips_ptr, entry, group_index, row < rows, clips_stride_entry, clips_stride_group)
        if MEASURED:
            clip = clip * measure(x, mask, RMS)
        codes = to_codes(x, inverse_step_of(clip, LEVELS)[:, None], LEVELS, MIDRISE)
        step = step_of(clip, LEVELS)
        if MIDRISE:
            step = step * 0.5
        if MIDRISE and LEVELS == 16:
            codes = 2 * codes - (LEVELS - 1)
        else:
            codes = codes - LEVELS // 2
        # Every piece of a group writes the same step.
        tl.store(steps_ptr + row.to(tl.int64) * groups + group_index, step, mask=row < rows)
        even, odd = split_pairs(codes.to(tl.int8), PIECES, WIDTH)
    else:
        even, odd = split_pairs(x.to(planar_ptr.dtype.element_ty), PIECES, WIDTH)
    even_mask, odd_mask = split_pairs(mask.to(tl.int8), PIECES, WIDTH)
    at = (row.to(tl.int64) * (2 * half) + start // 2)[:, None] + tl.arange(0, WIDTH // 2)[None, :]
    tl.store(planar_ptr + at, even, mask=even_mask != 0)
    tl.store(planar_ptr + at + half, odd, mask=odd_mask != 0)


def planar_activations(
    x: Tensor,
    signs: Tensor | None,
    block_size: int,
    bits: int,
    statistic: str,
    clips: Tensor | None,
    ids: RowIds,
    group_size: int,
    codebook: str,
) -> tuple[Tensor, Tensor]:
    """x [rows, K], rotated and quantized to `bits`, as [rows, 2, half], and its steps float32 [rows, groups]."""
    rows, k = x.shape[0], int(x.shape[1])
    group_size = group_size if bits < 16 else 0
    whole = bits < 16 and statistic != "static"
    group = min(group_size or k, k)
    too_long = whole and group > MAX_TILE
    widest = group if whole and not too_long else 1024
    dtype = x.dtype
    block = 0
    if signs is not None:
        block = hadamard_block(k, block_size)
        if too_long or not rotation_fits(k, group_size, block, max(widest, min(block, MAX_TILE))):
            x, signs, block = rotated(x, signs, block, torch.float32), None, 0
    if too_long and clips is not None:
        # Measured by another kernel, the clips become a table with an entry per row.
        language_ids = ids.expanded(rows) if ids.present else None
        _, clips = quantize_dynamic(x, clips, language_ids, group_size, statistic)
        ids, statistic = RowIds(torch.arange(rows, dtype=torch.int32, device=x.device), 1, rows), "static"
    parameters = tuning.streaming("activations rotated" if block else "activations", x)
    pieces = cut(rows, k, group_size, block=block, widest=widest, **parameters)
    groups = triton.cdiv(k, group)
    # Halves begin at multiples of 16 elements, for 16-byte loads.
    half = triton.cdiv((k + 1) // 2, 16) * 16
    planar = torch.empty((rows, 2, half), dtype=torch.int8 if bits < 16 else dtype, device=x.device)
    steps = torch.empty((rows, groups) if bits < 16 else (0, groups), dtype=torch.float32, device=x.device)
    table = steps if clips is None else clips
    wrap_triton(activations_kernel)[pieces.grid](
        x,
        table,
        table if ids.ids is None else ids.ids,
        table if signs is None else signs.contiguous(),
        planar,
        steps,
        rows,
        k,
        half,
        x.stride(0),
        pieces.group,
        pieces.width,
        pieces.per_group,
        pieces.per_row,
        groups,
        table.stride(0),
        table.stride(1),
        table.shape[0],
        ids.inner,
        ids.period,
        rotation_scale(block),
        PIECES=pieces.PIECES,
        WIDTH=pieces.WIDTH,
        FIT=pieces.FIT,
        LOG2_BLOCK=log2_block(block),
        HAS_IDS=ids.present,
        LEVELS=2**bits if bits < 16 else 0,
        MIDRISE=codebook == "midrise",
        MEASURED=statistic != "static",
        RMS=statistic == "rms",
        num_warps=pieces.warps,
    )
    return planar, steps


# --- The product ------------------------------------------------------------------------------------------------------


@triton.jit
def linear_kernel(
    x_ptr,  # PLANAR: [M, 2, x_half], else [M, K] with rows x_stride apart
    steps_ptr,  # [M, step_groups] float32, INT8 and INT4 activations only
    weight_ptr,  # [N, weight_stride] uint8
    weight_clips_ptr,  # [N, weight_groups] float32 clips of the weights
    bias_ptr,  # [N]
    out_ptr,  # [M, N], or [splits, M, N] float32 partial sums
    M,
    N,
    K,
    x_stride,
    x_half,
    weight_stride,
    weight_group,
    weight_groups,
    step_group,
    step_groups,
    half_unit,  # columns count in pairs: the even and the odd one of a byte of weights
    half_width,
    per_unit,
    segments,
    segments_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF: tl.constexpr,
    EXACT: tl.constexpr,
    PLANAR: tl.constexpr,
    BITS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    WEIGHT_MIDRISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """A [BLOCK_N, BLOCK_M] tile of the transposed result over the segments of one split. EXACT: every segment has 2
    HALF columns."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    j = tl.arange(0, HALF)
    m_exists, n_exists = m < M, n < N
    x_row = x_ptr + m.to(tl.int64) * x_stride
    weights = weight_ptr + (n.to(tl.int64) * weight_stride)[:, None] + j[None, :]
    clips_row = weight_clips_ptr + n.to(tl.int64) * weight_groups
    steps_row = steps_ptr + m.to(tl.int64) * step_groups

    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    last = tl.minimum((split + 1) * segments_per_split, segments)
    for segment in range(split * segments_per_split, last):
        unit = segment // per_unit
        pair = unit * half_unit + (segment % per_unit) * half_width
        column = 2 * pair
        even, odd = j < HALF, j < HALF
        if not EXACT:
            end = tl.minimum(pair + half_width, (unit + 1) * half_unit)
            even, odd = pair + j < tl.minimum(end, (K + 1) // 2), pair + j < tl.minimum(end, K // 2)

        weight = tl.load(weights + pair, mask=n_exists[:, None] & even[None, :], other=0)
        if PLANAR:
            at = x_row[None, :] + (pair + j)[:, None]
            x_even = tl.load(at, mask=even[:, None] & m_exists[None, :], other=0)
            x_odd = tl.load(at + x_half, mask=odd[:, None] & m_exists[None, :], other=0)
        else:
            i = tl.arange(0, 2 * HALF)
            exists = i < 2 * HALF
            if not EXACT:
                exists = i < tl.minimum(2 * end, K) - column
            x = tl.load(x_row[:, None] + (column + i)[None, :], mask=m_exists[:, None] & exists[None, :], other=0)
            x_even, x_odd = split_pairs(x, BLOCK_M, 2 * HALF)
            x_even, x_odd = tl.trans(x_even), tl.trans(x_odd)
        low, high = (weight & 15).to(tl.int8), (weight >> 4).to(tl.int8)
        if WEIGHT_MIDRISE:
            low, high = 2 * low - 15, 2 * high - 15
        else:
            low, high = low - 8, high - 8

        if BITS < 16:
            exact = tl.dot(low, x_even, out_dtype=tl.int32)
            exact = tl.dot(high, x_odd, exact, out_dtype=tl.int32)
            if PLUS_ONE:
                ones = tl.where(even[None, :], low, 0).to(tl.int32) + tl.where(odd[None, :], high, 0).to(tl.int32)
                exact = 2 * exact + tl.sum(ones, axis=1)[:, None]
            steps = tl.load(steps_row + column // step_group, mask=m_exists, other=0.0)
            product = exact.to(tl.float32) * steps[None, :]
        else:
            dtype: tl.constexpr = x_ptr.dtype.element_ty
            product = tl.dot(low.to(dtype), x_even, input_precision="ieee")
            product = tl.dot(high.to(dtype), x_odd, product, input_precision="ieee")
        weight_step = step_of(tl.load(clips_row + column // weight_group, mask=n_exists, other=0.0), 16)
        total += product * weight_step[:, None]
    if WEIGHT_MIDRISE:
        total *= 0.5

    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n_exists, other=0.0).to(tl.float32)[:, None]
    at = (split.to(tl.int64) * M + m)[None, :] * N + n[:, None]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=n_exists[:, None] & m_exists[None, :])


@triton.jit
def add_splits_kernel(
    partial_ptr,  # [splits, M * N] float32
    bias_ptr,  # [N]
    out_ptr,  # [M * N]
    elements,
    N,
    splits,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * elements + at, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton_op("la_aciq_triton::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    weight_clip: Tensor,
    bias: Tensor | None = None,
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
    """See la_aciq.linear; the arguments are those of the schema in csrc/ops.cpp (triton_op has no keyword-only
    tensors)."""
    if weight.dtype != torch.uint8:
        raise ValueError(f"weight: expected uint8 codes, got {weight.dtype}: repack_weight is for the CPU's kernels")
    k = int(x.shape[-1])
    columns = weight.shape[0]
    flat = as_rows(x)
    rows = flat.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    result = out.reshape(*x.shape[:-1], columns)
    if rows == 0 or columns == 0:
        return result
    weight, weight_clip = as_rows(weight), weight_clip.contiguous()
    step_group = min(activation_group_size or k, k) if activation_bits < 16 else k
    weight_group = min(group_size or k, k)
    parameters = tuning.linear(rows, x.dtype, activation_bits, x.device)
    block_m, block_n = parameters["block_m"], parameters["block_n"]
    with on_device(x):
        if activation_bits < 16 or signs is not None or rows > 128:
            planar, steps = planar_activations(
                flat,
                signs,
                block_size,
                activation_bits,
                activation_clip,
                clips,
                row_ids(language_ids, x.shape[:-1]),
                activation_group_size,
                activation_codebook,
            )
            operand, x_half, is_planar = planar, planar.shape[2], True
        else:
            operand, steps, x_half, is_planar = flat, weight_clip, 0, False

        # Segments of K: within a unit, which both group sizes are multiples of, at most 128 wide.
        unit = (
            math.gcd(weight_group, step_group) if k not in (weight_group, step_group) else min(weight_group, step_group)
        )
        width = min(unit, 128 if unit % 128 == 0 or unit == k else 64)
        # The tensor cores take 32 int8 or 16 16-bit columns at a time, of the even and of the odd ones.
        half = max(32 if activation_bits < 16 else 16, triton.next_power_of_2(width) // 2)
        per_unit = triton.cdiv(unit, width)
        segments = triton.cdiv(k, unit) * per_unit
        tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
        splits = 1
        if rows <= 64:
            splits = max(1, min(segments // 4, parameters["programs"] * multiprocessors(x.device) // tiles))
        segments_per_split = triton.cdiv(segments, splits)
        splits = triton.cdiv(segments, segments_per_split)
        target = out
        if splits > 1:
            target = torch.empty((splits, rows, columns), dtype=torch.float32, device=x.device)
        wrap_triton(linear_kernel)[(tiles, splits)](
            operand,
            steps,
            weight,
            weight_clip,
            out if bias is None else bias,
            target,
            rows,
            columns,
            k,
            operand.stride(0),
            x_half,
            weight.stride(0),
            weight_group,
            weight_clip.shape[1],
            step_group,
            steps.shape[1],
            triton.cdiv(unit, 2),
            triton.cdiv(width, 2),
            per_unit,
            segments,
            segments_per_split,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            HALF=half,
            EXACT=width == 2 * half and unit % width == 0 and k % unit == 0,
            PLANAR=is_planar,
            BITS=activation_bits,
            PLUS_ONE=activation_bits == 8 and activation_codebook == "midrise",
            WEIGHT_MIDRISE=weight_codebook == "midrise",
            HAS_BIAS=bias is not None and splits == 1,
            num_warps=parameters["warps"],
            num_stages=parameters["stages"],
        )
        if splits > 1:
            elements = rows * columns
            wrap_triton(add_splits_kernel)[(triton.cdiv(elements, 512),)](
                target,
                out if bias is None else bias,
                out,
                elements,
                columns,
                splits,
                HAS_BIAS=bias is not None,
                BLOCK=512,
                num_warps=4,
            )
    return result

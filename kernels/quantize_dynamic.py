"""`quantize_dynamic`: INT4 codes under clips measured on x itself, clip = clip_factor[entry, group] * rms or absmax of
the group.

A program holds whole groups on chip (up to 16384 elements): rotation, statistic, codes and clip come from one read of
x. Longer groups are read and rotated twice in chunks, the second time from the L2 cache where the first has just left
them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import tuning
from .common import (
    MAX_TILE,
    as_rows,
    cut,
    hadamard,
    hadamard_block,
    inverse_step_of,
    load_pieces,
    log2_block,
    on_device,
    power_of_two_below,
    read_entry,
    read_table,
    rotation_fits,
    rotation_scale,
    row_ids,
    store_codes,
    to_codes,
    warps,
)
from .rotate import rotated

CHUNK = 8192


@triton.jit
def measure(x, mask, RMS: tl.constexpr):
    """rms or absmax of the finite elements of each row of a tile, 0 where there are none."""
    finite = mask & (tl.abs(x) < float("inf"))
    size = tl.where(finite, tl.abs(x), 0.0)
    largest = tl.max(size, axis=1)
    if not RMS:
        return largest
    # Squares relative to the largest element neither overflow nor vanish.
    unit, inverse = power_of_two_below(largest)
    relative = size * inverse[:, None]
    count = tl.sum(finite.to(tl.float32), axis=1)
    return tl.sqrt(tl.sum(relative * relative, axis=1) / tl.maximum(count, 1.0)) * unit


@triton.jit
def quantize_dynamic_kernel(
    x_ptr,  # [rows, K] float32, bfloat16 or float16
    factor_ptr,  # [num_entries, groups] float32
    language_ids_ptr,  # ids int32 [period]
    signs_ptr,  # [K]
    codes_ptr,  # [rows, row_bytes] uint8
    row_clips_ptr,  # [rows, groups] float32
    rows,
    K,
    row_bytes,
    x_stride,
    group,
    groups,
    factor_stride_entry,
    factor_stride_group,
    num_entries,
    inner,
    period,
    rotation_scale,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    FIT: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    MIDRISE: tl.constexpr,
    RMS: tl.constexpr,
):
    x, row, group_index, start, mask = load_pieces(
        x_ptr, signs_ptr, rows, K, x_stride, group, group, 1, groups, rotation_scale, PIECES, WIDTH, FIT, LOG2_BLOCK
    )
    entry = read_entry(language_ids_ptr, row, rows, num_entries, inner, period, HAS_IDS)
    factor = read_table(factor_ptr, entry, group_index, row < rows, factor_stride_entry, factor_stride_group)
    clip = factor * measure(x, mask, RMS)
    tl.store(row_clips_ptr + row.to(tl.int64) * groups + group_index, clip, mask=row < rows)
    codes = to_codes(x, inverse_step_of(clip, 16)[:, None], 16, MIDRISE)
    store_codes(codes_ptr, codes, row, start, mask, row_bytes, PIECES, WIDTH)


@triton.jit
def load_chunk(x_ptr, signs_ptr, start, end, rotation_scale, CHUNK: tl.constexpr, LOG2_BLOCK: tl.constexpr):
    """Columns start .. start + CHUNK of a row up to `end` as float32 [1, CHUNK], rotated unless LOG2_BLOCK is
    negative."""
    offset = tl.arange(0, CHUNK)[None, :]
    mask = offset < end - start
    x = tl.load(x_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
    if LOG2_BLOCK >= 0:
        signs = tl.load(signs_ptr + start + offset, mask=mask, other=0).to(tl.float32)
        x = hadamard(x * (signs * rotation_scale), LOG2_BLOCK)
    return x, mask


@triton.jit
def quantize_dynamic_long_kernel(
    x_ptr,  # [rows, K]; the arguments are those of quantize_dynamic_kernel
    factor_ptr,
    language_ids_ptr,
    signs_ptr,
    codes_ptr,
    row_clips_ptr,
    rows,
    K,
    row_bytes,
    x_stride,
    group,
    groups,
    factor_stride_entry,
    factor_stride_group,
    num_entries,
    inner,
    period,
    rotation_scale,
    CHUNK: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    MIDRISE: tl.constexpr,
    RMS: tl.constexpr,
):
    """One group of any length per program, in chunks of whole Hadamard blocks."""
    row = tl.program_id(0) + tl.arange(0, 1)
    group_index = tl.program_id(1) + tl.arange(0, 1)
    first = tl.program_id(1).to(tl.int64) * group
    end = tl.minimum(first + group, K)
    base = x_ptr + tl.program_id(0).to(tl.int64) * x_stride
    total = tl.zeros([1, CHUNK], dtype=tl.float64)
    count = tl.zeros([1, CHUNK], dtype=tl.int32)
    largest = tl.zeros([1, CHUNK], dtype=tl.float32)
    for start in range(first, end, CHUNK):
        x, mask = load_chunk(base, signs_ptr, start, end, rotation_scale, CHUNK, LOG2_BLOCK)
        finite = mask & (tl.abs(x) < float("inf"))
        size = tl.where(finite, tl.abs(x), 0.0)
        if RMS:
            total += size.to(tl.float64) * size.to(tl.float64)
            count += finite.to(tl.int32)
        else:
            largest = tl.maximum(largest, size)
    if RMS:
        mean_square = tl.sum(total, axis=1) / tl.maximum(tl.sum(count, axis=1), 1).to(tl.float64)
        measured = tl.sqrt(mean_square).to(tl.float32)
    else:
        measured = tl.max(largest, axis=1)
    entry = read_entry(language_ids_ptr, row, rows, num_entries, inner, period, HAS_IDS)
    factor = read_table(factor_ptr, entry, group_index, row < rows, factor_stride_entry, factor_stride_group)
    clip = factor * measured
    tl.store(row_clips_ptr + row.to(tl.int64) * groups + group_index, clip)
    inverse_step = inverse_step_of(clip, 16)[:, None]
    for start in range(first, end, CHUNK):
        x, mask = load_chunk(base, signs_ptr, start, end, rotation_scale, CHUNK, LOG2_BLOCK)
        codes = to_codes(x, inverse_step, 16, MIDRISE)
        store_codes(codes_ptr, codes, row, start + tl.zeros([1], dtype=tl.int64), mask, row_bytes, 1, CHUNK)


@triton_op("la_aciq_triton::quantize_dynamic", mutates_args=())
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
    """See la_aciq.quantize_dynamic; the arguments are those of the schema in csrc/ops.cpp."""
    k = int(x.shape[-1])
    num_entries, groups = clip_factor.shape
    row_bytes = (k + 1) // 2
    flat = as_rows(x)
    rows = flat.shape[0]
    codes = torch.empty((rows, row_bytes), dtype=torch.uint8, device=x.device)
    row_clips = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    out = codes.reshape(*x.shape[:-1], row_bytes), row_clips.reshape(*x.shape[:-1], groups)
    if rows == 0:
        return out
    group = min(group_size or k, k)
    block = 0
    if signs is not None:
        block = hadamard_block(k, block_size)
        # A long group is cut into chunks, which must be whole blocks.
        fits = block <= CHUNK and group % block == 0 if group > MAX_TILE else rotation_fits(k, group, block, MAX_TILE)
        if not fits:
            flat, signs, block = rotated(flat, signs, block, torch.float32), None, 0
    ids = row_ids(language_ids, x.shape[:-1])
    arguments = (
        flat,
        clip_factor,
        clip_factor if ids.ids is None else ids.ids,
        clip_factor if signs is None else signs.contiguous(),
        codes,
        row_clips,
        rows,
        k,
        row_bytes,
        flat.stride(0),
        group,
        groups,
        clip_factor.stride(0),
        clip_factor.stride(1),
        num_entries,
        ids.inner,
        ids.period,
        rotation_scale(block),
    )
    with on_device(x):
        if group > MAX_TILE:
            wrap_triton(quantize_dynamic_long_kernel)[(rows, groups)](
                *arguments,
                CHUNK=CHUNK,
                LOG2_BLOCK=log2_block(block),
                HAS_IDS=ids.present,
                MIDRISE=codebook == "midrise",
                RMS=statistic == "rms",
                num_warps=warps(CHUNK, 16),
            )
            return out
        parameters = tuning.streaming("quantize_dynamic rotated" if block else "quantize_dynamic", flat)
        pieces = cut(rows, k, group, block=block, widest=group, **parameters)
        wrap_triton(quantize_dynamic_kernel)[pieces.grid](
            *arguments,
            PIECES=pieces.PIECES,
            WIDTH=pieces.WIDTH,
            FIT=pieces.FIT,
            LOG2_BLOCK=log2_block(block),
            HAS_IDS=ids.present,
            MIDRISE=codebook == "midrise",
            RMS=statistic == "rms",
            num_warps=pieces.warps,
        )
    return out

"""`dequantize`: packed INT4 codes to float32, bfloat16 or float16, under clips from a table or one clip per row and
group."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import tuning
from .common import (
    as_rows,
    cut,
    locate_pieces,
    mask_pieces,
    on_device,
    read_entry,
    read_table,
    row_ids,
    step_of,
)


@triton.jit
def dequantize_kernel(
    codes_ptr,  # [rows, ceil(K / 2)] uint8
    clips_ptr,  # [num_entries, groups] float32; PER_ROW: [rows, groups]
    language_ids_ptr,  # ids int32 [period]
    out_ptr,  # [rows, K]
    rows,
    K,
    codes_stride,
    group,
    width,
    per_group,
    per_row,
    clips_stride_entry,
    clips_stride_group,
    num_entries,
    inner,
    period,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    FIT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    PER_ROW: tl.constexpr,
    MIDRISE: tl.constexpr,
):
    row, group_index, start = locate_pieces(group, width, per_group, per_row, PIECES)
    mask = mask_pieces(row, group_index, start, rows, K, group, width, WIDTH, FIT)
    half = tl.arange(0, WIDTH // 2)[None, :]
    pairs = tl.load(
        codes_ptr + (row.to(tl.int64) * codes_stride + start // 2)[:, None] + half,
        mask=(row < rows)[:, None] & (2 * half < (K - start)[:, None]),
        other=0,
    )
    codes = tl.reshape(tl.join(pairs & 15, pairs >> 4), [PIECES, WIDTH])
    if PER_ROW:
        entry = row
    else:
        entry = read_entry(language_ids_ptr, row, rows, num_entries, inner, period, HAS_IDS)
    clip = read_table(clips_ptr, entry, group_index, row < rows, clips_stride_entry, clips_stride_group)
    zero: tl.constexpr = 7.5 if MIDRISE else 8.0
    values = (codes.to(tl.float32) - zero) * step_of(clip, 16)[:, None]
    at = (row.to(tl.int64) * K + start)[:, None] + tl.arange(0, WIDTH)[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton_op("la_aciq_triton::dequantize", mutates_args=())
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
    """See la_aciq.dequantize; the arguments are those of the schema in csrc/ops.cpp."""
    k = int(k)
    flat = as_rows(codes)
    rows = flat.shape[0]
    out = torch.empty((rows, k), dtype=dtype, device=codes.device)
    if rows == 0:
        return out.reshape(*codes.shape[:-1], k)
    table = as_rows(clips) if per_row else clips
    pieces = cut(rows, k, group_size, **tuning.streaming("dequantize", out))
    ids = row_ids(None if per_row else language_ids, codes.shape[:-1])
    with on_device(codes):
        wrap_triton(dequantize_kernel)[pieces.grid](
            flat,
            table,
            table if ids.ids is None else ids.ids,
            out,
            rows,
            k,
            flat.stride(0),
            pieces.group,
            pieces.width,
            pieces.per_group,
            pieces.per_row,
            table.stride(0),
            table.stride(1),
            table.shape[0],
            ids.inner,
            ids.period,
            PIECES=pieces.PIECES,
            WIDTH=pieces.WIDTH,
            FIT=pieces.FIT,
            HAS_IDS=ids.present,
            PER_ROW=per_row,
            MIDRISE=codebook == "midrise",
            num_warps=pieces.warps,
        )
    return out.reshape(*codes.shape[:-1], k)

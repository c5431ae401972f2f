"""`quantize`: INT4 codes under clips from a table, one streaming pass; optionally rotated first and with tail sums.

Reads x once in 16-byte pieces, one clip per piece, and writes packed codes: 2.5 bytes per element for 16-bit data. With
tail sums each piece leaves three numbers, and a second kernel adds them per entry and group in float64, in an order
that the shapes alone decide: no atomics, the same bits every time.
"""

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
    on_device,
    read_entry,
    read_table,
    rotation_fits,
    rotation_scale,
    row_ids,
    segments,
    store_codes,
    to_codes,
)
from .rotate import rotated

WIDEST = 1024


@triton.jit
def quantize_kernel(
    x_ptr,  # [rows, K] float32, bfloat16 or float16
    clips_ptr,  # [num_entries, groups] float32
    language_ids_ptr,  # ids int32 [period]
    signs_ptr,  # [K]
    codes_ptr,  # [rows, row_bytes] uint8
    tail_ptr,  # [rows, per_row, 3] float32
    rows,
    K,
    row_bytes,
    x_stride,
    group,
    width,
    per_group,
    per_row,
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
    MIDRISE: tl.constexpr,
    TAIL: tl.constexpr,
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
    entry = read_entry(language_ids_ptr, row, rows, num_entries, inner, period, HAS_IDS)
    clip = read_table(clips_ptr, entry, group_index, row < rows, clips_stride_entry, clips_stride_group)
    codes = to_codes(x, inverse_step_of(clip, 16)[:, None], 16, MIDRISE)
    store_codes(codes_ptr, codes, row, start, mask, row_bytes, PIECES, WIDTH)
    if TAIL:
        size = tl.abs(x)
        finite = mask & (size < float("inf"))
        beyond = finite & (size > clip[:, None])
        piece = (tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)) * 3
        tl.store(tail_ptr + piece, tl.sum(beyond.to(tl.float32), axis=1), mask=row < rows)
        tl.store(tail_ptr + piece + 1, tl.sum(tl.where(beyond, size, 0.0), axis=1), mask=row < rows)
        tl.store(tail_ptr + piece + 2, tl.sum((mask & (finite == 0)).to(tl.float32), axis=1), mask=row < rows)


@triton.jit
def add_tails_kernel(
    tail_ptr,  # [rows, groups, per_group, 3] float32
    order_ptr,  # rows in the order of their entries, int64 [rows]
    bounds_ptr,  # where each entry begins in order, int64 [num_entries + 1]
    out_ptr,  # [SHARES, num_entries, groups, 3] float64
    num_entries,
    groups,
    per_group,
    HAS_ORDER: tl.constexpr,
    SHARES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The rows of an entry are dealt to SHARES programs in turns of ROWS."""
    entry = (tl.program_id(0) // SHARES).to(tl.int64)
    share = tl.program_id(0) % SHARES
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    begin = tl.load(bounds_ptr + entry)
    end = tl.load(bounds_ptr + entry + 1)
    beyond = tl.zeros([ROWS, GROUPS], dtype=tl.float64)
    total = tl.zeros([ROWS, GROUPS], dtype=tl.float64)
    nonfinite = tl.zeros([ROWS, GROUPS], dtype=tl.float64)
    for first in range(begin + share * ROWS, end, SHARES * ROWS):
        index = first + tl.arange(0, ROWS)
        row = index
        if HAS_ORDER:
            row = tl.load(order_ptr + index, mask=index < end, other=0)
        mask = (index < end)[:, None] & (group < groups)[None, :]
        at = ((row * groups)[:, None] + group[None, :]) * per_group * 3
        for part in range(per_group):
            beyond += tl.load(tail_ptr + at + part * 3, mask=mask, other=0.0)
            total += tl.load(tail_ptr + at + part * 3 + 1, mask=mask, other=0.0)
            nonfinite += tl.load(tail_ptr + at + part * 3 + 2, mask=mask, other=0.0)
    at = (((share * num_entries + entry) * groups) + group) * 3
    tl.store(out_ptr + at, tl.sum(beyond, axis=0), mask=group < groups)
    tl.store(out_ptr + at + 1, tl.sum(total, axis=0), mask=group < groups)
    tl.store(out_ptr + at + 2, tl.sum(nonfinite, axis=0), mask=group < groups)


def add_tails(tail: Tensor, ids: RowIds, num_entries: int, k: int, group: int) -> Tensor:
    """float64 [num_entries, groups, 4] of the pieces' sums [rows, groups, per_group, 3]; counts the finite elements
    too."""
    rows, groups, per_group = tail.shape[0], tail.shape[1], tail.shape[2]
    order, bounds = segments(ids, rows, num_entries, tail.device)
    shares = min(max(rows // 256, 1), max(256 // num_entries, 1))
    sums = torch.empty((shares, num_entries, groups, 3), dtype=torch.float64, device=tail.device)
    wrap_triton(add_tails_kernel)[(num_entries * shares, triton.cdiv(groups, 32))](
        tail,
        bounds if order is None else order,
        bounds,
        sums,
        num_entries,
        groups,
        per_group,
        HAS_ORDER=order is not None,
        SHARES=shares,
        ROWS=16,
        GROUPS=32,
        num_warps=4,
    )
    beyond, total, nonfinite = sums.sum(0).unbind(-1)
    edges = (torch.arange(groups + 1, device=tail.device) * group).clamp(max=k)
    elements = bounds.diff().unsqueeze(1) * edges.diff()
    return torch.stack([elements - nonfinite, beyond, total, nonfinite], dim=-1)


@triton_op("la_aciq_triton::quantize", mutates_args=())
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
    """See la_aciq.quantize; the arguments are those of the schema in csrc/ops.cpp."""
    k = int(x.shape[-1])
    num_entries, groups = clips.shape
    row_bytes = (k + 1) // 2
    flat = as_rows(x)
    rows = flat.shape[0]
    codes = torch.empty((rows, row_bytes), dtype=torch.uint8, device=x.device)
    out = codes.reshape(*x.shape[:-1], row_bytes)
    if rows == 0:
        return out, torch.zeros((num_entries if tail_sums else 0, groups, 4), dtype=torch.float64, device=x.device)
    block = 0
    if signs is not None:
        block = hadamard_block(k, block_size)
        if not rotation_fits(k, group_size, block, max(WIDEST, min(block, MAX_TILE))):
            flat, signs, block = rotated(flat, signs, block, torch.float32), None, 0
    parameters = tuning.streaming("quantize rotated" if block else "quantize", flat)
    pieces = cut(rows, k, group_size, block=block, widest=WIDEST, **parameters)
    ids = row_ids(language_ids, x.shape[:-1])
    tail = torch.empty((rows, groups, pieces.per_group, 3) if tail_sums else (0,), dtype=torch.float32, device=x.device)
    with on_device(x):
        wrap_triton(quantize_kernel)[pieces.grid](
            flat,
            clips,
            clips if ids.ids is None else ids.ids,
            clips if signs is None else signs.contiguous(),
            codes,
            tail,
            rows,
            k,
            row_bytes,
            flat.stride(0),
            pieces.group,
            pieces.width,
            pieces.per_group,
            pieces.per_row,
            clips.stride(0),
            clips.stride(1),
            num_entries,
            ids.inner,
            ids.period,
            rotation_scale(block),
            PIECES=pieces.PIECES,
            WIDTH=pieces.WIDTH,
            FIT=pieces.FIT,
            LOG2_BLOCK=log2_block(block),
            HAS_IDS=ids.present,
            MIDRISE=codebook == "midrise",
            TAIL=tail_sums,
            num_warps=pieces.warps,
        )
        if tail_sums:
            return out, add_tails(tail, ids, num_entries, k, pieces.group)
    return out, torch.empty((0, groups, 4), dtype=torch.float64, device=x.device)

"""`rotate`: the randomized block Hadamard transform y = H_b (signs * x) / sqrt(b) along rows, by itself.

One pass for blocks up to 16384 elements, which a program holds on chip. Larger blocks are H_(b1 b2) = H_b1 (x) H_b2:
a second pass over a float32 intermediate transforms across runs of 16384.
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
    load_pieces,
    log2_block,
    on_device,
    rotation_scale,
    warps,
)
from .tuning import TILE


@triton.jit
def rotate_kernel(
    x_ptr,  # [rows, K] float32, bfloat16 or float16
    signs_ptr,  # [K] float32 or int8
    y_ptr,  # [rows, K]
    rows,
    K,
    x_stride,
    group,
    width,
    per_group,
    per_row,
    scale,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    FIT: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
):
    y, row, _, start, mask = load_pieces(
        x_ptr, signs_ptr, rows, K, x_stride, group, width, per_group, per_row, scale, PIECES, WIDTH, FIT, LOG2_BLOCK
    )
    at = (row.to(tl.int64) * K + start)[:, None] + tl.arange(0, WIDTH)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate_across_kernel(
    x_ptr,  # [blocks, 2^LOG2_RUNS, run] float32, contiguous
    y_ptr,
    run,
    LANES: tl.constexpr,
    LOG2_RUNS: tl.constexpr,
):
    """H along the middle axis. LANES divides run, so a program lies within one block."""
    lane = tl.program_id(0).to(tl.int64) * LANES
    block = lane // run
    runs: tl.constexpr = 1 << LOG2_RUNS
    first = block * runs * run + (lane - block * run)
    at = first + tl.arange(0, LANES)[:, None] + tl.arange(0, runs)[None, :].to(tl.int64) * run
    tl.store(y_ptr + at, hadamard(tl.load(x_ptr + at), LOG2_RUNS).to(y_ptr.dtype.element_ty))


def rotated(x: Tensor, signs: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """rotate(x, signs, block) of x [rows, K] in any of the dtypes; what other kernels run first where they cannot
    rotate on chip."""
    rows, k = x.shape[0], int(x.shape[1])
    y = torch.empty((rows, k), dtype=dtype, device=x.device)
    if rows == 0:
        return y
    run = min(block, MAX_TILE)
    pieces = cut(rows, k, 0, block=run, **tuning.streaming("rotate", x))
    first_pass = y if run == block else torch.empty((rows, k), dtype=torch.float32, device=x.device)
    with on_device(x):
        wrap_triton(rotate_kernel)[pieces.grid](
            x,
            signs.contiguous(),
            first_pass,
            rows,
            k,
            x.stride(0),
            pieces.group,
            pieces.width,
            pieces.per_group,
            pieces.per_row,
            rotation_scale(block),
            PIECES=pieces.PIECES,
            WIDTH=pieces.WIDTH,
            FIT=pieces.FIT,
            LOG2_BLOCK=log2_block(run),
            num_warps=pieces.warps,
        )
        if run != block:
            runs = block // run
            lanes = max(2, TILE // runs)
            wrap_triton(rotate_across_kernel)[(rows * (k // runs) // lanes,)](
                first_pass,
                y,
                run,
                LANES=lanes,
                LOG2_RUNS=runs.bit_length() - 1,
                num_warps=warps(lanes * runs),
            )
    return y


@triton_op("la_aciq_triton::rotate", mutates_args=())
def rotate(x: Tensor, signs: Tensor, block_size: int = 0) -> Tensor:
    """See la_aciq.rotate."""
    block = hadamard_block(int(x.shape[-1]), block_size)
    return rotated(as_rows(x), signs, block, x.dtype).reshape(x.shape)

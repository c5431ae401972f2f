"""`moments`: count, mean, central moments, extremes per entry, and a log-linear histogram of |x|, in one read of x.

Level 1 cuts x into pieces of one entry each and leaves a state per piece: deviations from the piece's own mean,
scaled by a power of two so that no finite input overflows or vanishes, summed in float32 over at most 4096 elements
(float64 for float64 data). Level 2 merges the states of an entry in float64 around their common mean, in two rounds
when there are many. The order of every sum follows from shapes and ids alone: no floating-point atomics, the same bits
every time. The histogram is made of integers, for which atomics give the same sums in any order.

A run of rows with one id is one span of memory where x is contiguous, so ids of shape [batch] cost nothing per token.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import tuning
from .common import (
    RowIds,
    as_rows,
    cut,
    locate_pieces,
    mask_pieces,
    on_device,
    power_of_two_below,
    read_entry,
    row_ids,
    segments,
)

STATE_SIZE = 8
HISTOGRAM_BINS = 258
LANES = 128


@triton.jit
def moments_kernel(
    x_ptr,  # [spans, length] float32, bfloat16, float16 or float64
    language_ids_ptr,  # ids int32 [period]
    states_ptr,  # [8, pieces] float64
    histogram_ptr,  # [REPLICAS, num_entries, 258, 2] int64, zeros
    spans,
    length,
    x_stride,
    width,
    per_span,
    pieces,
    num_entries,
    inner,
    period,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    FIT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    REPLICAS: tl.constexpr,
):
    span, group, start = locate_pieces(length, width, per_span, per_span, PIECES)
    mask = mask_pieces(span, group, start, spans, length, length, width, WIDTH, FIT)
    at = (span.to(tl.int64) * x_stride + start)[:, None] + tl.arange(0, WIDTH)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    finite = mask & (tl.abs(x) < float("inf"))
    x = tl.where(finite, x, 0.0)
    count = tl.sum(finite.to(tl.int32), axis=1).to(tl.float64)
    low = tl.min(tl.where(finite, x, float("inf")), axis=1)
    high = tl.max(tl.where(finite, x, float("-inf")), axis=1)

    divisor = tl.maximum(count, 1.0)
    if x.dtype == tl.float64:
        unit = tl.full([PIECES], 1.0, tl.float64)
        relative = x
    else:
        power, inverse = power_of_two_below(tl.max(tl.abs(x), axis=1))
        unit = power.to(tl.float64)
        relative = x * inverse[:, None]
    about = tl.sum(relative, axis=1) / divisor.to(x.dtype)
    deviation = tl.where(finite, relative - about[:, None], 0.0)
    square = deviation * deviation
    # `about` is rounded: the mean of the deviations says by how much, and the moments move to the mean itself.
    shift = tl.sum(deviation, axis=1).to(tl.float64) / divisor
    s2 = tl.sum(square, axis=1).to(tl.float64)
    s3 = tl.sum(square * deviation, axis=1).to(tl.float64)
    s4 = tl.sum(square * square, axis=1).to(tl.float64)
    m2 = s2 - count * shift * shift
    m3 = s3 - 3 * shift * s2 + 2 * count * shift * shift * shift
    m4 = s4 - 4 * shift * s3 + 6 * shift * shift * s2 - 3 * count * shift * shift * shift * shift

    piece = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    exists = piece < pieces
    tl.store(states_ptr + piece, count, mask=exists)
    tl.store(states_ptr + pieces + piece, (about.to(tl.float64) + shift) * unit, mask=exists)
    tl.store(states_ptr + 2 * pieces + piece, tl.maximum(m2, 0.0) * unit * unit, mask=exists)
    tl.store(states_ptr + 3 * pieces + piece, m3 * unit * unit * unit, mask=exists)
    tl.store(states_ptr + 4 * pieces + piece, tl.maximum(m4, 0.0) * (unit * unit) * (unit * unit), mask=exists)
    tl.store(states_ptr + 5 * pieces + piece, low.to(tl.float64), mask=exists)
    tl.store(states_ptr + 6 * pieces + piece, high.to(tl.float64), mask=exists)
    tl.store(states_ptr + 7 * pieces + piece, tl.sum(mask.to(tl.int32), axis=1).to(tl.float64) - count, mask=exists)

    if HISTOGRAM:
        # Read off the bits of float32: 3 bits of mantissa below the exponent number the bins: see
        # la_aciq.ops.streaming.
        size = tl.minimum(tl.abs(x), 3.4028234663852886e38).to(tl.float32)
        bits = size.to(tl.int32, bitcast=True)
        bins = tl.minimum(tl.maximum((bits >> 20) - ((111 << 3) - 1), 0), 257)
        low_bits = tl.where((bins > 0) & (bins < 257), bits & 0xFFFFF, 0)
        entry = read_entry(language_ids_ptr, span, spans, num_entries, inner, period, HAS_IDS)
        replica = tl.program_id(0) % REPLICAS
        slot = ((replica * num_entries + entry).to(tl.int64)[:, None] * 258 + bins) * 2
        tl.atomic_add(histogram_ptr + slot, tl.full([PIECES, WIDTH], 1, tl.int64), mask=finite, sem="relaxed")
        tl.atomic_add(histogram_ptr + slot + 1, low_bits.to(tl.int64), mask=finite & (low_bits > 0), sem="relaxed")


@triton.jit
def merge_kernel(
    states_ptr,  # [8, pieces] float64
    order_ptr,  # spans in the order of their entries, int64 [spans]
    bounds_ptr,  # where each entry begins there, int64 [num_entries + 1]
    out_ptr,  # [8, num_entries, SHARES] float64
    pieces,
    per_span,
    plane,  # num_entries * SHARES
    HAS_ORDER: tl.constexpr,
    SHARES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The states of an entry are dealt to SHARES programs in turns of LANES."""
    entry = (tl.program_id(0) // SHARES).to(tl.int64)
    share = tl.program_id(0) % SHARES
    begin = tl.load(bounds_ptr + entry) * per_span
    end = tl.load(bounds_ptr + entry + 1) * per_span
    step = SHARES * LANES

    count = tl.zeros([LANES], dtype=tl.float64)
    total = tl.zeros([LANES], dtype=tl.float64)
    low = tl.full([LANES], float("inf"), tl.float64)
    high = tl.full([LANES], float("-inf"), tl.float64)
    nonfinite = tl.zeros([LANES], dtype=tl.float64)
    for first in range(begin + share * LANES, end, step):
        mask, at = locate_states(states_ptr, order_ptr, first, end, per_span, HAS_ORDER, LANES)
        n = tl.load(at, mask=mask, other=0.0)
        count += n
        total += n * tl.load(at + pieces, mask=mask, other=0.0)
        low = tl.minimum(low, tl.load(at + 5 * pieces, mask=mask, other=float("inf")))
        high = tl.maximum(high, tl.load(at + 6 * pieces, mask=mask, other=float("-inf")))
        nonfinite += tl.load(at + 7 * pieces, mask=mask, other=0.0)
    everything = tl.sum(count, axis=0)
    divisor = tl.maximum(everything, 1.0)
    mean = tl.sum(total, axis=0) / divisor

    residual = tl.zeros([LANES], dtype=tl.float64)
    m2 = tl.zeros([LANES], dtype=tl.float64)
    m3 = tl.zeros([LANES], dtype=tl.float64)
    m4 = tl.zeros([LANES], dtype=tl.float64)
    for first in range(begin + share * LANES, end, step):
        mask, at = locate_states(states_ptr, order_ptr, first, end, per_span, HAS_ORDER, LANES)
        n = tl.load(at, mask=mask, other=0.0)
        d = tl.where(n > 0, tl.load(at + pieces, mask=mask, other=0.0) - mean, 0.0)
        a2 = tl.load(at + 2 * pieces, mask=mask, other=0.0)
        a3 = tl.load(at + 3 * pieces, mask=mask, other=0.0)
        residual += n * d
        m2 += a2 + n * d * d
        m3 += a3 + 3 * d * a2 + n * d * d * d
        m4 += tl.load(at + 4 * pieces, mask=mask, other=0.0) + 4 * d * a3 + 6 * d * d * a2 + n * d * d * d * d

    out = out_ptr + entry * SHARES + share
    tl.store(out, everything)
    tl.store(out + plane, mean + tl.sum(residual, axis=0) / divisor)
    tl.store(out + 2 * plane, tl.sum(m2, axis=0))
    tl.store(out + 3 * plane, tl.sum(m3, axis=0))
    tl.store(out + 4 * plane, tl.sum(m4, axis=0))
    tl.store(out + 5 * plane, tl.min(low, axis=0))
    tl.store(out + 6 * plane, tl.max(high, axis=0))
    tl.store(out + 7 * plane, tl.sum(nonfinite, axis=0))


@triton.jit
def locate_states(states_ptr, order_ptr, first, end, per_span, HAS_ORDER: tl.constexpr, LANES: tl.constexpr):
    index = first + tl.arange(0, LANES)
    mask = index < end
    if HAS_ORDER:
        span = tl.load(order_ptr + index // per_span, mask=mask, other=0)
        index = span * per_span + index % per_span
    return mask, states_ptr + index


def merge(states: Tensor, ids: RowIds, spans: int, per_span: int, num_entries: int) -> Tensor:
    """float64 [num_entries, 8] of the states of pieces, float64 [8, spans * per_span]."""
    pieces = spans * per_span
    order, bounds = segments(ids, spans, num_entries, states.device)
    shares = min(max(pieces // 1024, 1), max(1024 // num_entries, 1))
    while True:
        out = torch.empty((STATE_SIZE, num_entries, shares), dtype=torch.float64, device=states.device)
        wrap_triton(merge_kernel)[(num_entries * shares,)](
            states,
            bounds if order is None else order,
            bounds,
            out,
            pieces,
            per_span,
            num_entries * shares,
            HAS_ORDER=order is not None,
            SHARES=shares,
            LANES=LANES,
            num_warps=4,
        )
        if shares == 1:
            return out.reshape(STATE_SIZE, num_entries).t().contiguous()
        states, order, pieces, per_span = out, None, num_entries * shares, shares
        bounds, shares = torch.arange(num_entries + 1, device=states.device), 1


@triton_op("la_aciq_triton::moments", mutates_args=())
def moments(
    x: Tensor, language_ids: Tensor | None = None, num_entries: int = 1, histogram: bool = False
) -> tuple[Tensor, Tensor]:
    """See la_aciq.ops.moments_state; the arguments are those of the schema in csrc/ops.cpp."""
    lead = x.shape[:-1]
    bins = HISTOGRAM_BINS if histogram else 0
    counts = torch.zeros((num_entries, bins, 2), dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        state = torch.zeros((num_entries, STATE_SIZE), dtype=torch.float64, device=x.device)
        state[:, 5] = math.inf
        state[:, 6] = -math.inf
        return state, counts
    flat = as_rows(x if x.dim() else x.reshape(1))
    ids = row_ids(language_ids, lead)
    spans, length = flat.shape[0], flat.shape[1]
    if flat.is_contiguous():
        # Rows that share an id lie side by side.
        run = ids.inner if ids.present else spans
        flat = flat.reshape(spans // run, run * length)
        ids = RowIds(ids.ids, 1, ids.period)
        spans, length = flat.shape[0], flat.shape[1]
    # The atomics of the histogram hold an address per element in registers.
    parameters = {"tile": 1024} if histogram else tuning.streaming("moments", flat)
    pieces = cut(spans, length, 0, widest=parameters["tile"], **parameters)
    states = torch.empty((STATE_SIZE, spans * pieces.per_row), dtype=torch.float64, device=x.device)
    replicas = max(1, min(64, 256 // num_entries)) if histogram else 1
    parts = torch.zeros((replicas, num_entries, bins, 2), dtype=torch.int64, device=x.device)
    with on_device(x):
        wrap_triton(moments_kernel)[pieces.grid](
            flat,
            states if ids.ids is None else ids.ids,
            states,
            parts,
            spans,
            length,
            flat.stride(0),
            pieces.width,
            pieces.per_row,
            spans * pieces.per_row,
            num_entries,
            ids.inner,
            ids.period,
            PIECES=pieces.PIECES,
            WIDTH=pieces.WIDTH,
            FIT=pieces.FIT,
            HAS_IDS=ids.present,
            HISTOGRAM=histogram,
            REPLICAS=replicas,
            num_warps=pieces.warps,
        )
        return merge(states, ids, spans, pieces.per_row, num_entries), parts.sum(0) if histogram else counts

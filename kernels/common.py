"""What the Triton kernels share: how rows are cut into pieces, the codebook, the rotation, and the host side of a
launch.

**Pieces.** Every kernel but `linear` sees its input as a [rows, K] matrix whose rows may be any number of elements
apart. A row consists of groups of `group` elements (the last may be short), and a group of pieces of `width` elements.
A program takes a fixed number of consecutive pieces as a [PIECES, WIDTH] tile, WIDTH the next power of two, and masks
what is padding. So a clip is read once per piece, a statistic of a group is a reduction along an axis of the tile, and
group sizes that are no power of two, short last groups and odd K need no kernel of their own. Offsets into tensors are
64-bit.

**Language ids.** Row r of the matrix reads entry (r // inner) % period of the ids, which covers ids of shape [batch],
[batch, tokens] and [1, tokens] for x [batch, tokens, K] without expanding them in memory. Ids out of range read entry
0.

**Arithmetic.** Values are float32 on chip, and a code is made with the float32 reciprocal of the step (float64 where
the state of `moments` needs it). The rotation is a fast Walsh-Hadamard transform on the tile in float32.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import TILE

# The widest tile a program holds without spilling registers, also the largest Hadamard block transformed within one.
MAX_TILE = 16384

# --- On the device ----------------------------------------------------------------------------------------------------


@triton.jit
def locate_pieces(group, width, per_group, per_row, PIECES: tl.constexpr):
    """The pieces of this program: row int32, group within the row int32, first column int64, each [PIECES]."""
    first = tl.program_id(0).to(tl.int64) * PIECES
    first_row = first // per_row
    local = (first - first_row * per_row).to(tl.int32) + tl.arange(0, PIECES)
    row = first_row.to(tl.int32) + local // per_row
    piece = local % per_row
    group_index = piece // per_group
    start = group_index.to(tl.int64) * group + (piece % per_group).to(tl.int64) * width
    return row, group_index, start


@triton.jit
def mask_pieces(row, group_index, start, rows, K, group, width, WIDTH: tl.constexpr, FIT: tl.constexpr):
    """Which elements of a [PIECES, WIDTH] tile exist. FIT: see Pieces."""
    offset = tl.arange(0, WIDTH)[None, :]
    if FIT == 2:
        mask = tl.full([row.shape[0], WIDTH], True, tl.int1)
    else:
        mask = (row < rows)[:, None] & (offset < (K - start)[:, None])
    if FIT == 0:
        left = tl.minimum((group_index + 1).to(tl.int64) * group - start, width)
        mask = mask & (offset < left[:, None])
    return mask


@triton.jit
def butterfly(x, HALF: tl.constexpr):
    """One stage of the transform on a vector: (a, b) -> (a + b, a - b) for elements HALF apart."""
    pairs = tl.permute(tl.reshape(x, [x.numel // (2 * HALF), 2, HALF]), [0, 2, 1])
    first, second = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(first + second, first - second), [0, 2, 1]), [x.numel])


@triton.jit
def hadamard(x, LOG2_BLOCK: tl.constexpr):
    """H_b on each run of b = 2^LOG2_BLOCK elements of a tile in row-major order, unscaled, in Sylvester's order."""
    y = tl.reshape(x, [x.numel])
    for stage in tl.static_range(LOG2_BLOCK):
        y = butterfly(y, 1 << stage)
    return tl.reshape(y, x.shape)


@triton.jit
def load_pieces(
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
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    FIT: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
):
    """This program's tile of x as float32, rotated unless LOG2_BLOCK is negative, and where it lies."""
    row, group_index, start = locate_pieces(group, width, per_group, per_row, PIECES)
    mask = mask_pieces(row, group_index, start, rows, K, group, width, WIDTH, FIT)
    offset = tl.arange(0, WIDTH)[None, :]
    x = tl.load(x_ptr + (row.to(tl.int64) * x_stride + start)[:, None] + offset, mask=mask, other=0.0).to(tl.float32)
    if LOG2_BLOCK >= 0:
        signs = tl.load(signs_ptr + start[:, None] + offset, mask=mask, other=0).to(tl.float32)
        # Scaled before the sums, so that they overflow no earlier than the result does.
        x = hadamard(x * (signs * rotation_scale), LOG2_BLOCK)
    return x, row, group_index, start, mask


@triton.jit
def read_entry(language_ids_ptr, row, rows, num_entries, inner, period, HAS_IDS: tl.constexpr):
    """The entry of the table that each row of x reads, int32."""
    entry = tl.zeros_like(row)
    if HAS_IDS:
        ids = tl.load(language_ids_ptr + (row // inner) % period, mask=row < rows, other=0)
        entry = tl.where((ids >= 0) & (ids < num_entries), ids, 0).to(tl.int32)
    return entry


@triton.jit
def read_table(table_ptr, entry, group_index, mask, stride_entry, stride_group):
    return tl.load(
        table_ptr + entry.to(tl.int64) * stride_entry + group_index.to(tl.int64) * stride_group,
        mask=mask,
        other=0.0,
    )


@triton.jit
def is_valid_clip(clip):
    return (clip > 0) & (clip < float("inf"))


@triton.jit
def step_of(clip, LEVELS: tl.constexpr):
    """Delta of a clip; 0 for one that is not finite and positive."""
    return tl.where(is_valid_clip(clip), clip * (2.0 / (LEVELS - 1)), 0.0)


@triton.jit
def inverse_step_of(clip, LEVELS: tl.constexpr):
    valid = is_valid_clip(clip)
    return tl.where(valid, ((LEVELS - 1) / 2.0) / tl.where(valid, clip, 1.0), 0.0)


@triton.jit
def to_codes(x, inverse_step, LEVELS: tl.constexpr, MIDRISE: tl.constexpr):
    """int32 codes 0 .. LEVELS - 1. NaN takes LEVELS / 2, as does everything under a clip that is not finite and
    positive."""
    half: tl.constexpr = LEVELS // 2
    scaled = x * inverse_step
    clamped = tl.minimum(tl.maximum(scaled, -half), half)
    if MIDRISE:
        rounded = tl.floor(clamped)
    else:
        # 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded to the nearest integer, ties to even.
        rounded = (clamped + 12582912.0) - 12582912.0
    rounded = tl.where(scaled == scaled, rounded, 0.0)
    return tl.minimum(rounded.to(tl.int32) + half, LEVELS - 1)


@triton.jit
def split_pairs(tile, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    """The even and the odd columns of a [PIECES, WIDTH] tile."""
    return tl.split(tl.reshape(tile, [PIECES, WIDTH // 2, 2]))


@triton.jit
def store_codes(codes_ptr, codes, row, start, mask, row_bytes, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    """Packs int32 codes two to a byte. A byte is written where its low nibble exists; a missing high nibble is 0."""
    low, high = split_pairs(tl.where(mask, codes, 0), PIECES, WIDTH)
    exists, _ = split_pairs(mask.to(tl.int8), PIECES, WIDTH)
    at = (row.to(tl.int64) * row_bytes + start // 2)[:, None] + tl.arange(0, WIDTH // 2)[None, :]
    tl.store(codes_ptr + at, (low | (high << 4)).to(tl.uint8), mask=exists != 0)


@triton.jit
def power_of_two_below(x):
    """The largest normal power of two up to x >= 0, and its inverse, both exact float32 (2^-126 for less)."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 1 << 23), 253 << 23)
    return exponent.to(tl.float32, bitcast=True), ((254 << 23) - exponent).to(tl.float32, bitcast=True)


# --- On the host ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """How [rows, k] is cut; the field names are those of the kernels' arguments.

    FIT says how much a kernel must mask. 2: nothing, tiles cover the matrix exactly. 1: pieces are as wide as the tile
    and end where their groups do, so rows and columns beyond the matrix. 0: what lies beyond the piece and its group,
    too.
    """

    rows: int
    group: int
    width: int
    per_group: int
    per_row: int
    PIECES: int
    WIDTH: int
    FIT: int
    warps: int

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(self.rows * self.per_row, self.PIECES),)


def warps(elements: int, per_thread: int = 32) -> int:
    """Warps for a tile, up to 16."""
    return min(max(elements // (32 * per_thread), 1), 16)


def cut(
    rows: int,
    k: int,
    group_size: int,
    *,
    block: int = 0,
    widest: int = 1024,
    tile: int = TILE,
    per_thread: int = 32,
) -> Pieces:
    """Cuts [rows, k] into pieces of at most `widest` elements, or `block`, the Hadamard block that must fit in a tile
    (0: none). tile and per_thread: see tuning."""
    if rows >= 2**31:
        raise ValueError(f"x: expected fewer than 2^31 rows, got {rows}")
    group = min(group_size or k, k)
    groups = triton.cdiv(k, group)
    width = min(group, triton.next_power_of_2(max(widest, block)))
    per_group = triton.cdiv(group, width)
    per_row = groups * per_group
    padded = max(2, triton.next_power_of_2(width))
    aligned = padded == width and (group % width == 0 or groups == 1)
    # Addresses of misaligned pieces take a register pair per element.
    pieces = max(1, max(tile if aligned else tile // 4, block) // padded)
    return Pieces(
        rows=rows,
        group=group,
        width=width,
        per_group=per_group,
        per_row=per_row,
        PIECES=pieces,
        WIDTH=padded,
        FIT=2 if aligned and k % width == 0 and rows * per_row % pieces == 0 else int(aligned),
        warps=warps(pieces * padded, per_thread),
    )


def rotation_fits(k: int, group_size: int, block: int, widest: int) -> bool:
    """Whether the tiles of `cut` consist of whole Hadamard blocks, so that a kernel can rotate what it loads."""
    group = min(group_size or k, k)
    if block > MAX_TILE or (group > widest and group % block):
        return False
    return group % block == 0 or (block % group == 0 and group & (group - 1) == 0)


def hadamard_block(k: int, block_size: int) -> int:
    return block_size or (k & -k)


def log2_block(block: int) -> int:
    """What the kernels take for a block: -1 for 0, no rotation."""
    return block.bit_length() - 1


def rotation_scale(block: int) -> float:
    return 1.0 / math.sqrt(max(block, 1))


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as [rows, K] with unit stride along K; a view wherever the strides allow one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


@dataclass(frozen=True)
class RowIds:
    """Language ids as the kernels read them: row r reads ids[(r // inner) % period]."""

    ids: Tensor | None
    inner: int = 1
    period: int = 1

    @property
    def present(self) -> bool:
        return self.ids is not None

    def expanded(self, rows: int) -> Tensor:
        """int32 [rows]; only where `present`."""
        assert self.ids is not None
        repeated = self.ids.reshape(-1, 1).expand(-1, self.inner).reshape(-1)
        return repeated.expand(rows // repeated.shape[0], -1).reshape(-1)


def row_ids(language_ids: Tensor | None, lead: torch.Size) -> RowIds:
    """Ids that match the leading dimensions from the left, dimensions of 1 included."""
    if language_ids is None:
        return RowIds(None)
    shape = [*language_ids.shape, *[1] * (len(lead) - language_ids.dim())]
    last = max((i for i, n in enumerate(shape) if n != 1), default=-1)
    first = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    if shape[first : last + 1] != list(lead[first : last + 1]):
        # A dimension of 1 between others: the pattern has no single period.
        language_ids = language_ids.reshape(shape).expand([*shape[:first], *lead[first : last + 1], *shape[last + 1 :]])
    ids = language_ids.reshape(-1)
    return RowIds(ids, inner=math.prod(lead[last + 1 :]), period=ids.shape[0])


def segments(ids: RowIds, rows: int, num_entries: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Rows sorted by entry, without reading the data on the host.

    Returns the rows in the order of their entries, int64 [rows] (None: they are in order already), and where each entry
    begins there, int64 [num_entries + 1]. The sort is stable.
    """
    if not ids.present:
        return None, torch.arange(num_entries + 1, device=device).clamp(max=1) * rows
    expanded = ids.expanded(rows)
    valid = torch.where((expanded >= 0) & (expanded < num_entries), expanded, 0)
    ordered, order = torch.sort(valid, stable=True)
    bounds = torch.arange(num_entries + 1, device=device, dtype=ordered.dtype)
    return order, torch.searchsorted(ordered, bounds)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device and its current stream; this makes the device that of x."""
    return torch.cuda.device(x.device) if x.is_cuda and torch.cuda.is_available() else nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; 132, an H100's, where the kernels are only compiled or interpreted."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132

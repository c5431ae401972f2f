// Rows in the order of their entries (SortedRows in kernels.h), and the slots of partial results along them.
//
// Sums over the rows of an entry are taken in two steps that no timing can reorder. The sorted rows are cut
// in tiles; whoever works on a tile leaves a partial result in slot tile + entry wherever the entry
// changes and where the tile ends. Along the sorted rows neither number decreases and one of them grows from
// each run to the next, so no two runs share a slot; the partial results of an entry are in the slots of
// the tiles its rows reach, and a second kernel adds those up in order.
#pragma once

#include "cuda/device.cuh"

namespace la_aciq::cuda {

__device__ __forceinline__ int32_t entry_at(const SortedRows& sorted, int64_t position) {
  return sorted.sorted == nullptr ? 0 : __ldg(sorted.sorted + position / sorted.span);
}

__device__ __forceinline__ int64_t row_at(const SortedRows& sorted, int64_t position) {
  if (sorted.order == nullptr) return position;
  const int64_t span = position / sorted.span;
  return __ldg(sorted.order + span) * sorted.span + (position - span * sorted.span);
}

// The first of `positions` sorted positions whose entry is at least `entry`.
__device__ __forceinline__ int64_t first_position(const SortedRows& sorted, int64_t positions,
                                                  int64_t entry) {
  if (sorted.sorted == nullptr) return entry <= 0 ? 0 : positions;
  int64_t low = 0, high = sorted.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (__ldg(sorted.sorted + middle) < entry) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low * sorted.span;
}

}  // namespace la_aciq::cuda

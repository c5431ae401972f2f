// Rows in order of language (SortedRows in kernels.h), and the slots of partial results along them.
//
// Sums over the rows of a language are taken in two steps that no timing can reorder. The sorted rows are cut
// in tiles; whoever works on a tile leaves a partial result in slot tile + language wherever the language
// changes and where the tile ends. Along the sorted rows neither number decreases and one of them grows from
// each run to the next, so no two runs share a slot; the partial results of a language are in the slots of
// the tiles its rows reach, and a second kernel adds those up in order.
#pragma once

#include "cuda/device.cuh"

namespace la_aciq::cuda {

__device__ __forceinline__ int32_t language_at(const SortedRows& sorted, int64_t position) {
  return sorted.sorted == nullptr ? 0 : __ldg(sorted.sorted + position / sorted.span);
}

__device__ __forceinline__ int64_t row_at(const SortedRows& sorted, int64_t position) {
  if (sorted.order == nullptr) return position;
  const int64_t entry = position / sorted.span;
  return __ldg(sorted.order + entry) * sorted.span + (position - entry * sorted.span);
}

// The first of `positions` sorted positions whose language is at least `language`.
__device__ __forceinline__ int64_t first_position(const SortedRows& sorted, int64_t positions,
                                                  int64_t language) {
  if (sorted.sorted == nullptr) return language <= 0 ? 0 : positions;
  int64_t low = 0, high = sorted.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (__ldg(sorted.sorted + middle) < language) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low * sorted.span;
}

}  // namespace la_aciq::cuda

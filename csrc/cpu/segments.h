// Where the groups of activations and of weights meet. Not in kernels.h, which files of every instruction set
// include.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace la_aciq::cpu {

// The intersections of the groups of activations and weights along K, none longer than `longest`.
inline std::vector<Segment> segments_of(int64_t k, int64_t activation_group_size, int64_t weight_group_size,
                                        int64_t longest) {
  std::vector<Segment> segments;
  for (int64_t start = 0, offset = 0; start < k; start += segments.back().length) {
    const int64_t group = start / activation_group_size, weight_group = start / weight_group_size;
    const int64_t end = std::min(
        {k, (group + 1) * activation_group_size, (weight_group + 1) * weight_group_size, start + longest});
    segments.push_back({start, end - start, group, weight_group, offset});
    offset += segments.back().padded();
  }
  return segments;
}

}  // namespace la_aciq::cpu

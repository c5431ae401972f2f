// Where the groups of activations and of weights meet. Not in kernels.h, which files of every instruction set
// include.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels/kernels.h"

namespace la_aciq::cpu {

// The intersections of the groups of activations and weights along K. A tile has at most tile_members of
// them, and no segment is longer.
inline std::vector<Segment> segments_of(int64_t k, int64_t activation_group_size, int64_t weight_group_size,
                                        int64_t tile_members) {
  std::vector<Segment> segments;
  segments.reserve(k / std::min({activation_group_size, weight_group_size, tile_members}) + 2);
  int64_t tile = 0;  // where it begins
  for (int64_t start = 0, offset = 0, group = 0, weight_group = 0; start < k;) {
    const int64_t group_end = (group + 1) * activation_group_size,
                  weight_group_end = (weight_group + 1) * weight_group_size,
                  end = std::min({k, group_end, weight_group_end, start + tile_members});
    Segment segment{start, end - start, group, weight_group, offset, end == k, end == k || end == group_end};
    offset += segment.padded();
    if (offset - tile > tile_members) {
      segments.back().last_of_tile = segments.back().last_of_group = true;
      tile = segment.offset;
    }
    segments.push_back(segment);
    start = end;
    group += end == group_end;
    weight_group += end == weight_group_end;
  }
  return segments;
}

}  // namespace la_aciq::cpu

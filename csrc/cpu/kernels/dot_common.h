// Inner products of codes.
//
// With z twice the position of zero among the codes a of the activations, and w the weights,
//     sum (2 a - z) w = sum a 2w - z sum w.
// a 2w has 8 unsigned by 8 signed bits, which is what the hardware multiplies; z sum w, exact because 2w is
// even, starts the sums. Nothing is rounded before a group's clips are multiplied with.
#pragma once

#include "cpu/kernels/common.h"

namespace la_aciq::cpu {
namespace {

// Twice the levels of weights, in steps: 4 code - 30 (mid-rise) or 4 code - 32.
inline ByteTable twice_levels(Codebook codebook) {
  int8_t entries[16];
  for (int code = 0; code < 16; code++) {
    entries[code] = static_cast<int8_t>(4 * code - (codebook == Codebook::kMidrise ? 30 : 32));
  }
  return byte_table(entries);
}

// Of clips, as csrc/common has it for one.
inline F32 clip_or_zero(F32 clip) { return keep(both(greater(clip, f32(0)), finite(clip)), clip); }

inline F32 zeros(F32) { return f32(0); }
inline I32 zeros(I32) { return to_int(f32(0)); }

}  // namespace
}  // namespace la_aciq::cpu

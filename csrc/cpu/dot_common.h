// Inner products of codes.
//
// With z twice the position of zero among the codes a of the activations, and w the weights,
//     sum (2 a - z) w = sum a 2w - z sum w.
// a 2w has 8 unsigned by 8 signed bits, which is what the hardware multiplies; z sum w, exact because 2w is
// even, starts the sums. Nothing is rounded before a group's clips are multiplied with.
#pragma once

#include "cpu/common_impl.h"

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

// Of 8 codes those of even index, then those of odd index, which is how bytes of weights are split.
inline uint64_t even_then_odd(uint64_t x) {
  const auto every_other = [](uint64_t bytes) {
    bytes &= 0x00FF00FF00FF00FF;
    bytes = (bytes | bytes >> 8) & 0x0000FFFF0000FFFF;
    return (bytes | bytes >> 16) & 0x00000000FFFFFFFF;
  };
  return every_other(x) | every_other(x >> 8) << 32;
}

// Of clips, as csrc/common has it for one.
inline F32 value_scale(F32 clip) { return keep(both(greater(clip, f32(0)), finite(clip)), clip); }

inline F32 zeros(F32) { return f32(0); }
inline I32 zeros(I32) { return to_int(f32(0)); }

}  // namespace
}  // namespace la_aciq::cpu

// The codebook of B bits: N = 2^B levels, clip clip, step = 2 clip / (N - 1).
//
//   midrise    code = clamp(floor(x / Delta) + N/2, 0, N-1)              value = (code - (N-1)/2) Delta
//   midtread   code = clamp(round_half_even(x / Delta) + N/2, 0, N-1)    value = (code - N/2) Delta
//
// Kernels multiply x by inverse_step(clip). A value is level(code) * clip, level in [-1, 1] or just beyond,
// so that the ends of the mid-rise codebook are exactly +-clip.
#pragma once

#include "common/host_device.h"

namespace la_aciq {

enum class Codebook { kMidrise, kMidtread };

// A clip that is not finite and positive stands for an empty codebook: every code is N/2, every value 0.
LA_ACIQ_HD bool is_clip(float clip) {
  return clip > 0.0f && clip <= 3.402823466e+38f;
}

LA_ACIQ_HD float inverse_step(float clip, int bits) {
  return is_clip(clip) ? 0.5f * static_cast<float>((1 << bits) - 1) / clip : 0.0f;
}

// code - N/2, in [-N/2, N/2 - 1].
LA_ACIQ_HD int signed_code(float x, float inverse_step, int bits, Codebook codebook) {
  const float half = static_cast<float>(1 << (bits - 1)), scaled = x * inverse_step;
  const float number = scaled == scaled ? scaled : 0.0f;
  const float bounded = number < -half ? -half : number > half - 1.0f ? half - 1.0f : number;
  return static_cast<int>(codebook == Codebook::kMidrise ? __builtin_floorf(bounded)
                                                         : __builtin_rintf(bounded));
}

// What the level of a code is multiplied with.
LA_ACIQ_HD float clip_or_zero(float clip) {
  return is_clip(clip) ? clip : 0.0f;
}

LA_ACIQ_HD float level(int code, int bits, Codebook codebook) {
  const int levels = 1 << bits;
  const int zero = codebook == Codebook::kMidrise ? levels - 1 : levels;
  return static_cast<float>(2 * code - zero) / static_cast<float>(levels - 1);
}

}  // namespace la_aciq

// The conversions of float16 that csrc/cuda uses; cuda_runtime.h in this folder says what this is for.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexpf(static_cast<float>(fraction), -24);
  return sign * ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
}

inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000);
  if (x != x) return {0x7FFF};
  const float magnitude = fabsf(x);
  if (magnitude == 0) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  int exponent;
  frexpf(magnitude, &exponent);  // magnitude < 2^exponent
  if (exponent < -13) exponent = -13;
  // In units of the last place, which carries into the exponent field by itself.
  const float units = rintf(ldexpf(magnitude, 11 - exponent));
  return {static_cast<uint16_t>(sign | (static_cast<int>(units) + ((exponent + 13) << 10)))};
}

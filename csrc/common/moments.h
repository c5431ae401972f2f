// The state of streaming moments and the log-histogram of |x|; python/la_aciq/ops/streaming.py documents
// both.
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace la_aciq {

// Over the finite elements, except nonfinite. m2, m3, m4 are sums of powers of (x - mean).
struct MomentState {
  double count, mean, m2, m3, m4, min, max, nonfinite;
};

LA_ACIQ_HD MomentState empty_moments() {
  return {0, 0, 0, 0, 0, __builtin_huge_val(), -__builtin_huge_val(), 0};
}

// a becomes the state of the union (Chan, Golub & LeVeque 1979; Pebay 2008).
LA_ACIQ_HD void merge_moments(MomentState& a, const MomentState& b) {
  const double nonfinite = a.nonfinite + b.nonfinite;
  if (b.count == 0 || a.count == 0) {
    if (a.count == 0) a = b;
    a.nonfinite = nonfinite;
    return;
  }
  const double n = a.count + b.count, inverse = 1.0 / n;
  const double share_a = a.count * inverse, share_b = b.count * inverse;
  const double delta = b.mean - a.mean, delta2 = delta * delta, weight = a.count * share_b;
  const double m2_a = share_a * b.m2, m2_b = share_b * a.m2;
  a.m4 += b.m4 + delta2 * delta2 * weight * (share_a * share_a - share_a * share_b + share_b * share_b) +
          6 * delta2 * (share_a * m2_a + share_b * m2_b) + 4 * delta * (share_a * b.m3 - share_b * a.m3);
  a.m3 += b.m3 + delta2 * delta * weight * (share_a - share_b) + 3 * delta * (m2_a - m2_b);
  a.m2 += b.m2 + delta2 * weight;
  a.mean += delta * share_b;
  a.min = b.min < a.min ? b.min : a.min;
  a.max = b.max > a.max ? b.max : a.max;
  a.count = n;
  a.nonfinite = nonfinite;
}

// The state of n finite values from the sums of d^p, d = x - center, where center is their rounded mean.
LA_ACIQ_HD MomentState moments_about(double center, double n, double s1, double s2, double s3, double s4,
                                     double min, double max) {
  const double r = s1 / n, r2 = r * r;
  return {n,
          center + r,
          s2 - n * r2,
          s3 - 3 * r * s2 + 2 * n * r2 * r,
          s4 - 4 * r * s3 + 6 * r2 * s2 - 3 * n * r2 * r2,
          min,
          max,
          0};
}

constexpr int kHistogramBins = 258;

// The bin of |x| from its float32 bits without the sign: 8 bins per octave from 2^-16 to 2^16, one below and
// one above.
LA_ACIQ_HD int32_t histogram_bin(int32_t magnitude_bits) {
  const int32_t bin = (magnitude_bits >> 20) - (111 << 3) + 1;
  if (bin < 0) return 0;
  return bin < kHistogramBins ? bin : kHistogramBins - 1;
}

}  // namespace la_aciq

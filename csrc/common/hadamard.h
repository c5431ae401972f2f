// The Hadamard transform in Sylvester's order, unnormalized and in place.
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace la_aciq {

LA_ACIQ_HD int64_t largest_power_of_two_divisor(int64_t k) {
  return k & -k;
}

LA_ACIQ_HD void hadamard(float* x, int64_t block) {
  for (int64_t half = 1; half < block; half *= 2) {
    for (int64_t start = 0; start < block; start += 2 * half) {
      for (int64_t i = start; i < start + half; i++) {
        const float even = x[i], odd = x[i + half];
        x[i] = even + odd;
        x[i + half] = even - odd;
      }
    }
  }
}

}  // namespace la_aciq

// Element types, clips and languages at run time, as the kernels of every device take them.
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace la_aciq {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

enum class Clip { kStatic, kRms, kAbsmax };

// The row of the table that each row (or, for the moments on a CPU, each element) of x reads: ids[i / span].
// Without ids, and for an id out of range, row 0.
struct Languages {
  const int32_t* ids;
  int64_t span;
  int32_t count;
};

LA_ACIQ_HD int32_t language_of(const Languages& languages, int64_t i) {
  if (languages.ids == nullptr) return 0;
  const int32_t id = languages.ids[i / languages.span];
  return id >= 0 && id < languages.count ? id : 0;
}

}  // namespace la_aciq

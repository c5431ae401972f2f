// Element types, kinds of clips and language ids, as the kernels of every device take them.
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace la_aciq {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

enum class Clip { kStatic, kRms, kAbsmax };

// Which entry of a table each row of x reads (for the moments on a CPU: each element): ids[i / span]. Without
// ids, and for an id out of range, entry 0.
struct LanguageIds {
  const int32_t* ids;
  int64_t span;
  int32_t num_entries;
};

LA_ACIQ_HD int32_t entry_of(const LanguageIds& language_ids, int64_t i) {
  if (language_ids.ids == nullptr) return 0;
  const int32_t id = language_ids.ids[i / language_ids.span];
  return id >= 0 && id < language_ids.num_entries ? id : 0;
}

}  // namespace la_aciq

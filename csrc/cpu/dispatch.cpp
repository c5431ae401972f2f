// Which instruction set's kernels run: the best one of this CPU, found once.
#include <string.h>

#include <atomic>

#include "cpu/kernels.h"

namespace la_aciq::cpu {

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

namespace {

struct Available {
  const Kernels* list[3];
  int count = 0;

  Available() {
    list[count++] = &kBaselineKernels;
#if defined(__x86_64__)
    __builtin_cpu_init();  // also checks that the operating system saves the wide registers
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) list[count++] = &kAvx2Kernels;
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      list[count++] = &kAvx512Kernels;
    }
#endif
  }
};

const Available& available() {
  static const Available found;
  return found;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

KernelList available_kernels() { return {available().list, available().list + available().count}; }

const Kernels& active_kernels() {
  const Kernels* chosen = active.load(std::memory_order_relaxed);
  if (chosen == nullptr) {
    chosen = available().list[available().count - 1];
    active.store(chosen, std::memory_order_relaxed);
  }
  return *chosen;
}

bool activate_kernels(const char* isa) {
  for (const Kernels* kernels : available_kernels()) {
    if (strcmp(kernels->isa, isa) == 0) {
      active.store(kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace la_aciq::cpu

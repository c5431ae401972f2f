// Which instruction set's kernels run: the best one of this CPU, found once.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <string.h>

#include <atomic>

#include "cpu/kernels/kernels.h"

namespace la_aciq::cpu {

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Product kAvx2VnniProduct;
extern const Product kAvx512VnniProduct;
extern const Product kAvx512Bf16Product;
#endif

namespace {

#if defined(__x86_64__)
// Bit 4 of EAX of CPUID leaf 7.1, for which __builtin_cpu_supports has a name in newer compilers only.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 16u);
}

Kernels with(Kernels kernels, const char* isa, Product Kernels::* which, const Product& product) {
  kernels.isa = isa;
  kernels.*which = product;
  return kernels;
}
#endif

struct Available {
  const Kernels* list[6];
  int count = 0;

  Available() {
    list[count++] = &kBaselineKernels;
#if defined(__x86_64__)
    __builtin_cpu_init();  // also checks that the operating system saves the wide registers
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!avx2) return;
    list[count++] = &kAvx2Kernels;
    if (has_avx_vnni()) {
      static const Kernels vnni = with(kAvx2Kernels, "avx2vnni", &Kernels::integer_product, kAvx2VnniProduct);
      list[count++] = &vnni;
    }
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
      return;
    }
    list[count++] = &kAvx512Kernels;
    if (!__builtin_cpu_supports("avx512vnni")) return;
    static const Kernels vnni =
        with(kAvx512Kernels, "avx512vnni", &Kernels::integer_product, kAvx512VnniProduct);
    list[count++] = &vnni;
    if (__builtin_cpu_supports("avx512bf16")) {
      static const Kernels bf16 = with(vnni, "avx512bf16", &Kernels::bfloat16_product, kAvx512Bf16Product);
      list[count++] = &bf16;
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

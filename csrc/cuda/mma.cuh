// The tensor-core instruction of linear.cuh, named after the PTX ISA:
// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32.
//
// Fragments of lane l, with g = l / 4 and t = l % 4 (two 16-bit elements per register, the lower index in the
// lower half):
//   A (16 x 16)  a[0]: row g, columns 2t, 2t+1    a[1]: row g+8    a[2]: row g, columns 2t+8, 2t+9    a[3]:
//   row g+8, the same B (16 x 8)   b[0]: rows 2t, 2t+1 of column g    b[1]: rows 2t+8, 2t+9 D (16 x 8) d[0],
//   d[1]: row g, columns 2t, 2t+1    d[2], d[3]: row g+8
#pragma once

#include <type_traits>

#include "cuda/device.cuh"

namespace la_aciq::cuda {

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef __CUDACC__

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

// On a CPU: every lane gathers the fragments of its warp and computes its own four results.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* fragments = emulation::exchange(mine, sizeof(mine));
  const auto element = [&](int lane, int reg, int half) {
    T value;
    memcpy(&value, fragments + 32 * lane + 4 * reg + 2 * half, sizeof(value));
    return to_float(value);
  };
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; i++) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; k++) {
      const int of_k = k % 8 / 2;
      sum += element(row % 8 * 4 + of_k, row / 8 + 2 * (k / 8), k % 2) *
             element(column * 4 + of_k, 4 + k / 8, k % 2);
    }
    d[i] = sum;
  }
}

#endif

// INT4 codes as pairs of 16-bit floats. A code enters as low bits of the mantissa of a power of two, from
// which a subtraction takes the power again: exact, and no conversion instruction.
template <class T>
struct Mantissa;
template <>
struct Mantissa<__nv_bfloat16> {
  static constexpr uint32_t kBase = 0x43004300;  // 128, where the last place of a bfloat16 is 1
  static constexpr float kValue = 128;
};
template <>
struct Mantissa<__half> {
  static constexpr uint32_t kBase = 0x64006400;  // 1024, where the last place of a float16 is 1
  static constexpr float kValue = 1024;
};

// pair - (value, value), rounded; here always exact.
template <class T>
__device__ __forceinline__ uint32_t subtract_from_pair(uint32_t pair, float value) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 difference = __hsub2(*reinterpret_cast<__half2*>(&pair), __float2half2_rn(value));
    return *reinterpret_cast<const uint32_t*>(&difference);
  } else {
    const __nv_bfloat162 difference =
        __hsub2(*reinterpret_cast<__nv_bfloat162*>(&pair), __float2bfloat162_rn(value));
    return *reinterpret_cast<const uint32_t*>(&difference);
  }
#else
  T element[2];
  memcpy(element, &pair, sizeof(pair));
  for (T& e : element) e = from_float<T>(to_float(e) - value);
  memcpy(&pair, element, sizeof(pair));
  return pair;
#endif
}

// Elements kFirst and kFirst + 4 of the eight codes of a word, as 2 code - 15 (mid-rise) or 2 code - 16
// (mid-tread): twice the value in steps.
template <class T, int kFirst>
__device__ __forceinline__ uint32_t decode_pair(uint32_t word, float offset) {
  const uint32_t doubled =
      (kFirst == 0 ? word << 1 : word >> (kFirst == 0 ? 0 : 4 * kFirst - 1)) & 0x001E001E;
  return subtract_from_pair<T>(doubled | Mantissa<T>::kBase, Mantissa<T>::kValue + offset);
}

}  // namespace la_aciq::cuda

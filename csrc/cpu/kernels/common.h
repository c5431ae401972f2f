// What the kernels share: reading and writing the end of an array that does not fill a vector, sums over
// lanes, types at run time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/kernels/kernels.h"

namespace la_aciq::cpu {
namespace {

// Asks for what a stream of reads needs kAhead bytes later, which need not exist. Two pages: prefetchers in
// hardware stop at the end of a page, and the next one has to be found in the page tables first. It goes to
// the second-level cache: in the first, it and what a kernel works on would push each other out.
template <int64_t kAhead = 8192>
inline void prefetch(const void* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead), 0, 2);
}

// n < 16 elements, zeros after them.
template <class T>
inline F32 load_partial(const T* p, int64_t n) {
  T padded[16];
  __builtin_memset(padded, 0, sizeof(padded));
  __builtin_memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_partial(T* p, F32 x, int64_t n) {
  T full[16];
  store(full, x);
  __builtin_memcpy(p, full, static_cast<size_t>(n) * sizeof(T));
}

// Calls body(first index, vector of 16, number of them that are elements) over n elements.
template <class T, class Body>
inline __attribute__((always_inline)) void for_each_vector(const T* p, int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) body(i, load(p + i), 16);
  if (i < n) body(i, load_partial(p + i, n - i), static_cast<int>(n - i));
}

// As from memory, where that takes fewer instructions than taking a vector apart.
template <class T>
inline void load_wide(const T* p, F64& low8, F64& high8) {
  const F32 v = load(p);
  low8 = low(v);
  high8 = high(v);
}

// 32 elements in any order.
template <class T>
inline void load_unordered(const T* p, F32& first16, F32& next16) {
  first16 = load(p);
  next16 = load(p + 16);
}

inline float sum(F32 x) {
  float lane[16];
  store(lane, x);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  }
  return lane[0];
}

inline bool is_finite(double x) { return __builtin_fabs(x) <= 1.7976931348623157e308; }

// Calls body with a pointer of the element type of p.
template <class Body>
inline void with_type(DType dtype, const void* p, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(static_cast<const float*>(p));
    case DType::kBFloat16:
      return body(static_cast<const BFloat16*>(p));
    case DType::kFloat16:
      return body(static_cast<const Float16*>(p));
    case DType::kFloat64:
      return;  // moments alone takes float64, and reads it by itself
  }
}
template <class Body>
inline void with_type(DType dtype, void* p, Body body) {
  with_type(dtype, static_cast<const void*>(p),
            [&]<class T>(const T* typed) { body(const_cast<T*>(typed)); });
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The 16 levels of the INT4 codebook.
inline Table16 levels_of(Codebook codebook) {
  float levels[16];
  for (int code = 0; code < 16; code++) levels[code] = level(code, 4, codebook);
  return table16(levels);
}

}  // namespace
}  // namespace la_aciq::cpu

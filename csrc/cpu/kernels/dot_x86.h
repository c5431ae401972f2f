// What AVX2 and AVX-512 do alike with codes. dot_baseline.h documents the operations.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace la_aciq::cpu {
namespace {

inline void store_split(uint8_t* out, const uint8_t* x) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(bytes, order));
}

}  // namespace
}  // namespace la_aciq::cpu

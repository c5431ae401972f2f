// Vectors of 16 floats, 16 ints and 8 doubles on AVX2, as two registers each. vec_baseline.h documents the
// operations.
#pragma once

#include <immintrin.h>

#include "cpu/kernels/kernels.h"

namespace la_aciq::cpu {
namespace {

struct F32 {
  __m256 a, b;
};
struct I32 {
  __m256i a, b;
};
struct F64 {
  __m256d a, b;
};
using Mask = F32;

inline F32 f32(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 load8(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load8(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F32 load(const BFloat16* p) { return {load8(p), load8(p + 8)}; }
inline F32 load(const Float16* p) { return {load8(p), load8(p + 8)}; }
inline void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline __m256i bfloat16_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7FC00000), nan), 16);
}
inline void store(BFloat16* p, F32 x) {
  // packus works within each half; the permutation puts the four quarters back in order.
  const __m256i packed = _mm256_packus_epi32(bfloat16_bits(x.a), bfloat16_bits(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}
inline void store(Float16* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

inline F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32 muladd(F32 x, F32 y, F32 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F32 keep(Mask m, F32 x) { return {_mm256_and_ps(m.a, x.a), _mm256_and_ps(m.b, x.b)}; }
inline F32 where(Mask m, F32 x, F32 y) {
  return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)};
}
inline F32 negated(uint16_t lanes, F32 x) {
  // Shifted to the left by 31 - i, the bit of lane i is the sign of a float32.
  const __m256i bits = _mm256_set1_epi32(lanes), first = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  const __m256i a = _mm256_and_si256(_mm256_sllv_epi32(bits, first), sign);
  const __m256i b = _mm256_and_si256(_mm256_sllv_epi32(_mm256_srli_epi32(bits, 8), first), sign);
  return {_mm256_xor_ps(x.a, _mm256_castsi256_ps(a)), _mm256_xor_ps(x.b, _mm256_castsi256_ps(b))};
}
inline F32 abs(F32 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F32 bounded(F32 x, F32 least, F32 most) {
  const Mask number = {_mm256_cmp_ps(x.a, x.a, _CMP_ORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_ORD_Q)};
  return keep(number, min(max(x, least), most));
}
inline I32 to_int(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline I32 bounded_nearest(F32 x, F32 least, F32 most) { return to_int(bounded(x, least, most)); }
inline I32 bounded_floor(F32 x, F32 least, F32 most) {
  const F32 near = bounded(x, least, most);
  return {_mm256_cvtps_epi32(_mm256_floor_ps(near.a)), _mm256_cvtps_epi32(_mm256_floor_ps(near.b))};
}
inline F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I32 bits_of(F32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline I32 i32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I32 min(I32 x, I32 y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
inline I32 max(I32 x, I32 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline I32 add(I32 x, int y) {
  return {_mm256_add_epi32(x.a, _mm256_set1_epi32(y)), _mm256_add_epi32(x.b, _mm256_set1_epi32(y))};
}
inline void store(int32_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}

inline Mask greater(F32 x, F32 y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)};
}
inline Mask finite(F32 x) {
  const F32 magnitude = abs(x);
  const __m256 largest = _mm256_set1_ps(3.402823466e+38f);
  return {_mm256_cmp_ps(magnitude.a, largest, _CMP_LE_OQ), _mm256_cmp_ps(magnitude.b, largest, _CMP_LE_OQ)};
}
inline Mask both(Mask m, Mask n) { return keep(m, n); }
inline int count(Mask m) {
  return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(m.a) | _mm256_movemask_ps(m.b) << 8));
}

inline F64 f64(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
inline F64 load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
inline void store(double* p, F64 x) {
  _mm256_storeu_pd(p, x.a);
  _mm256_storeu_pd(p + 4, x.b);
}
inline F64 widen(__m256 x) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}
inline F64 low(F32 x) { return widen(x.a); }
inline F64 high(F32 x) { return widen(x.b); }
inline void load_wide(const float* p, F64& low8, F64& high8) {
  low8 = {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
  high8 = {_mm256_cvtps_pd(_mm_loadu_ps(p + 8)), _mm256_cvtps_pd(_mm_loadu_ps(p + 12))};
}
inline F64 add(F64 x, F64 y) { return {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)}; }
inline F64 sub(F64 x, F64 y) { return {_mm256_sub_pd(x.a, y.a), _mm256_sub_pd(x.b, y.b)}; }
inline F64 mul(F64 x, F64 y) { return {_mm256_mul_pd(x.a, y.a), _mm256_mul_pd(x.b, y.b)}; }
inline F64 muladd(F64 x, F64 y, F64 z) {
  return {_mm256_fmadd_pd(x.a, y.a, z.a), _mm256_fmadd_pd(x.b, y.b, z.b)};
}
inline F64 min(F64 x, F64 y) { return {_mm256_min_pd(x.a, y.a), _mm256_min_pd(x.b, y.b)}; }
inline F64 max(F64 x, F64 y) { return {_mm256_max_pd(x.a, y.a), _mm256_max_pd(x.b, y.b)}; }

inline double sum(F64 x) {
  const __m256d quarters = _mm256_add_pd(x.a, x.b);
  const __m128d halves = _mm_add_pd(_mm256_castpd256_pd128(quarters), _mm256_extractf128_pd(quarters, 1));
  return _mm_cvtsd_f64(_mm_add_sd(halves, _mm_unpackhi_pd(halves, halves)));
}
inline float largest(F32 x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

struct Table16 {
  __m256 lower, upper;
};
inline Table16 table16(const float* entries) {
  return {_mm256_loadu_ps(entries), _mm256_loadu_ps(entries + 8)};
}
inline __m256 lookup8(const Table16& table, __m256i index) {
  // Bit 3 of the index, moved to the sign, picks the half of the table.
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.lower, index),
                          _mm256_permutevar8x32_ps(table.upper, index),
                          _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline F32 lookup(const Table16& table, I32 index) {
  return {lookup8(table, index.a), lookup8(table, index.b)};
}

inline void store_bytes(uint8_t* p, I32 x) {
  // Packing works within each half; the permutation puts the quarters back in order.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline void store_nibbles(uint8_t* p, I32 first16, I32 next16) {
  const __m256i words = _mm256_packs_epi32(first16.a, first16.b),
                more = _mm256_packs_epi32(next16.a, next16.b);
  // Within each word the order is that of the two halves of the registers; the permutation below restores it.
  const __m256i bytes =
      _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, more), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_set1_epi16(0x1001), bytes), _mm256_set1_epi16(0x88));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_nibbles(uint8_t* p, const I32 (&codes)[4]) {
  store_nibbles(p, codes[0], codes[1]);
  store_nibbles(p + 16, codes[2], codes[3]);
}
inline I32 widen_bytes(__m128i bytes) {
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
inline void load_nibbles(const uint8_t* p, I32& first16, I32& next16) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(bytes, mask), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  first16 = widen_bytes(_mm_unpacklo_epi8(even, odd));
  next16 = widen_bytes(_mm_unpackhi_epi8(even, odd));
}
inline void load_nibble_planes(const uint8_t* p, I32& even16, I32& odd16) {
  even16 = widen_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  odd16 = {_mm256_srli_epi32(even16.a, 4), _mm256_srli_epi32(even16.b, 4)};
}

constexpr int kHadamardRadix = 4;
constexpr int kPowerSums = 2;
constexpr int kRoundColumns = 6;

template <int kHalf>
inline __m256 butterfly8(__m256 x) {
  __m256 swapped;
  if constexpr (kHalf == 1) {
    swapped = _mm256_permute_ps(x, 0xB1);
  } else if constexpr (kHalf == 2) {
    swapped = _mm256_permute_ps(x, 0x4E);
  } else {
    swapped = _mm256_permute2f128_ps(x, x, 0x01);
  }
  constexpr int kOdd = kHalf == 1 ? 0xAA : kHalf == 2 ? 0xCC : 0xF0;
  return _mm256_blend_ps(_mm256_add_ps(swapped, x), _mm256_sub_ps(swapped, x), kOdd);
}
template <int kHalf>
inline F32 butterfly(F32 x) {
  if constexpr (kHalf == 8) {
    return {_mm256_add_ps(x.a, x.b), _mm256_sub_ps(x.a, x.b)};
  } else {
    return {butterfly8<kHalf>(x.a), butterfly8<kHalf>(x.b)};
  }
}

}  // namespace
}  // namespace la_aciq::cpu

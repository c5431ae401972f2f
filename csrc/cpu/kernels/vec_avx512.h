// Vectors of 16 floats, 16 ints and 8 doubles on AVX-512. vec_baseline.h documents the operations.
#pragma once

#include <immintrin.h>

#include "cpu/kernels/kernels.h"

namespace la_aciq::cpu {
namespace {

using F32 = __m512;
using I32 = __m512i;
using F64 = __m512d;
using Mask = __mmask16;

inline F32 f32(float x) { return _mm512_set1_ps(x); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32 load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline F32 load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void load_unordered(const BFloat16* p, F32& first16, F32& next16) {
  const I32 bits = _mm512_loadu_si512(p);
  first16 = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  next16 = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline void store(BFloat16* p, F32 x) {
  const I32 bits = _mm512_castps_si512(x);
  const I32 odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I32 nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const Mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const I32 rounded = _mm512_mask_mov_epi32(nearest, nan, _mm512_set1_epi32(0x7FC00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store(Float16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 muladd(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 abs(F32 a) { return _mm512_abs_ps(a); }
inline I32 to_int(F32 a) { return _mm512_cvtps_epi32(a); }
inline I32 bounded_floor(F32 a, F32 least, F32 most) {
  return _mm512_maskz_cvt_roundps_epi32(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), min(max(a, least), most),
                                        _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
inline I32 bounded_nearest(F32 a, F32 least, F32 most) {
  return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), min(max(a, least), most));
}
inline F32 to_float(I32 a) { return _mm512_cvtepi32_ps(a); }
inline I32 bits_of(F32 a) { return _mm512_castps_si512(a); }
inline I32 i32(int x) { return _mm512_set1_epi32(x); }
inline I32 min(I32 a, I32 b) { return _mm512_min_epi32(a, b); }
inline I32 max(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
inline I32 add(I32 a, int b) { return _mm512_add_epi32(a, _mm512_set1_epi32(b)); }
inline void store(int32_t* p, I32 x) { _mm512_storeu_si512(p, x); }

inline Mask greater(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask finite(F32 a) { return _mm512_cmp_ps_mask(abs(a), f32(3.402823466e+38f), _CMP_LE_OQ); }
inline Mask both(Mask a, Mask b) { return a & b; }
inline int count(Mask m) { return __builtin_popcount(m); }
inline F32 keep(Mask m, F32 a) { return _mm512_maskz_mov_ps(m, a); }
inline F32 where(Mask m, F32 a, F32 b) { return _mm512_mask_mov_ps(b, m, a); }
inline F32 negated(uint16_t lanes, F32 a) { return _mm512_mask_xor_ps(a, lanes, a, f32(-0.0f)); }

inline F64 f64(double x) { return _mm512_set1_pd(x); }
inline F64 load(const double* p) { return _mm512_loadu_pd(p); }
inline void store(double* p, F64 x) { _mm512_storeu_pd(p, x); }
inline F64 low(F32 a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
inline F64 high(F32 a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
inline void load_wide(const float* p, F64& low8, F64& high8) {
  low8 = _mm512_cvtps_pd(_mm256_loadu_ps(p));
  high8 = _mm512_cvtps_pd(_mm256_loadu_ps(p + 8));
}
inline F64 add(F64 a, F64 b) { return _mm512_add_pd(a, b); }
inline F64 sub(F64 a, F64 b) { return _mm512_sub_pd(a, b); }
inline F64 mul(F64 a, F64 b) { return _mm512_mul_pd(a, b); }
inline F64 muladd(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
inline F64 min(F64 a, F64 b) { return _mm512_min_pd(a, b); }
inline F64 max(F64 a, F64 b) { return _mm512_max_pd(a, b); }

inline double sum(F64 a) {
  const __m256d quarters = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
  const __m128d halves = _mm_add_pd(_mm256_castpd256_pd128(quarters), _mm256_extractf128_pd(quarters, 1));
  return _mm_cvtsd_f64(_mm_add_sd(halves, _mm_unpackhi_pd(halves, halves)));
}
inline float largest(F32 a) { return _mm512_reduce_max_ps(a); }

struct Table16 {
  __m512 entries;
};
inline Table16 table16(const float* entries) { return {load(entries)}; }
inline F32 lookup(const Table16& table, I32 index) { return _mm512_permutexvar_ps(index, table.entries); }

inline void store_bytes(uint8_t* p, I32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
inline void store_nibbles(uint8_t* p, I32 first16, I32 next16) {
  // Pairs of codes in 32 bits; the halves of each 128 bits come from the two vectors and are put in order.
  const I32 pairs = _mm512_madd_epi16(_mm512_packs_epi32(first16, next16), _mm512_set1_epi32(0x00100001));
  const I32 ordered = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), pairs);
  const __m128i bytes = _mm_add_epi8(_mm512_cvtepi32_epi8(ordered), _mm_set1_epi8(static_cast<char>(0x88)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline void store_nibbles(uint8_t* p, const I32 (&codes)[4]) {
  const I32 bytes =
      _mm512_packs_epi16(_mm512_packs_epi32(codes[0], codes[1]), _mm512_packs_epi32(codes[2], codes[3]));
  const I32 pairs = _mm512_maddubs_epi16(_mm512_set1_epi16(0x1001), bytes);
  const I32 ordered = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), pairs);
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm256_add_epi8(_mm512_cvtepi16_epi8(ordered), _mm256_set1_epi8(static_cast<char>(0x88))));
}
inline void load_nibbles(const uint8_t* p, I32& first16, I32& next16) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(bytes, mask), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  first16 = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
  next16 = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, odd));
}
inline void load_nibble_planes(const uint8_t* p, I32& even16, I32& odd16) {
  even16 = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  odd16 = _mm512_srli_epi32(even16, 4);
}

constexpr int kHadamardRadix = 16;
constexpr int kPowerSums = 4;
constexpr int kRoundColumns = 12;

template <int kHalf>
inline F32 butterfly(F32 a) {
  F32 swapped;
  if constexpr (kHalf == 1) {
    swapped = _mm512_permute_ps(a, 0xB1);
  } else if constexpr (kHalf == 2) {
    swapped = _mm512_permute_ps(a, 0x4E);
  } else if constexpr (kHalf == 4) {
    swapped = _mm512_shuffle_f32x4(a, a, 0xB1);
  } else {
    swapped = _mm512_shuffle_f32x4(a, a, 0x4E);
  }
  // swapped + a, or swapped - a where the index has the bit kHalf: a product with +-1 is exact.
  constexpr auto sign = [](int lane) { return lane & kHalf ? -1.0f : 1.0f; };
  const F32 signs =
      _mm512_setr_ps(sign(0), sign(1), sign(2), sign(3), sign(4), sign(5), sign(6), sign(7), sign(8), sign(9),
                     sign(10), sign(11), sign(12), sign(13), sign(14), sign(15));
  return muladd(a, signs, swapped);
}

}  // namespace
}  // namespace la_aciq::cpu

// Inner products and the decoding of weights on AVX2, with VNNI where the file is compiled for it.
// dot_baseline.h documents the operations.
#pragma once

#include "cpu/kernels/dot_x86.h"
#include "cpu/kernels/vec_avx2.h"

namespace la_aciq::cpu {
namespace {

// 8 registers of sums, 2 of weights and one of activations.
constexpr int kFloatBlockRows = 4, kIntegerBlockRows = 4, kPanelVectors = 1;
constexpr int few_rows(int panels) { return 4 / panels; }

inline I32 broadcast(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
}
inline I32 add(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I32 shift_right(I32 x, int bits) {
  return {_mm256_srli_epi32(x.a, bits), _mm256_srli_epi32(x.b, bits)};
}
inline I32 half_times(I32 x, int factor) {
  const __m256i f = _mm256_set1_epi32(factor);
  return {_mm256_mullo_epi32(_mm256_srai_epi32(x.a, 1), f), _mm256_mullo_epi32(_mm256_srai_epi32(x.b, 1), f)};
}

inline __m256i dot8(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
#if defined(__AVXVNNI__)
  // Not the intrinsic, for which GCC copies sums between registers and the stack.
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(unsigned_bytes), "x"(signed_bytes));
  return sum;
#else
  const __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
inline I32 dot(I32 sum, I32 unsigned_bytes, I32 signed_bytes) {
  return {dot8(sum.a, unsigned_bytes.a, signed_bytes.a), dot8(sum.b, unsigned_bytes.b, signed_bytes.b)};
}

inline I32 load_lanes(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline F32 as_float(I32 bits) { return {_mm256_castsi256_ps(bits.a), _mm256_castsi256_ps(bits.b)}; }
inline F32 load_vector(const float* p) { return load(p); }
inline I32 load_vector(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline void store_vector(float* p, const F32& x) { store(p, x); }
inline void store_vector(uint8_t* p, const I32& x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
}

struct ByteTable {
  __m256i entries;
};
inline ByteTable byte_table(const int8_t* entries) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)))};
}
inline I32 decode_bytes(const ByteTable& table, I32 codes) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_shuffle_epi8(table.entries, _mm256_and_si256(codes.a, mask)),
          _mm256_shuffle_epi8(table.entries, _mm256_and_si256(codes.b, mask))};
}

inline void load_columns8(const uint8_t* p, int64_t stride, __m256i* columns) {
  // Row 4 i + j goes to half i of a register, then 4 x 4 transposes within the halves.
  __m256i rows[4];
  for (int j = 0; j < 4; j++) {
    const auto at = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + (4 * i + j) * stride));
    };
    rows[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
  }
  const __m256i a = _mm256_unpacklo_epi32(rows[0], rows[1]), b = _mm256_unpacklo_epi32(rows[2], rows[3]),
                c = _mm256_unpackhi_epi32(rows[0], rows[1]), d = _mm256_unpackhi_epi32(rows[2], rows[3]);
  columns[0] = _mm256_unpacklo_epi64(a, b);
  columns[1] = _mm256_unpackhi_epi64(a, b);
  columns[2] = _mm256_unpacklo_epi64(c, d);
  columns[3] = _mm256_unpackhi_epi64(c, d);
}
inline void load_columns(const uint8_t* p, int64_t stride, I32* columns) {
  __m256i low[4], high[4];
  load_columns8(p, stride, low);
  load_columns8(p + 8 * stride, stride, high);
  for (int j = 0; j < 4; j++) columns[j] = {low[j], high[j]};
}

}  // namespace
}  // namespace la_aciq::cpu

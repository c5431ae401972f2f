// Inner products and the decoding of weights on AVX-512, with VNNI where the file is compiled for it.
// dot_baseline.h documents the operations.
#pragma once

#include "cpu/kernels/dot_x86.h"
#include "cpu/kernels/vec_avx512.h"

namespace la_aciq::cpu {
namespace {

// With 4 vectors of weights and one of activations, 12 sums and their totals. Of integers 8: beside 12, GCC
// keeps one vector of weights in memory, within the innermost loop.
constexpr int kFloatBlockRows = 3, kIntegerBlockRows = 2, kPanelVectors = 4;
#if defined(__AVX512VNNI__)
constexpr int few_rows(int panels) { return panels == 8 ? 1 : panels == 4 ? 4 : 8; }
#else  // products of bytes take registers of their own
constexpr int few_rows(int panels) { return panels == 8 ? 1 : 4; }
#endif

inline I32 broadcast(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return _mm512_set1_epi32(four);
}
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 shift_right(I32 a, int bits) { return _mm512_srli_epi32(a, static_cast<unsigned>(bits)); }
inline I32 half_times(I32 a, int factor) {
  return _mm512_mullo_epi32(_mm512_srai_epi32(a, 1), _mm512_set1_epi32(factor));
}

inline I32 dot(I32 sum, I32 unsigned_bytes, I32 signed_bytes) {
#if defined(__AVX512VNNI__)
  // Not the intrinsic, for which GCC copies sums between registers and the stack.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
#else
  const __m512i pairs = _mm512_maddubs_epi16(unsigned_bytes, signed_bytes);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

inline I32 load_lanes(const int32_t* p) { return _mm512_loadu_si512(p); }
inline F32 as_float(I32 bits) { return _mm512_castsi512_ps(bits); }
inline F32 load_vector(const float* p) { return load(p); }
inline I32 load_vector(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store_vector(float* p, const F32& x) { store(p, x); }
inline void store_vector(uint8_t* p, const I32& x) { _mm512_storeu_si512(p, x); }
inline I32 load_vector(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline void store_vector(uint16_t* p, const I32& x) { _mm512_storeu_si512(p, x); }

struct ByteTable {
  __m512i entries;
};
inline ByteTable byte_table(const int8_t* entries) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)))};
}
inline I32 decode_bytes(const ByteTable& table, I32 codes) {
  return _mm512_shuffle_epi8(table.entries, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
}

inline void load_columns(const uint8_t* p, int64_t stride, I32* columns) {
  // Row 4 i + j goes to quarter i of a register, then 4 x 4 transposes within the quarters.
  __m512i rows[4];
  for (int j = 0; j < 4; j++) {
    const auto at = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + (4 * i + j) * stride));
    };
    rows[j] = _mm512_castsi128_si512(at(0));
    rows[j] = _mm512_inserti32x4(rows[j], at(1), 1);
    rows[j] = _mm512_inserti32x4(rows[j], at(2), 2);
    rows[j] = _mm512_inserti32x4(rows[j], at(3), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpacklo_epi32(rows[2], rows[3]),
                c = _mm512_unpackhi_epi32(rows[0], rows[1]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  columns[0] = _mm512_unpacklo_epi64(a, b);
  columns[1] = _mm512_unpackhi_epi64(a, b);
  columns[2] = _mm512_unpacklo_epi64(c, d);
  columns[3] = _mm512_unpackhi_epi64(c, d);
}

}  // namespace
}  // namespace la_aciq::cpu

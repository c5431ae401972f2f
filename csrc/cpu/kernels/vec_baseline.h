// Vectors of 16 floats, 16 ints and 8 doubles in portable C++; compilers turn the loops into what the target
// has.
//
// The vec_<isa>.h headers offer the same operations, lane for lane with the same rounding, so a kernel gives
// the same codes on every CPU. Only muladd may differ: fused where the hardware fuses.
#pragma once

#include <stdint.h>

#include "cpu/kernels/kernels.h"

namespace la_aciq::cpu {
namespace {

struct F32 {
  float lane[16];
};
struct I32 {
  int32_t lane[16];
};
struct F64 {
  double lane[8];
};
using Mask = I32;  // -1 or 0 in each lane

template <class Out, class Function>
inline __attribute__((always_inline)) Out lanes(Function function) {
  Out out;
  for (int i = 0; i < static_cast<int>(sizeof(out.lane) / sizeof(out.lane[0])); i++)
    out.lane[i] = function(i);
  return out;
}

inline int32_t bits_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float scalar(float x) { return x; }
inline float scalar(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float scalar(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // 2^112 moves the exponent from float16's bias to float32's, for subnormals as well.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}
inline void narrow(float* out, float x) { *out = x; }
inline void narrow(BFloat16* out, float x) {
  const uint32_t bits = bits_of(x);
  out->bits = x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
inline void narrow(Float16* out, float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // from halfway between the largest float16 and 2^16 on
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 rounds at the last place of float16, 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

inline F32 f32(float x) {
  return lanes<F32>([&](int) { return x; });
}
template <class T>
inline F32 load(const T* p) {
  return lanes<F32>([&](int i) { return scalar(p[i]); });
}
template <class T>
inline void store(T* p, const F32& x) {
  for (int i = 0; i < 16; i++) narrow(p + i, x.lane[i]);
}
inline void store(int32_t* p, const I32& x) {
  for (int i = 0; i < 16; i++) p[i] = x.lane[i];
}

template <class V>
inline V add(const V& x, const V& y) {
  return lanes<V>([&](int i) { return x.lane[i] + y.lane[i]; });
}
template <class V>
inline V sub(const V& x, const V& y) {
  return lanes<V>([&](int i) { return x.lane[i] - y.lane[i]; });
}
template <class V>
inline V mul(const V& x, const V& y) {
  return lanes<V>([&](int i) { return x.lane[i] * y.lane[i]; });
}
template <class V>
inline V muladd(const V& x, const V& y, const V& z) {
  return lanes<V>([&](int i) { return x.lane[i] * y.lane[i] + z.lane[i]; });
}
template <class V>
inline V min(const V& x, const V& y) {
  return lanes<V>([&](int i) { return x.lane[i] < y.lane[i] ? x.lane[i] : y.lane[i]; });
}
template <class V>
inline V max(const V& x, const V& y) {
  return lanes<V>([&](int i) { return x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i]; });
}
inline F32 abs(const F32& x) {
  return lanes<F32>([&](int i) { return __builtin_fabsf(x.lane[i]); });
}
// Half to even, for |x| < 2^22.
inline I32 to_int(const F32& x) {
  return lanes<I32>([&](int i) { return bits_of(x.lane[i] + 0x1.8p23f) - bits_of(0x1.8p23f); });
}
// The integer below x, or nearest (half to even), once x is bounded to [least, most] within +-2^22; 0 for
// NaN.
inline F32 bounded(const F32& x, const F32& least, const F32& most) {
  const F32 near = min(max(x, least), most);
  return lanes<F32>([&](int i) { return x.lane[i] == x.lane[i] ? near.lane[i] : 0.0f; });
}
inline I32 bounded_nearest(const F32& x, const F32& least, const F32& most) {
  return to_int(bounded(x, least, most));
}
inline I32 bounded_floor(const F32& x, const F32& least, const F32& most) {
  const F32 near = bounded(x, least, most);
  return lanes<I32>([&](int i) {
    const int32_t truncated = static_cast<int32_t>(near.lane[i]);
    return truncated - (near.lane[i] < static_cast<float>(truncated));
  });
}
inline F32 to_float(const I32& x) {
  return lanes<F32>([&](int i) { return static_cast<float>(x.lane[i]); });
}
inline I32 bits_of(const F32& x) {
  return lanes<I32>([&](int i) { return bits_of(x.lane[i]); });
}
inline I32 i32(int x) {
  return lanes<I32>([&](int) { return x; });
}
inline I32 add(const I32& x, int y) {
  return lanes<I32>([&](int i) { return x.lane[i] + y; });
}

inline Mask greater(const F32& x, const F32& y) {
  return lanes<Mask>([&](int i) { return -static_cast<int32_t>(x.lane[i] > y.lane[i]); });
}
inline Mask finite(const F32& x) {
  return lanes<Mask>(
      [&](int i) { return -static_cast<int32_t>(__builtin_fabsf(x.lane[i]) <= 3.402823466e+38f); });
}
inline Mask both(const Mask& m, const Mask& n) {
  return lanes<Mask>([&](int i) { return m.lane[i] & n.lane[i]; });
}
inline int count(const Mask& m) {
  int total = 0;
  for (int i = 0; i < 16; i++) total -= m.lane[i];
  return total;
}
inline F32 keep(const Mask& m, const F32& x) {  // 0 elsewhere
  return lanes<F32>([&](int i) { return m.lane[i] ? x.lane[i] : 0.0f; });
}

inline F32 where(const Mask& m, const F32& x, const F32& y) {
  return lanes<F32>([&](int i) { return m.lane[i] ? x.lane[i] : y.lane[i]; });
}

inline F32 negated(uint16_t mask, const F32& x) {  // the lanes whose bit is set
  return lanes<F32>([&](int i) {
    const uint32_t sign = static_cast<uint32_t>(mask >> i & 1) << 31;
    return float_of(static_cast<uint32_t>(bits_of(x.lane[i])) ^ sign);
  });
}

inline F64 f64(double x) {
  return lanes<F64>([&](int) { return x; });
}
inline F64 load(const double* p) {
  return lanes<F64>([&](int i) { return p[i]; });
}
inline void store(double* p, const F64& x) {
  for (int i = 0; i < 8; i++) p[i] = x.lane[i];
}
inline F64 low(const F32& x) {  // lanes 0 to 7
  return lanes<F64>([&](int i) { return static_cast<double>(x.lane[i]); });
}
inline F64 high(const F32& x) {  // lanes 8 to 15
  return lanes<F64>([&](int i) { return static_cast<double>(x.lane[i + 8]); });
}

inline void load_wide(const float* p, F64& low8, F64& high8) {  // 16 elements
  low8 = low(load(p));
  high8 = high(load(p));
}
inline double sum(const F64& x) {
  const double* lane = x.lane;
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}
inline float largest(const F32& x) {
  float result = x.lane[0];
  for (int i = 1; i < 16; i++) result = x.lane[i] > result ? x.lane[i] : result;
  return result;
}

struct Table16 {
  float entries[16];
};
inline Table16 table16(const float* entries) {
  Table16 table;
  for (int i = 0; i < 16; i++) table.entries[i] = entries[i];
  return table;
}
// Reads the low 4 bits of each index.
inline F32 lookup(const Table16& table, const I32& index) {
  return lanes<F32>([&](int i) { return table.entries[index.lane[i] & 15]; });
}

inline void store_bytes(uint8_t* p, const I32& x) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<uint8_t>(x.lane[i]);
}
// 32 codes minus 8 as 16 bytes, the even index in the low nibble; 64 as 32 bytes.
inline void store_nibbles(uint8_t* p, const I32& first16, const I32& next16) {
  for (int i = 0; i < 8; i++) {
    p[i] = static_cast<uint8_t>(first16.lane[2 * i] + first16.lane[2 * i + 1] * 16 + 0x88);
    p[i + 8] = static_cast<uint8_t>(next16.lane[2 * i] + next16.lane[2 * i + 1] * 16 + 0x88);
  }
}
inline void store_nibbles(uint8_t* p, const I32 (&codes)[4]) {
  store_nibbles(p, codes[0], codes[1]);
  store_nibbles(p + 16, codes[2], codes[3]);
}
// 16 bytes as 32 codes.
inline void load_nibbles(const uint8_t* p, I32& first16, I32& next16) {
  for (int i = 0; i < 16; i++) {
    first16.lane[i] = p[i / 2] >> 4 * (i % 2) & 15;
    next16.lane[i] = p[i / 2 + 8] >> 4 * (i % 2) & 15;
  }
}
// The 16 codes of even index and the 16 of odd index, with anything above their low 4 bits.
inline void load_nibble_planes(const uint8_t* p, I32& even16, I32& odd16) {
  for (int i = 0; i < 16; i++) {
    even16.lane[i] = p[i];
    odd16.lane[i] = p[i] >> 4;
  }
}

constexpr int kHadamardRadix = 4;  // vectors of a pass over a block, as many as registers hold
constexpr int kPowerSums = 2;      // sets of sums of powers, as many as registers hold
constexpr int kRoundColumns = 2;   // vectors of sums over columns, as many as registers hold

// One stage of the Hadamard transform within the vector: lanes i and i + kHalf become their sum and
// difference.
template <int kHalf>
inline F32 butterfly(const F32& x) {
  return lanes<F32>([&](int i) {
    const float other = x.lane[i ^ kHalf];
    return i & kHalf ? other - x.lane[i] : other + x.lane[i];
  });
}

}  // namespace
}  // namespace la_aciq::cpu

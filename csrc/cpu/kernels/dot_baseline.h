// Inner products and the decoding of weights in portable C++. The dot_<isa>.h headers offer the same
// operations with the same integers. Of sums, k...BlockRows x kPanelVectors fit their registers beside
// weights from a tile, and few_rows(panels) x panels beside weights that are decoded there.
#pragma once

#include "cpu/kernels/vec_baseline.h"

namespace la_aciq::cpu {
namespace {

constexpr int kFloatBlockRows = 2, kIntegerBlockRows = 2, kPanelVectors = 1;
constexpr int few_rows(int panels) { return panels == 1 ? 2 : 0; }

// 4 bytes, in every lane.
inline I32 broadcast(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return lanes<I32>([&](int) { return four; });
}
inline I32 shift_right(const I32& x, int bits) {
  return lanes<I32>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(x.lane[i]) >> bits); });
}
// x / 2 * factor for even x.
inline I32 half_times(const I32& x, int factor) {
  return lanes<I32>([&](int i) { return x.lane[i] / 2 * factor; });
}

// sum + the four products of the bytes of each lane. Sums of two products stay within 16 bits.
inline I32 dot(const I32& sum, const I32& unsigned_bytes, const I32& signed_bytes) {
  return lanes<I32>([&](int i) {
    const auto u = static_cast<uint32_t>(unsigned_bytes.lane[i]),
               s = static_cast<uint32_t>(signed_bytes.lane[i]);
    int32_t total = sum.lane[i];
    for (int shift = 0; shift < 32; shift += 8) {
      total += static_cast<int32_t>(u >> shift & 255u) * static_cast<int8_t>(s >> shift & 255u);
    }
    return total;
  });
}

// Of 8 codes those of even index, then those of odd index, which is how bytes of weights are split; twice.
// `out` may be x.
inline void store_split(uint8_t* out, const uint8_t* x) {
  uint8_t split[16];
  for (int i = 0; i < 16; i++) split[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = x[i];
  __builtin_memcpy(out, split, sizeof(split));
}

inline I32 load_lanes(const int32_t* p) {
  return lanes<I32>([&](int i) { return p[i]; });
}
inline F32 as_float(const I32& bits) {
  return lanes<F32>([&](int i) { return float_of(static_cast<uint32_t>(bits.lane[i])); });
}
inline F32 load_vector(const float* p) { return load(p); }
inline I32 load_vector(const uint8_t* p) {
  I32 x;
  __builtin_memcpy(x.lane, p, 64);
  return x;
}
inline void store_vector(float* p, const F32& x) { store(p, x); }
inline void store_vector(uint8_t* p, const I32& x) { __builtin_memcpy(p, x.lane, 64); }

struct ByteTable {
  int8_t entries[16];
};
inline ByteTable byte_table(const int8_t* entries) {
  ByteTable table;
  for (int i = 0; i < 16; i++) table.entries[i] = entries[i];
  return table;
}
// The entries of the low nibble of each byte.
inline I32 decode_bytes(const ByteTable& table, const I32& codes) {
  return lanes<I32>([&](int i) {
    const auto lane = static_cast<uint32_t>(codes.lane[i]);
    uint32_t bytes = 0;
    for (int shift = 0; shift < 32; shift += 8) {
      bytes |= static_cast<uint32_t>(static_cast<uint8_t>(table.entries[lane >> shift & 15u])) << shift;
    }
    return static_cast<int32_t>(bytes);
  });
}

// 16 bytes of each of 16 rows: lane n of columns[j] is the j-th group of 4 bytes of row n.
inline void load_columns(const uint8_t* p, int64_t stride, I32* columns) {
  for (int j = 0; j < 4; j++) {
    for (int n = 0; n < 16; n++) __builtin_memcpy(&columns[j].lane[n], p + n * stride + 4 * j, 4);
  }
}

}  // namespace
}  // namespace la_aciq::cpu

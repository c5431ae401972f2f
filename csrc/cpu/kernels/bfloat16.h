// bfloat16 activations times INT4 weights with the AVX-512 BF16 dot product: pairs of bfloat16 are multiplied
// and added to a float32. The levels of INT4 in steps are exact in bfloat16, products of the two are exact in
// float32, and clips come last and in float32 as everywhere, so sums are as good as those of float32. Only
// numbers below 2^-126 are lost: the instruction takes them for zero.
//
// Of 8 members of K, member i forms a pair with member i + 4: four nibbles apart, one shift takes both.
#pragma once

#include "cpu/kernels/product.h"

namespace la_aciq::cpu {
namespace {

// The 16 levels in steps, 2 code - 15 or - 16, twice: an index has 5 bits, of which the last belongs to a
// neighbour.
struct PairTable {
  I32 entries;
};
inline PairTable pair_table(Codebook codebook) {
  uint16_t levels[32];
  for (int i = 0; i < 32; i++) {
    const auto value = static_cast<float>(2 * (i % 16) - (codebook == Codebook::kMidrise ? 15 : 16));
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    levels[i] = static_cast<uint16_t>(bits >> 16);
  }
  return {_mm512_loadu_si512(levels)};
}
// Members i and i + 4 of the 8 of each lane.
inline I32 pair(const PairTable& table, I32 codes, int i) {
  return _mm512_permutexvar_epi16(shift_right(codes, 4 * i), table.entries);
}

inline F32 dot(F32 sum, I32 x, I32 y) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));  // see the other dot
  return sum;
}

struct BFloat16Product {
  using Sum = F32;
  using Operand = I32;
  using Element = uint16_t;
  static constexpr int kDepth = 2;
  static constexpr int kBlockRows = kFloatBlockRows;
  static constexpr int64_t kTileMembers = 128;
  static constexpr bool kIntegers = false;
  static constexpr int kSteps = 15;

  PairTable levels;
  explicit BFloat16Product(const ProductArgs& args) : levels(pair_table(args.codebook)) {}

  static F32 start(const int32_t*) { return f32(0); }
  static I32 broadcast_at(const uint16_t* p) { return broadcast(reinterpret_cast<const uint8_t*>(p)); }
  static F32 add_product(F32 sum, I32 activations, I32 weights) { return dot(sum, activations, weights); }
  static F32 sum_in_float(F32 sum) { return sum; }
  I32 decode(I32 codes, int i) const { return pair(levels, codes, i); }
};

// --- Activations ---

// `count` elements from x on, zeros after them, as four pairs.
inline __m128i pairs_of(const uint16_t* x, int64_t count) {
  __m128i eight = _mm_setzero_si128();
  if (count >= 8) {
    eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  } else if (count > 0) {
    __builtin_memcpy(&eight, x, static_cast<size_t>(count) * sizeof(*x));
  }
  return _mm_unpacklo_epi16(eight, _mm_unpackhi_epi64(eight, eight));
}

inline void pack_bfloat16(const PackArgs& args, int64_t begin, int64_t end) {
  const auto* x = static_cast<const uint16_t*>(args.x);
  auto* out = static_cast<uint16_t*>(args.out);
  for (int64_t row = begin; row < end; row++) {
    for (const Segment* s = args.segments; s < args.segments + args.segment_count; s++) {
      uint16_t* packed = out + s->offset * args.packed_rows + row * s->padded();
      for (int64_t i = 0; i < s->length; i += 8) {
        const __m128i pairs = pairs_of(x + row * args.k + s->start + i, s->length - i);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i), pairs);
      }
    }
  }
}

}  // namespace
}  // namespace la_aciq::cpu

// A few rows of activations times INT4 weights: memory bounds it, so each weight is read once and decoded in
// registers.
//
// A chunk is 64 bytes of an output's weights, 128 members of K: lane l of a register holds members 8 l to
// 8 l + 7, which lie in one group because groups are multiples of 8. Activations are arranged likewise, and a
// chunk's sums are multiplied with a vector of clips, one per lane. Several outputs at a time share each load
// of activations, which do not fit the first-level cache.
#pragma once

#include "cpu/dot_common.h"

namespace la_aciq::cpu {
namespace {

template <int kOutputs, int kRows>
inline __attribute__((always_inline)) void clear(F32 (*sums)[kRows]) {
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; o++) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) sums[o][r] = f32(0);
  }
}

struct FloatMatvec {
  using Element = float;
  static constexpr int kSteps = 1;                  // of the weights in their clip
  static constexpr int kTogether = kMatvecOutputs;  // outputs that share a load of activations
  using Sum = F32;
  struct Weights {
    I32 codes;
  };

  Table16 levels;
  explicit FloatMatvec(const MatvecArgs& args) : levels(levels_of(args.codebook)) {}

  Weights decode(I32 codes, const float*) const { return {codes}; }

  // sums[o][r] of the products of a chunk: vector j holds member j of every lane.
  template <int kOutputs, int kRows>
  inline __attribute__((always_inline)) void multiply(const Weights* weights, const float* x,
                                                      int64_t row_width, F32 (*sums)[kRows]) const {
    clear<kOutputs>(sums);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      F32 values[kOutputs];
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; o++) values[o] = lookup(levels, shift_right(weights[o].codes, 4 * j));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const F32 activations = load(x + r * row_width + 16 * j);
#pragma GCC unroll 4
        for (int o = 0; o < kOutputs; o++) sums[o][r] = muladd(values[o], activations, sums[o][r]);
      }
    }
  }
};

// See dot_common.h for the integers.
struct IntegerMatvec {
  using Element = uint8_t;
  static constexpr int kSteps = 15;
  static constexpr int kTogether = 1;  // more would need more registers of sums than there are
  struct Weights {
    I32 even, odd, start;
  };

  ByteTable table;
  int zero;
  explicit IntegerMatvec(const MatvecArgs& args) : table(twice_levels(args.codebook)), zero(args.zero) {}

  Weights decode(I32 codes, const uint8_t* ones) const {
    Weights weights;
    decode_bytes(table, codes, weights.even, weights.odd);
    const I32 twice_sum =
        dot(dot(zeros(weights.even), load_vector(ones), weights.even), load_vector(ones + 64), weights.odd);
    weights.start = half_times(twice_sum, -zero);
    return weights;
  }

  template <int kOutputs, int kRows>
  inline __attribute__((always_inline)) void multiply(const Weights* weights, const uint8_t* x,
                                                      int64_t row_width, F32 (*sums)[kRows]) const {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const I32 even = load_vector(x + r * row_width), odd = load_vector(x + r * row_width + 64);
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; o++) {
        sums[o][r] = to_float(dot(dot(weights[o].start, even, weights[o].even), odd, weights[o].odd));
      }
    }
  }
};

// --- Activations ---

inline void arrange_floats(const ArrangeArgs& args, int64_t begin, int64_t end) {
  with_type(args.dtype, args.x, [&](auto* x) {
    for (int64_t row = begin; row < end; row++) {
      for (int64_t first = 0; first < args.k; first += kMatvecChunk) {
        float chunk[kMatvecChunk] = {};
        for_each_vector(x + row * args.k + first, smaller(args.k - first, kMatvecChunk),
                        [&](int64_t i, F32 v, int) { store(chunk + i, v); });
        float* out = static_cast<float*>(args.out) + row * args.width + first;
        for (int lane = 0; lane < 16; lane++) {
          for (int j = 0; j < 8; j++) out[16 * j + lane] = chunk[8 * lane + j];
        }
      }
    }
  });
}

// Codes of even index, then those of odd index; row args.rows becomes ones.
inline void arrange_codes(const ArrangeArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + row * args.k;
    uint8_t* out = static_cast<uint8_t*>(args.out) + row * args.width;
    for (int64_t i = 0; i < args.width; i += 8) {
      uint64_t eight = 0;
      const int64_t members = smaller(args.k - i, 8);
      if (members > 0) {
        eight = 0x0101010101010101;
        if (row < args.rows) __builtin_memcpy(&eight, x + i, static_cast<size_t>(members));
        if (members < 8) eight &= (uint64_t{1} << 8 * members) - 1;
      }
      eight = even_then_odd(eight);
      uint8_t* at = out + i / kMatvecChunk * kMatvecChunk + i % kMatvecChunk / 2;
      __builtin_memcpy(at, &eight, 4);
      __builtin_memcpy(at + 64, reinterpret_cast<const char*>(&eight) + 4, 4);
    }
  }
}

// --- The product ---

// The clips of the lanes of a chunk. Reading past the groups of an output is reading those of the next.
inline F32 clips_of_lanes(const MatvecArgs& args, int64_t output, const int32_t* groups) {
  const int64_t at = output * args.weight_groups + groups[0];
  const int64_t left = args.n * args.weight_groups - at;
  float last[16];
  const float* clips = args.clips + at;
  if (left < 16) {
    store(last, load_partial(clips, left));
    clips = last;
  }
  return value_scale(lookup(table16(clips), add(load_lanes(groups), -groups[0])));
}

template <class Matvec, int kOutputs, int kRows>
inline void multiply_block(const MatvecArgs& args, const Matvec& matvec, int64_t output, int64_t row) {
  using Element = typename Matvec::Element;
  const int64_t bytes = (args.k + 1) / 2;
  const uint8_t* weight = args.weight + output * bytes;
  const Element* x = static_cast<const Element*>(args.x) + row * args.width;
  const Element* ones = static_cast<const Element*>(args.x) + args.rows * args.width;
  F32 totals[kOutputs][kRows];
  for (auto& of_output : totals) {
    for (F32& total : of_output) total = f32(0);
  }
  for (int64_t chunk = 0; chunk < args.width / kMatvecChunk; chunk++) {
    constexpr int kTogether = kOutputs < Matvec::kTogether ? kOutputs : Matvec::kTogether;
    const int64_t at = chunk * kMatvecChunk / 2, left = bytes - at;
#pragma GCC unroll 4
    for (int first = 0; first < kOutputs; first += kTogether) {
      typename Matvec::Weights weights[kTogether];
#pragma GCC unroll 4
      for (int o = 0; o < kTogether; o++) {
        const uint8_t* codes = weight + (first + o) * bytes + at;
        __builtin_prefetch(codes + kOutputs * bytes);
        uint8_t last[64] = {};
        if (left < 64) {
          __builtin_memcpy(last, codes, static_cast<size_t>(left));
          codes = last;
        }
        weights[o] = matvec.decode(load_vector(codes), ones + chunk * kMatvecChunk);
      }
      F32 sums[kTogether][kRows];
      matvec.template multiply<kTogether, kRows>(weights, x + chunk * kMatvecChunk, args.width, sums);
#pragma GCC unroll 4
      for (int o = 0; o < kTogether; o++) {
        const F32 clips = clips_of_lanes(args, output + first + o, args.lane_groups + 16 * chunk);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
          const F32 scale =
              args.scales ? mul(clips, load(args.scales + ((row + r) * args.width / 8 + 16 * chunk))) : clips;
          totals[first + o][r] = muladd(sums[o][r], scale, totals[first + o][r]);
        }
      }
    }
  }
  const float unit = 1.0f / static_cast<float>(Matvec::kSteps * args.steps);
  with_type(args.dtype, args.out, [&](auto* out) {
    for (int o = 0; o < kOutputs; o++) {
      const float offset = args.bias ? args.bias[output + o] : 0.0f;
      for (int r = 0; r < kRows; r++) {
        store_partial(out + (row + r) * args.n + output + o, f32(sum_lanes(totals[o][r]) * unit + offset), 1);
      }
    }
  });
}

// Outputs [output, output + kOutputs) of every row.
template <class Matvec, int kOutputs, int kRows>
inline void multiply_rows(const MatvecArgs& args, const Matvec& matvec, int64_t output, int64_t row) {
  for (; row + kRows <= args.rows; row += kRows) {
    multiply_block<Matvec, kOutputs, kRows>(args, matvec, output, row);
  }
  if constexpr (kRows > 1) multiply_rows<Matvec, kOutputs, kRows - 1>(args, matvec, output, row);
}

template <class Matvec>
void matvec(const MatvecArgs& args, int64_t begin, int64_t end) {
  const Matvec kernel(args);
  int64_t output = begin;
  for (; output + kMatvecOutputs <= end; output += kMatvecOutputs) {
    multiply_rows<Matvec, kMatvecOutputs, kMatvecRows>(args, kernel, output, 0);
  }
  for (; output < end; output++) multiply_rows<Matvec, 1, kMatvecRows>(args, kernel, output, 0);
}

}  // namespace
}  // namespace la_aciq::cpu

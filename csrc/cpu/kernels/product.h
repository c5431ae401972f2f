// Rows of activations times INT4 weights.
//
// Weights come in lanes: 8 members of each of 16 outputs make a vector, so a lane is an output, and one
// broadcast of 4 bytes of activations serves all 16. Sums over a segment (members along K that share a clip
// of the weight and of the activation) are those of the arithmetic below (exact for integers); the segment's
// clips come last. A few rows decode weights in registers (few_rows.h). Many rows decode them a tile at
// a time, some segments of a panel of outputs, which stays in the first-level cache while every row goes over
// it. Both add up in the same order, so a row does not depend on the rows beside it.
#pragma once

#include "cpu/kernels/dot_common.h"

namespace la_aciq::cpu {
namespace {

// float32 activations, weights as float32 levels.
struct FloatProduct {
  using Sum = F32;
  using Operand = F32;
  using Element = float;
  static constexpr int kDepth = 1;  // members of K in 4 bytes
  static constexpr int kBlockRows = kFloatBlockRows;
  static constexpr int64_t kTileMembers = 128;
  static constexpr bool kIntegers = false;
  static constexpr int kSteps = 1;  // of the weights in their clip

  Table16 levels;
  explicit FloatProduct(const ProductArgs& args) : levels(levels_of(args.codebook)) {}

  static F32 start(const int32_t*) { return f32(0); }
  static F32 broadcast_at(const float* p) { return f32(*p); }
  static F32 add_product(F32 sum, F32 activations, F32 weights) { return muladd(activations, weights, sum); }
  static F32 sum_in_float(F32 sum) { return sum; }
  // Of 8 members of 16 outputs those of step i.
  F32 decode(I32 codes, int i) const { return lookup(levels, shift_right(codes, 4 * i)); }
};

// Activations as codes, weights as twice their levels in steps: see dot_common.h.
struct IntegerProduct {
  using Sum = I32;
  using Operand = I32;
  using Element = uint8_t;
  static constexpr int kDepth = 4;
  static constexpr int kBlockRows = kIntegerBlockRows;
  static constexpr int64_t kTileMembers = 256;
  static constexpr bool kIntegers = true;
  static constexpr int kSteps = 15;

  ByteTable table;
  int zero;
  explicit IntegerProduct(const ProductArgs& args) : table(twice_levels(args.codebook)), zero(args.zero) {}

  static I32 start(const int32_t* p) { return load_lanes(p); }
  static I32 broadcast_at(const uint8_t* p) { return broadcast(p); }
  static I32 add_product(I32 sum, I32 activations, I32 weights) { return dot(sum, activations, weights); }
  static F32 sum_in_float(I32 sum) { return to_float(sum); }
  I32 decode(I32 codes, int i) const { return decode_bytes(table, shift_right(codes, 4 * i)); }
};

// --- Activations ---

inline void pack_codes(const PackArgs& args, int64_t begin, int64_t end) {
  const auto* x = static_cast<const uint8_t*>(args.x);
  auto* out = static_cast<uint8_t*>(args.out);
  for (int64_t row = begin; row < end; row++) {
    for (const Segment* s = args.segments; s < args.segments + args.segment_count; s++) {
      uint8_t* packed = out + s->offset * args.packed_rows + row * s->padded();
      const uint8_t* members = row < args.rows ? x + row * args.k + s->start : nullptr;
      for (int64_t i = 0; i < s->length; i += 16) {
        if (members && i + 16 <= s->length) {
          store_split(packed + i, members + i);
          continue;
        }
        uint8_t last[16] = {};
        const auto rest = static_cast<size_t>(smaller(16, s->length - i));
        if (members) {
          __builtin_memcpy(last, members + i, rest);
        } else {
          __builtin_memset(last, 1, rest);  // for the sums of the weights
        }
        store_split(last, last);
        __builtin_memcpy(packed + i, last, static_cast<size_t>(smaller(16, s->padded() - i)));
      }
    }
  }
}

inline void pack_floats(const PackArgs& args, int64_t begin, int64_t end) {
  auto* out = static_cast<float*>(args.out);
  with_type(args.dtype, args.x, [&](auto* x) {
    for (int64_t row = begin; row < end; row++) {
      for (const Segment* s = args.segments; s < args.segments + args.segment_count; s++) {
        float* packed = out + s->offset * args.packed_rows + row * s->padded();
        for_each_vector(x + row * args.k + s->start, s->length, [&](int64_t i, F32 v, int n) {
          if (n == 16) {
            store(packed + i, v);
          } else {
            store_partial(packed + i, v, n);
          }
        });
        for (int64_t i = s->length; i < s->padded(); i++) packed[i] = 0;
      }
    }
  });
}

// --- Weights ---

// 16 bytes from byte `at` on of 16 rows of a matrix of `rows` rows of `bytes`, as columns; zeros beyond its
// ends.
inline void load_columns_of(const void* matrix, int64_t rows, int64_t bytes, int64_t row, int64_t at,
                            I32* columns) {
  const uint8_t* p = static_cast<const uint8_t*>(matrix) + row * bytes + at;
  const int64_t height = smaller(rows - row, 16), width = smaller(bytes - at, 16);
  if (height == 16 && width == 16) return load_columns(p, bytes, columns);
  uint8_t copy[256] = {};
  for (int64_t i = 0; i < height; i++) {
    __builtin_memcpy(copy + 16 * i, p + i * bytes, static_cast<size_t>(width));
  }
  load_columns(copy, 16, columns);
}

// The lanes of `panels` panels of 16 outputs, `stride` apart from `panel` on: where they are, or one after
// the other in `scratch`, where weights are not repacked.
inline const uint8_t* lanes_of(const ProductArgs& args, int64_t panel, int64_t panels, int64_t stride,
                               uint8_t* scratch) {
  if (args.repacked) return args.weight + panel * args.width * 8;
  for (int64_t p = 0; p < panels; p++) {
    for (const Segment* s = args.segments; s < args.segments + args.segment_count; s++) {
      uint8_t* out = scratch + (p * args.width + s->offset) * 8;
      for (int64_t i = 0; i < s->length; i += 32) {
        I32 columns[4];
        load_columns_of(args.weight, args.n, (args.k + 1) / 2, 16 * (panel + p * stride), (s->start + i) / 2,
                        columns);
        for (int64_t j = 0; j < smaller((s->length - i + 7) / 8, 4); j++) {
          store_vector(out + (i / 8 + j) * 64, columns[j]);
        }
      }
    }
  }
  return scratch;
}

// A segment of the panel whose lanes are given, as a tile.
template <class Product, int kVectors>
inline void decode_segment(const ProductArgs& args, const Product& product, const Segment& segment,
                           const uint8_t* lanes, typename Product::Element* tile) {
  constexpr int kSteps = 8 / Product::kDepth;                // of 8 members
  constexpr int64_t kVectorElements = 16 * Product::kDepth;  // of Element
  for (int v = 0; v < kVectors; v++) {
    const uint8_t* codes = lanes + (v * args.width + segment.offset) * 8;
    for (int64_t i = 0; i < segment.padded() / 8; i++) {
      prefetch<Product::kTileMembers * 8>(codes + i * 64);  // for the next tile
      const I32 eight = load_vector(codes + i * 64);
      auto* out = tile + (i * kSteps * kVectors + v) * kVectorElements;
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; step++) {
        store_vector(out + step * kVectors * kVectorElements, product.decode(eight, step));
      }
    }
  }
}

// The clips of 4 groups of 16 outputs as factors on sums.
template <class Product>
inline void load_clips(const ProductArgs& args, int64_t output, int64_t group, F32* clips) {
  const F32 unit = f32(1.0f / static_cast<float>(Product::kSteps * args.steps));
  I32 columns[4];
  load_columns_of(args.clips, args.n, args.weight_groups * 4, output, group * 4, columns);
  for (int j = 0; j < 4; j++) clips[j] = mul(clip_or_zero(as_float(columns[j])), unit);
}

// The clips of a panel: panel_clips [groups, 16 kVectors]. Asks for those of the next panel, which lie after
// them.
template <class Product, int kVectors>
inline void decode_clips(const ProductArgs& args, int64_t first, float* panel_clips) {
  const int64_t bytes = 16 * kVectors * args.weight_groups * static_cast<int64_t>(sizeof(float));
  const auto next = reinterpret_cast<uintptr_t>(args.clips + first * args.weight_groups) + bytes;
  for (int64_t i = 0; i < bytes; i += 64) prefetch<0>(reinterpret_cast<const void*>(next + i));
  for (int64_t group = 0; group < args.weight_groups; group += 4) {
    for (int v = 0; v < kVectors; v++) {
      F32 clips[4];
      load_clips<Product>(args, first + 16 * v, group, clips);
      for (int64_t j = 0; j < smaller(args.weight_groups - group, 4); j++) {
        store(panel_clips + ((group + j) * kVectors + v) * 16, clips[j]);
      }
    }
  }
}

// --- Many rows ---

// Segments [first, last) of a tile for kRows rows: totals [kRows, 16 kVectors] += the sums of each times its
// clips.
template <class Product, int kRows, int kVectors>
inline void add_block(const ProductArgs& args, const Segment* first, const Segment* last, int64_t row,
                      const ProductScratch& scratch, float* totals) {
  using Sum = typename Product::Sum;
  using Operand = typename Product::Operand;
  using Element = typename Product::Element;
  constexpr int64_t kVectorElements = 16 * Product::kDepth;
  const auto* tile = static_cast<const Element*>(scratch.tile);
  const int32_t* starts = scratch.starts;
  F32 scaled[kRows][kVectors];  // sums times the clips of the weights, over a group of the activations
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) scaled[r][v] = f32(0);
  }
  for (const Segment* segment = first; segment < last; segment++) {
    const int64_t padded = segment->padded();
    const Element* x =
        static_cast<const Element*>(args.x) + segment->offset * args.packed_rows + row * padded;
    Sum sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      sums[0][v] = Product::start(starts + 16 * v);
#pragma GCC unroll 8
      for (int r = 1; r < kRows; r++) sums[r][v] = sums[0][v];
    }
    starts += 16 * kVectors;
    for (int64_t i = 0; i < padded; i += Product::kDepth) {
      Operand weights[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) weights[v] = load_vector(tile + v * kVectorElements);
      tile += kVectors * kVectorElements;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        const Operand activations = Product::broadcast_at(x + r * padded + i);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
          sums[r][v] = Product::add_product(sums[r][v], activations, weights[v]);
        }
      }
    }
    const float* panel_clips = scratch.clips + segment->weight_group * kVectors * 16;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        scaled[r][v] = muladd(Product::sum_in_float(sums[r][v]), load(panel_clips + 16 * v), scaled[r][v]);
      }
    }
    if (!segment->last_of_group) continue;
    const float* row_clips = args.row_clips + row * args.activation_groups + segment->activation_group;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const F32 clip = f32(Product::kIntegers ? row_clips[r * args.activation_groups] : 1.0f);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        float* total = totals + (r * kVectors + v) * 16;
        store(total, muladd(scaled[r][v], clip, load(total)));
        scaled[r][v] = f32(0);
      }
    }
  }
}

// Calls add_block for rows [row, row + count), count <= kRows.
template <class Product, int kRows, int kVectors, class... Args>
inline void add_rows(int64_t count, const Args&... args) {
  if constexpr (kRows > 1) {
    if (count < kRows) return add_rows<Product, kRows - 1, kVectors>(count, args...);
  }
  add_block<Product, kRows, kVectors>(args...);
}

template <class Product, int kVectors>
inline void multiply_panel(const ProductArgs& args, const Product& product, int64_t first, int64_t row_begin,
                           int64_t row_end, const ProductScratch& scratch) {
  using Element = typename Product::Element;
  constexpr int64_t kWidth = 16 * kVectors;
  constexpr int64_t kVectorElements = 16 * Product::kDepth;
  decode_clips<Product, kVectors>(args, first, scratch.clips);
  const int64_t outputs = smaller(args.n - first, kWidth);
  __builtin_memset(scratch.totals, 0, static_cast<size_t>((row_end - row_begin) * kWidth) * sizeof(float));
  const Segment* const end = args.segments + args.segment_count;
  const uint8_t* lanes = lanes_of(args, first / 16, kVectors, 1, scratch.lanes);
  for (const Segment *segment = args.segments, *next = segment; segment < end; segment = next) {
    auto* tile = static_cast<Element*>(scratch.tile);
    int32_t* starts = scratch.starts;
    for (bool whole = false; !whole; next++) {
      whole = next->last_of_tile;
      decode_segment<Product, kVectors>(args, product, *next, lanes, tile);
      if constexpr (Product::kIntegers) {
        I32 sums[kVectors];
        for (I32& sum : sums) sum = zeros(sum);
        const Element* ones = static_cast<const Element*>(args.x) + next->offset * args.packed_rows +
                              args.rows * next->padded();
        for (int64_t i = 0; i < next->padded(); i += 4) {
          for (int v = 0; v < kVectors; v++) {
            sums[v] = dot(sums[v], broadcast(ones + i), load_vector(tile + (i / 4 * kVectors + v) * 64));
          }
        }
        for (int v = 0; v < kVectors; v++) store(starts + 16 * v, half_times(sums[v], -product.zero));
        starts += 16 * kVectors;
      }
      tile += next->padded() / Product::kDepth * kVectors * kVectorElements;
    }
    for (int64_t row = row_begin; row < row_end; row += Product::kBlockRows) {
      add_rows<Product, Product::kBlockRows, kVectors>(row_end - row, args, segment, next, row, scratch,
                                                       scratch.totals + (row - row_begin) * kWidth);
    }
  }
  // Last, so that sums are not rounded to the magnitude of the bias.
  float bias[kWidth] = {};
  if (args.bias) __builtin_memcpy(bias, args.bias + first, static_cast<size_t>(outputs) * sizeof(float));
  with_type(args.dtype, args.out, [&](auto* out) {
    for (int64_t row = row_begin; row < row_end; row++) {
      for_each_vector(scratch.totals + (row - row_begin) * kWidth, outputs, [&](int64_t i, F32 v, int n) {
        auto* at = out + row * args.n + first + i;
        v = add(v, load(bias + i));
        if (n == 16) {
          store(at, v);
        } else {
          store_partial(at, v, n);
        }
      });
    }
  });
}

// The last panel of a matrix may need fewer vectors.
template <class Product, int kVectors, class... Args>
inline void multiply_outputs(int64_t vectors, const Args&... args) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return multiply_outputs<Product, kVectors - 1>(vectors, args...);
  }
  multiply_panel<Product, kVectors>(args...);
}

template <class Product>
void multiply(const ProductArgs& args, int64_t begin, int64_t end, const ProductScratch& scratch) {
  const Product product(args);
  for (int64_t task = begin; task < end; task++) {
    const int64_t first = task / args.row_blocks * 16 * kPanelVectors,
                  row = task % args.row_blocks * args.block_rows;
    multiply_outputs<Product, kPanelVectors>((args.n - first + 15) / 16, args, product, first, row,
                                             smaller(row + args.block_rows, args.rows), scratch);
  }
}

}  // namespace
}  // namespace la_aciq::cpu

// A few rows of activations times INT4 weights: memory bounds it, so each weight is read once and decoded in
// registers. Several panels of 16 outputs go side by side, which keeps chains of sums independent. They are
// far apart, so that each of the streams of weights goes through memory from one panel to the next.
#pragma once

#include "cpu/kernels/product.h"

namespace la_aciq::cpu {
namespace {

// Panels first, first + stride and so on: side by side as far as their lanes go, bytes apart in memory.
struct FewPanels {
  int64_t first, stride;
  const uint8_t* lanes;
  int64_t bytes;
};

// Of the clips of the panels that follow, in the order in which they are in memory: asks for the next line.
template <int kPanels>
inline void prefetch_clips(const ProductArgs& args, const FewPanels& panels, int64_t line) {
#pragma GCC unroll 8
  for (int p = 0; p < kPanels; p++) {
    const int64_t panel = panels.first + p * panels.stride + 1;
    const auto at = reinterpret_cast<uintptr_t>(args.clips) +
                    static_cast<uintptr_t>(panel * args.weight_groups + line) * 16 * sizeof(float);
    prefetch<0>(reinterpret_cast<const void*>(at));
  }
}

// Rows [row, row + kRows) of kPanels panels.
template <class Product, int kPanels, int kRows>
inline void multiply_few_block(const ProductArgs& args, const Product& product, const FewPanels& panels,
                               int64_t row) {
  using Sum = typename Product::Sum;
  using Operand = typename Product::Operand;
  using Element = typename Product::Element;
  constexpr int64_t kClips = 4;  // groups whose clips are loaded together
  constexpr int64_t kAhead = 64 * (kPanels < 4 ? 32 : 128 / kPanels);  // bytes that are asked for before
  float clips[kClips][kPanels][16];
  int64_t clips_end = 0;
  F32 totals[kRows][kPanels], scaled[kRows][kPanels];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; p++) totals[r][p] = scaled[r][p] = f32(0);
  }
  for (const Segment* segment = args.segments; segment < args.segments + args.segment_count; segment++) {
    prefetch_clips<kPanels>(args, panels, segment->weight_group);
    if (segment->weight_group == clips_end) {
      for (int p = 0; p < kPanels; p++) {
        F32 four[kClips];
        load_clips<Product>(args, (panels.first + p * panels.stride) * 16, clips_end, four);
        for (int j = 0; j < kClips; j++) store(clips[j][p], four[j]);
      }
      clips_end += kClips;
    }
    const int64_t padded = segment->padded();
    const Element* packed = static_cast<const Element*>(args.x) + segment->offset * args.packed_rows;
    const Element *x = packed + row * padded, *ones = packed + args.rows * padded;
    const uint8_t* codes = panels.lanes + segment->offset * 8;
    Sum sums[kRows][kPanels], twice[kPanels];  // twice: the sums of the weights, of integers alone
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; p++) {
      twice[p] = zeros(Sum{});
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) sums[r][p] = zeros(Sum{});
    }
    for (int64_t i = 0; i < padded; i += 8) {
      I32 eights[kPanels];
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; p++) {
        prefetch<kAhead>(codes + p * panels.bytes);
        eights[p] = load_vector(codes + p * panels.bytes);
      }
      codes += 64;
#pragma GCC unroll 8
      for (int step = 0; step < 8 / Product::kDepth; step++) {
        Operand activations[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
          activations[r] = Product::broadcast_at(x + r * padded + i + step * Product::kDepth);
        }
#pragma GCC unroll 8
        for (int p = 0; p < kPanels; p++) {
          const Operand weights = product.decode(eights[p], step);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; r++) {
            sums[r][p] = Product::add_product(sums[r][p], activations[r], weights);
          }
          if constexpr (Product::kIntegers) {
            const Operand one = Product::broadcast_at(ones + i + step * Product::kDepth);
            twice[p] = Product::add_product(twice[p], one, weights);
          }
        }
      }
    }
    const auto& of_group = clips[segment->weight_group % kClips];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; p++) {
      if constexpr (Product::kIntegers) {
        const Sum start = half_times(twice[p], -product.zero);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) sums[r][p] = add(sums[r][p], start);
      }
      const F32 clip = load(of_group[p]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        scaled[r][p] = muladd(Product::sum_in_float(sums[r][p]), clip, scaled[r][p]);
      }
    }
    if (!segment->last_of_group) continue;
    const float* row_clips = args.row_clips + row * args.activation_groups + segment->activation_group;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const F32 clip = f32(Product::kIntegers ? row_clips[r * args.activation_groups] : 1.0f);
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; p++) {
        totals[r][p] = muladd(scaled[r][p], clip, totals[r][p]);
        scaled[r][p] = f32(0);
      }
    }
  }
  // Last, so that sums are not rounded to the magnitude of the bias.
  with_type(args.dtype, args.out, [&](auto* out) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; p++) {
      const int64_t first = (panels.first + p * panels.stride) * 16, outputs = smaller(args.n - first, 16);
      F32 bias = f32(0);
      if (args.bias)
        bias = outputs == 16 ? load(args.bias + first) : load_partial(args.bias + first, outputs);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        auto* at = out + (row + r) * args.n + first;
        const F32 y = add(totals[r][p], bias);
        if (outputs == 16) {
          store(at, y);
        } else {
          store_partial(at, y, outputs);
        }
      }
    }
  });
}

// Rows [row, row + count), count <= kRows.
template <class Product, int kPanels, int kRows, class... Args>
inline void multiply_few_rows(int64_t count, const Args&... args) {
  if constexpr (kRows > 1) {
    if (count < kRows) return multiply_few_rows<Product, kPanels, kRows - 1>(count, args...);
  }
  multiply_few_block<Product, kPanels, kRows>(args...);
}

// Panels [begin, end) of every row, at most kPanels at a time.
template <class Product, int kPanels>
inline void multiply_few_panels(const ProductArgs& args, const Product& product, int64_t begin, int64_t end,
                                int64_t block_rows, uint8_t* scratch) {
  int64_t done = begin;
  if constexpr (few_rows(kPanels) > 0) {
    if (block_rows <= few_rows(kPanels)) {
      FewPanels panels{begin, (end - begin) / kPanels, nullptr, 0};
      done += kPanels * panels.stride;
      panels.bytes = (args.repacked ? panels.stride : 1) * args.width * 8;
      for (; panels.first < begin + panels.stride; panels.first++) {
        panels.lanes = lanes_of(args, panels.first, kPanels, panels.stride, scratch);
        for (int64_t row = 0; row < args.rows; row += block_rows) {
          multiply_few_rows<Product, kPanels, few_rows(kPanels)>(smaller(block_rows, args.rows - row), args,
                                                                 product, panels, row);
        }
      }
    }
  }
  if constexpr (kPanels > 1) {
    multiply_few_panels<Product, kPanels / 2>(args, product, done, end, block_rows, scratch);
  }
}

template <class Product>
void multiply_few(const ProductArgs& args, int64_t begin, int64_t end, uint8_t* scratch) {
  const int64_t blocks = (args.rows + few_rows(1) - 1) / few_rows(1);
  multiply_few_panels<Product, kFewPanels>(args, Product(args), begin, end, (args.rows + blocks - 1) / blocks,
                                           scratch);
}

}  // namespace
}  // namespace la_aciq::cpu

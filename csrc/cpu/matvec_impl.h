// INT4 weights times a few rows of activations: each weight is read once and decoded in registers.
#pragma once

#include "cpu/common_impl.h"

namespace la_aciq::cpu {
namespace {

void arrange_activations(const float* x, int64_t rows, int64_t k, int64_t group_size, int64_t groups,
                         float* out) {
  const int64_t padded = arranged_group(group_size);
  __builtin_memset(out, 0, static_cast<size_t>(rows * groups * padded) * sizeof(float));
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t i = 0; i < k; i++) {
      const int64_t group = i / group_size, member = i % group_size;
      const int64_t chunk = member / kMatvecChunk, within = member % kMatvecChunk;
      out[(row * groups + group) * padded + chunk * kMatvecChunk + within % 2 * (kMatvecChunk / 2) +
          within / 2] = x[row * k + i];
    }
  }
}

// One output of kRows rows. The order of additions does not depend on how many rows are done at a time.
template <int kRows>
inline void matvec_output(const MatvecArgs& args, int64_t row, int64_t output, const Table16& levels) {
  const int64_t padded = arranged_group(args.group_size), width = args.groups * padded;
  const uint8_t* weight = args.weight + output * ((args.k + 1) / 2);
  const float* x = args.x + row * width;
  F32 total[kRows];
  for (F32& t : total) t = f32(0);
  for (int64_t group = 0; group < args.groups; group++) {
    const int64_t start = group * args.group_size, n = smaller(args.group_size, args.k - start);
    F32 even_sum[kRows], odd_sum[kRows];
    for (int r = 0; r < kRows; r++) even_sum[r] = odd_sum[r] = f32(0);
    const auto add_chunk = [&](const uint8_t* codes, const float* activations) {
      I32 even, odd;
      load_nibble_planes(codes, even, odd);
      const F32 even_weights = lookup(levels, even), odd_weights = lookup(levels, odd);
      for (int r = 0; r < kRows; r++) {
        even_sum[r] = muladd(even_weights, load(activations + r * width), even_sum[r]);
        odd_sum[r] = muladd(odd_weights, load(activations + r * width + kMatvecChunk / 2), odd_sum[r]);
      }
    };
    const uint8_t* codes = weight + start / 2;
    const float* activations = x + group * padded;
    int64_t i = 0;
    for (; i + kMatvecChunk <= n; i += kMatvecChunk) add_chunk(codes + i / 2, activations + i);
    if (i < n) {
      uint8_t last[kMatvecChunk / 2] = {};
      __builtin_memcpy(last, codes + i / 2, static_cast<size_t>((n - i + 1) / 2));
      add_chunk(last, activations + i);
    }
    const F32 scale = f32(value_scale(args.clips[output * args.groups + group]));
    for (int r = 0; r < kRows; r++) total[r] = muladd(add(even_sum[r], odd_sum[r]), scale, total[r]);
  }
  for (int r = 0; r < kRows; r++) {
    args.out[(row + r) * args.n + output] = sum(total[r]) + (args.bias ? args.bias[output] : 0.0f);
  }
}

void matvec(const MatvecArgs& args, int64_t begin, int64_t end) {
  const Table16 levels = levels_of(args.codebook);
  for (int64_t output = begin; output < end; output++) {
    int64_t row = 0;
    for (; row + 4 <= args.rows; row += 4) matvec_output<4>(args, row, output, levels);
    if (row + 2 <= args.rows) {
      matvec_output<2>(args, row, output, levels);
      row += 2;
    }
    if (row < args.rows) matvec_output<1>(args, row, output, levels);
  }
}

}  // namespace
}  // namespace la_aciq::cpu

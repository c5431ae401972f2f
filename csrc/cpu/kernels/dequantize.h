// Values of INT4 codes: a table of 16 levels, times the clip.
#pragma once

#include "cpu/kernels/common.h"

namespace la_aciq::cpu {
namespace {

template <class T>
inline void decode_group(const uint8_t* codes, int64_t n, float clip, const Table16& levels, T* out) {
  const F32 factor = f32(clip_or_zero(clip));
  int64_t i = 0;
  I32 first16, next16;
  for (; i + 32 <= n; i += 32) {
    load_nibbles(codes + i / 2, first16, next16);
    store(out + i, mul(lookup(levels, first16), factor));
    store(out + i + 16, mul(lookup(levels, next16), factor));
  }
  if (i < n) {
    uint8_t last[16] = {};
    T values[32];
    __builtin_memcpy(last, codes + i / 2, static_cast<size_t>((n - i + 1) / 2));
    load_nibbles(last, first16, next16);
    store(values, mul(lookup(levels, first16), factor));
    store(values + 16, mul(lookup(levels, next16), factor));
    __builtin_memcpy(out + i, values, static_cast<size_t>(n - i) * sizeof(T));
  }
}

void dequantize(const DequantizeArgs& args, int64_t begin, int64_t end) {
  const Table16 levels = levels_of(args.codebook);
  const int64_t bytes = (args.k + 1) / 2;
  with_type(args.dtype, args.out, [&](auto* out) {
    for (int64_t row = begin; row < end; row++) {
      const float* clips = args.table + args.groups * (args.per_row ? row : entry_of(args.language_ids, row));
      for (int64_t group = 0; group < args.groups; group++) {
        const int64_t start = group * args.group_size, n = smaller(args.group_size, args.k - start);
        decode_group(args.codes + row * bytes + start / 2, n, clips[group], levels,
                     out + row * args.k + start);
      }
    }
  });
}

}  // namespace
}  // namespace la_aciq::cpu

// INT4 codes of rows, under given clips or clips measured on the row, optionally after a rotation; and codes
// of a byte each for the activations of a linear layer.
#pragma once

#include "cpu/kernels/common.h"
#include "cpu/kernels/rotate.h"

namespace la_aciq::cpu {
namespace {

constexpr int kGroupsAtOnce = 64;

// Sum of the squares of the finite elements and, in count_finite, how many there are.
template <class T>
inline double finite_squares(const T* x, int64_t n, int64_t& count_finite) {
  F64 squares = f64(0);
  count_finite = 0;
  for_each_vector(x, n, [&](int64_t, F32 v, int size) {
    const Mask usable = finite(v);
    count_finite += count(usable) - (16 - size);
    const F64 first = low(keep(usable, v)), second = high(keep(usable, v));
    squares = add(squares, add(mul(first, first), mul(second, second)));
  });
  return sum(squares);
}

// The square of a float32 is exact in float64, so a fused multiply-add rounds as two operations do.
template <class T>
inline double squares(const T* x, int64_t n) {
  constexpr int kChains = 4;  // of additions, which wait for each other
  F64 low_sums[kChains], high_sums[kChains], first, second;
  low_sums[0] = high_sums[0] = f64(0);
  int64_t i = 0;
  if (n >= 4 * 16 * kChains) {
    for (int chain = 1; chain < kChains; chain++) low_sums[chain] = high_sums[chain] = f64(0);
    for (; i + 16 * kChains <= n; i += 16 * kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; chain++) {
        prefetch(x + i + 16 * chain);
        load_wide(x + i + 16 * chain, first, second);
        low_sums[chain] = muladd(first, first, low_sums[chain]);
        high_sums[chain] = muladd(second, second, high_sums[chain]);
      }
    }
    low_sums[0] = add(add(low_sums[0], low_sums[1]), add(low_sums[2], low_sums[3]));
    high_sums[0] = add(add(high_sums[0], high_sums[1]), add(high_sums[2], high_sums[3]));
  }
  for (; i + 16 <= n; i += 16) {
    prefetch(x + i);
    load_wide(x + i, first, second);
    low_sums[0] = muladd(first, first, low_sums[0]);
    high_sums[0] = muladd(second, second, high_sums[0]);
  }
  if (i < n) {
    const F32 v = load_partial(x + i, n - i);
    low_sums[0] = muladd(low(v), low(v), low_sums[0]);
    high_sums[0] = muladd(high(v), high(v), high_sums[0]);
  }
  return sum(add(low_sums[0], high_sums[0]));
}

// Largest finite |x|.
template <class T>
inline float absmax(const T* x, int64_t n) {
  F32 result = f32(0);
  for_each_vector(x, n, [&](int64_t i, F32 v, int) {
    prefetch(x + i);
    result = max(result, keep(finite(v), abs(v)));
  });
  return largest(result);
}

// Members [start, start + size) of K for group `group`.
struct GroupRange {
  int64_t start, size;
};
inline GroupRange group_range(const QuantizeArgs& args, int64_t group) {
  const int64_t start = group * args.group_size;
  return {start, smaller(args.group_size, args.k - start)};
}

// clips of groups [first, first + count): factors times sqrt(mean of squares) of the finite elements, 0
// without any. Sums come first and roots after them, so that no group waits for the root of the one before.
template <class T>
inline void rms_clips(const QuantizeArgs& args, const T* x, int64_t first, int64_t count,
                      const float* factors, float* clips) {
  double totals[kGroupsAtOnce], counts[kGroupsAtOnce];
  for (int64_t g = 0; g < count; g++) {
    const GroupRange range = group_range(args, first + g);
    totals[g] = squares(x + range.start, range.size);
    counts[g] = static_cast<double>(range.size);
    if (!is_finite(totals[g])) {
      int64_t count_finite;
      totals[g] = finite_squares(x + range.start, range.size, count_finite);
      counts[g] = count_finite > 0 ? static_cast<double>(count_finite) : 1;
    }
  }
  for (int64_t g = 0; g < count; g++) {
    clips[g] = factors[g] * static_cast<float>(__builtin_sqrt(totals[g] / counts[g]));
  }
}

// code - N/2
template <Codebook kCodebook, int kBits>
inline I32 encode(F32 x, F32 inverse) {
  constexpr int kHalf = 1 << (kBits - 1);
  const F32 scaled = mul(x, inverse), least = f32(-kHalf), most = f32(kHalf - 1);
  return kCodebook == Codebook::kMidrise ? bounded_floor(scaled, least, most)
                                         : bounded_nearest(scaled, least, most);
}

template <Codebook kCodebook, class T>
inline void encode_group(const T* x, int64_t n, float inverse_of_step, uint8_t* codes) {
  const F32 inverse = f32(inverse_of_step);
  const auto code = [&](const T* p) { return encode<kCodebook, 4>(load(p), inverse); };
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int64_t line = 0; line < 64; line += 64 / static_cast<int64_t>(sizeof(T))) prefetch(x + i + line);
    store_nibbles(codes + i / 2, {code(x + i), code(x + i + 16), code(x + i + 32), code(x + i + 48)});
  }
  if (i + 32 <= n) {
    prefetch(x + i);
    store_nibbles(codes + i / 2, code(x + i), code(x + i + 16));
    i += 32;
  }
  if (i < n) {
    uint8_t last[16];
    const int64_t rest = n - i;
    const F32 first16 = rest >= 16 ? load(x + i) : load_partial(x + i, rest);
    const F32 next16 = rest > 16 ? load_partial(x + i + 16, rest - 16) : f32(0);
    store_nibbles(last, encode<kCodebook, 4>(first16, inverse), encode<kCodebook, 4>(next16, inverse));
    if (rest % 2) last[rest / 2] &= 0x0F;
    __builtin_memcpy(codes + i / 2, last, static_cast<size_t>((rest + 1) / 2));
  }
}

template <Codebook kCodebook, int kBits, class T>
inline void encode_bytes(const T* x, int64_t n, float inverse_of_step, uint8_t* codes) {
  const F32 inverse = f32(inverse_of_step);
  for_each_vector(x, n, [&](int64_t i, F32 v, int size) {
    const I32 code = add(encode<kCodebook, kBits>(v, inverse), 1 << (kBits - 1));
    if (size == 16) {
      store_bytes(codes + i, code);
    } else {
      uint8_t last[16];
      store_bytes(last, code);
      __builtin_memcpy(codes + i, last, static_cast<size_t>(size));
    }
  });
}

// Adds to tail: finite elements, those with |x| > clip, the sum of |x| over those, non-finite elements.
template <class T>
inline void add_tail(const T* x, int64_t n, float clip, double* tail) {
  const F32 bound = f32(clip);
  F64 beyond_sum = f64(0);
  int64_t beyond = 0;
  Mask all_finite = finite(f32(0));
  for_each_vector(x, n, [&](int64_t, F32 v, int size) {
    const F32 magnitude = abs(v);
    const Mask usable = finite(v), outside = both(usable, greater(magnitude, bound));
    all_finite = both(all_finite, usable);
    // The zeros that fill the last vector are outside of a negative clip.
    beyond += count(outside) - (clip < 0 ? 16 - size : 0);
    const F32 kept = keep(outside, magnitude);
    beyond_sum = add(beyond_sum, add(low(kept), high(kept)));
  });
  int64_t count_finite = n;
  if (count(all_finite) < 16) finite_squares(x, n, count_finite);
  tail[0] += static_cast<double>(count_finite);
  tail[1] += static_cast<double>(beyond);
  tail[2] += sum(beyond_sum);
  tail[3] += static_cast<double>(n - count_finite);
}

template <Codebook kCodebook, class T>
inline void quantize_row(const QuantizeArgs& args, const T* x, int64_t row, double* tail) {
  const int32_t entry = entry_of(args.language_ids, row);
  const float* table = args.table + entry * args.groups;
  float measured[kGroupsAtOnce], inverse[kGroupsAtOnce];
  for (int64_t first = 0; first < args.groups; first += kGroupsAtOnce) {
    const int64_t count = smaller(kGroupsAtOnce, args.groups - first);
    const float* clips = table + first;
    if (args.clip == Clip::kRms) {
      rms_clips(args, x, first, count, clips, measured);
      clips = measured;
    } else if (args.clip == Clip::kAbsmax) {
      for (int64_t g = 0; g < count; g++) {
        const GroupRange range = group_range(args, first + g);
        measured[g] = clips[g] * absmax(x + range.start, range.size);
      }
      clips = measured;
    }
    for (int64_t g = 0; g < count; g++) inverse[g] = inverse_step(clips[g], args.bits);
    for (int64_t g = 0; g < count; g++) {
      const auto [start, size] = group_range(args, first + g);
      if (args.bytes && args.bits == 8) {
        encode_bytes<kCodebook, 8>(x + start, size, inverse[g], args.bytes + row * args.k + start);
      } else if (args.bytes) {
        encode_bytes<kCodebook, 4>(x + start, size, inverse[g], args.bytes + row * args.k + start);
      } else {
        encode_group<kCodebook>(x + start, size, inverse[g],
                                args.codes + row * ((args.k + 1) / 2) + start / 2);
      }
      if (tail) add_tail(x + start, size, clips[g], tail + 4 * (entry * args.groups + first + g));
    }
    if (args.row_clips) {
      __builtin_memcpy(args.row_clips + row * args.groups + first, clips,
                       static_cast<size_t>(count) * sizeof(float));
    }
  }
}

template <Codebook kCodebook>
inline void quantize_rows(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch,
                          double* tail) {
  with_type(args.dtype, args.x, [&](auto* x) {
    for (int64_t row = begin; row < end; row++) {
      if (args.rotation.signs) {
        rotate_row(x + row * args.k, args.k, args.rotation, scratch);
        quantize_row<kCodebook>(args, scratch, row, tail);
      } else {
        quantize_row<kCodebook>(args, x + row * args.k, row, tail);
      }
    }
  });
}

void quantize(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch, double* tail) {
  if (args.codebook == Codebook::kMidrise) {
    quantize_rows<Codebook::kMidrise>(args, begin, end, scratch, tail);
  } else {
    quantize_rows<Codebook::kMidtread>(args, begin, end, scratch, tail);
  }
}

}  // namespace
}  // namespace la_aciq::cpu

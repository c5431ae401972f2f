// INT4 codes of rows, under given clips or clips measured on the row, optionally after a rotation; and codes
// of a byte each for the activations of a linear layer.
#pragma once

#include "cpu/common_impl.h"
#include "cpu/rotate_impl.h"

namespace la_aciq::cpu {
namespace {

// sqrt(mean of squares) of the finite elements; 0 without any.
template <class T>
inline float rms(const T* x, int64_t n) {
  F64 squares = f64(0);
  for_each_vector(x, n, [&](int64_t, F32 v, int) {
    const F64 first = low(v), second = high(v);
    squares = add(squares, add(mul(first, first), mul(second, second)));
  });
  double total = sum(squares);
  int64_t count_finite = n;
  if (!is_finite(total)) {
    squares = f64(0);
    count_finite = 0;
    for_each_vector(x, n, [&](int64_t, F32 v, int size) {
      const Mask usable = finite(v);
      count_finite += count(usable) - (16 - size);
      const F64 first = low(keep(usable, v)), second = high(keep(usable, v));
      squares = add(squares, add(mul(first, first), mul(second, second)));
    });
    total = sum(squares);
  }
  return count_finite > 0 ? static_cast<float>(__builtin_sqrt(total / static_cast<double>(count_finite)))
                          : 0.0f;
}

// Largest finite |x|.
template <class T>
inline float absmax(const T* x, int64_t n) {
  F32 result = f32(0);
  for_each_vector(x, n, [&](int64_t, F32 v, int) { result = max(result, keep(finite(v), abs(v))); });
  return largest(result);
}

template <Codebook kCodebook, int kBits>
inline I32 encode(F32 x, F32 inverse) {
  constexpr int kHalf = 1 << (kBits - 1);
  F32 t = nan_to_zero(mul(x, inverse));
  t = min(max(t, f32(-kHalf)), f32(kHalf - 1));
  if constexpr (kCodebook == Codebook::kMidrise) t = floor(t);
  return add(to_int(t), kHalf);
}

template <Codebook kCodebook, class T>
inline void encode_group(const T* x, int64_t n, float clip, uint8_t* codes) {
  const F32 inverse = f32(inverse_step(clip, 4));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    store_nibbles(codes + i / 2, encode<kCodebook, 4>(load(x + i), inverse),
                  encode<kCodebook, 4>(load(x + i + 16), inverse));
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
inline void encode_bytes(const T* x, int64_t n, float clip, uint8_t* codes) {
  const F32 inverse = f32(inverse_step(clip, kBits));
  for_each_vector(x, n, [&](int64_t i, F32 v, int size) {
    const I32 code = encode<kCodebook, kBits>(v, inverse);
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
  int64_t count_finite = 0, beyond = 0;
  for_each_vector(x, n, [&](int64_t, F32 v, int size) {
    const Mask usable = finite(v), outside = both(usable, greater(abs(v), bound));
    count_finite += count(usable) - (16 - size);
    // The zeros that fill the last vector are outside of a negative clip.
    const int found = count(outside) - (clip < 0 ? 16 - size : 0);
    if (found) {
      beyond += found;
      const F32 kept = keep(outside, abs(v));
      beyond_sum = add(beyond_sum, add(low(kept), high(kept)));
    }
  });
  tail[0] += static_cast<double>(count_finite);
  tail[1] += static_cast<double>(beyond);
  tail[2] += sum(beyond_sum);
  tail[3] += static_cast<double>(n - count_finite);
}

template <Codebook kCodebook, class T>
inline void quantize_row(const QuantizeArgs& args, const T* x, int64_t row, double* tail) {
  const int32_t language = language_of(args.languages, row);
  const float* table = args.table + language * args.groups;
  for (int64_t group = 0; group < args.groups; group++) {
    const int64_t start = group * args.group_size, n = smaller(args.group_size, args.k - start);
    const T* members = x + start;
    float clip = table[group];
    if (args.clip == Clip::kRms) clip *= rms(members, n);
    if (args.clip == Clip::kAbsmax) clip *= absmax(members, n);
    if (args.scales) args.scales[row * args.groups + group] = clip;
    if (args.bytes && args.bits == 8) {
      encode_bytes<kCodebook, 8>(members, n, clip, args.bytes + row * args.k + start);
    } else if (args.bytes) {
      encode_bytes<kCodebook, 4>(members, n, clip, args.bytes + row * args.k + start);
    } else {
      encode_group<kCodebook>(members, n, clip, args.codes + row * ((args.k + 1) / 2) + start / 2);
    }
    if (tail) add_tail(members, n, clip, tail + 4 * (language * args.groups + group));
  }
}

template <Codebook kCodebook>
inline void quantize_rows(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch,
                          double* tail) {
  with_type(args.dtype, args.x, [&](auto* x) {
    for (int64_t row = begin; row < end; row++) {
      if (args.signs) {
        rotate_row(x + row * args.k, args.k, args.signs, args.block, scratch);
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

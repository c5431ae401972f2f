// Streaming moments: blocks that stay in the first-level cache are read twice, once for their mean and once
// for the powers about it, and merged in float64 in the order of memory.
#pragma once

#include "cpu/common_impl.h"

namespace la_aciq::cpu {
namespace {

constexpr int64_t kMomentsBlock = 2048;

inline double element(const double* x) { return *x; }
template <class T>
inline double element(const T* x) {
  float first[16];
  store(first, load_partial(x, 1));
  return first[0];
}

// |x| of up to 16 elements as float32 bits; float64 beyond the range of float32 counts as its largest value.
template <class T>
inline I32 magnitude_bits(const T* x, int n) {
  return bits_of(abs(n == 16 ? load(x) : load_partial(x, n)));
}
inline I32 magnitude_bits(const double* x, int n) {
  float narrowed[16] = {};
  for (int i = 0; i < n; i++) {
    narrowed[i] = static_cast<float>(x[i]);
    if (is_finite(x[i]) && !is_finite(narrowed[i])) narrowed[i] = 3.402823466e+38f;
  }
  return bits_of(abs(load(narrowed)));
}

// body(8 doubles) over n elements; where they do not fill the last vector, `rest` does.
template <class T, class Body>
inline __attribute__((always_inline)) void for_each_half(const T* x, int64_t n, double rest, Body body) {
  int64_t i = 0;
  if constexpr (sizeof(T) == sizeof(double)) {
    for (; i + 8 <= n; i += 8) body(load(x + i));
  } else {
    for (; i + 16 <= n; i += 16) {
      const F32 both_halves = load(x + i);
      body(low(both_halves));
      body(high(both_halves));
    }
  }
  while (i < n) {
    double padded[8];
    for (int lane = 0; lane < 8; lane++, i++) {
      if constexpr (sizeof(T) == sizeof(double)) {
        padded[lane] = i < n ? x[i] : rest;
      } else {
        padded[lane] = i < n ? element(x + i) : rest;
      }
    }
    body(load(padded));
  }
}

// n >= 1 elements, n <= kMomentsBlock.
template <class T>
MomentState block_moments(const T* x, int64_t n) {
  // The last vector is filled up with the first element, which changes neither extreme; the sum is rid of it
  // again.
  const double first = element(x);
  F64 total = f64(0), low_end = f64(first), high_end = f64(first);
  for_each_half(x, n, first, [&](F64 v) {
    total = add(total, v);
    low_end = min(low_end, v);
    high_end = max(high_end, v);
  });
  const double block_sum = sum(total) - static_cast<double>(-n & 7) * first;
  if (!is_finite(block_sum)) {
    // NaN or infinities: leave them out. (A block of huge float64 values may overflow its sum: then nothing
    // is left out, and the mean is infinite.)
    T kept[kMomentsBlock];
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
      kept[count] = x[i];
      count += is_finite(element(x + i));
    }
    if (count < n) {
      MomentState state = count > 0 ? block_moments(kept, count) : empty_moments();
      state.nonfinite = static_cast<double>(n - count);
      return state;
    }
  }

  const double center = block_sum / static_cast<double>(n);
  const F64 mean = f64(center);
  F64 s1 = f64(0), s2 = f64(0), s3 = f64(0), s4 = f64(0);
  // Here the mean fills it up, which adds nothing to any sum.
  for_each_half(x, n, center, [&](F64 v) {
    const F64 d = sub(v, mean), d2 = mul(d, d);
    s1 = add(s1, d);
    s2 = add(s2, d2);
    s3 = muladd(d2, d, s3);
    s4 = muladd(d2, d2, s4);
  });
  double lane[8], smallest = first, largest_value = first;
  store(lane, low_end);
  for (double v : lane) smallest = v < smallest ? v : smallest;
  store(lane, high_end);
  for (double v : lane) largest_value = v > largest_value ? v : largest_value;
  return moments_about(center, static_cast<double>(n), sum(s1), sum(s2), sum(s3), sum(s4), smallest,
                       largest_value);
}

typedef int64_t CountAndSum __attribute__((vector_size(16)));

inline void count_in_histogram(int64_t* histogram, int32_t magnitude_bits, int32_t in_bin) {
  int64_t* entry = histogram + 2 * in_bin;
  CountAndSum counted;
  __builtin_memcpy(&counted, entry, sizeof(counted));
  counted += CountAndSum{1, magnitude_bits & 0xFFFFF};
  __builtin_memcpy(entry, &counted, sizeof(counted));
}

// Adds finite elements to histogram [258, 2].
template <class T>
void block_histogram(const T* x, int64_t n, int64_t* histogram) {
  for (int64_t i = 0; i < n; i += 16) {
    int32_t bits[16];
    const int size = static_cast<int>(smaller(16, n - i));
    store(bits, magnitude_bits(x + i, size));
    for (int j = 0; j < size; j++) {
      if (bits[j] < 0x7F800000) count_in_histogram(histogram, bits[j], histogram_bin(bits[j]));
    }
  }
  // The two end bins have no edges to measure from.
  histogram[1] = histogram[2 * (kHistogramBins - 1) + 1] = 0;
}

template <class T>
void moments_of(const T* x, const Languages& languages, int64_t begin, int64_t end, MomentState* states,
                int64_t* histogram) {
  for (int64_t i = begin; i < end;) {
    const int32_t row = language_of(languages, i);
    const int64_t span_end = languages.ids ? smaller(end, (i / languages.span + 1) * languages.span) : end;
    while (i < span_end) {
      const int64_t n = smaller(kMomentsBlock, span_end - i);
      merge_moments(states[row], block_moments(x + i, n));
      if (histogram) block_histogram(x + i, n, histogram + 2 * kHistogramBins * row);
      i += n;
    }
  }
}

void moments(const MomentsArgs& args, int64_t begin, int64_t end, MomentState* states, int64_t* histogram) {
  if (args.dtype == DType::kFloat64) {
    moments_of(static_cast<const double*>(args.x), args.languages, begin, end, states, histogram);
    return;
  }
  with_type(args.dtype, args.x,
            [&](auto* x) { moments_of(x, args.languages, begin, end, states, histogram); });
}

}  // namespace
}  // namespace la_aciq::cpu

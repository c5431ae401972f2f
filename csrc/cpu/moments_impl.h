// Streaming moments: sums of powers about an element of the block, in one pass and in float64, made central
// at the end of the block and merged in the order of memory.
#pragma once

#include "cpu/common_impl.h"

namespace la_aciq::cpu {
namespace {

constexpr int64_t kMomentsBlock = 4096;

inline double element(const double* x) { return *x; }
template <class T>
inline double element(const T* x) {
  float first[16];
  store(first, load_partial(x, 1));
  return first[0];
}

// Float64 beyond the range of float32 becomes its largest value.
inline F32 narrowed(const double* x, int n) {
  float narrow[16] = {};
  for (int i = 0; i < n; i++) {
    narrow[i] = static_cast<float>(x[i]);
    if (is_finite(x[i]) && !is_finite(narrow[i])) narrow[i] = 3.402823466e+38f;
  }
  return load(narrow);
}

// Sums of (x - center)^p. Where elements do not fill the last vector, center does: it adds nothing.
struct PowerSums {
  F64 s1 = f64(0), s2 = f64(0), s3 = f64(0), s4 = f64(0);

  inline __attribute__((always_inline)) void add_elements(F64 x, F64 center) {
    const F64 d = sub(x, center), d2 = mul(d, d);
    s1 = add(s1, d);
    s2 = add(s2, d2);
    s3 = muladd(d2, d, s3);
    s4 = muladd(d2, d2, s4);
  }
};

constexpr auto no_histogram = [](const F32&, int) {};

// One pass over n >= 1 elements, n <= kMomentsBlock, that also calls histogram(16 elements in float32, number
// of them that count). center lies between them (equality allowed) and is a float32, or a float64 where the
// elements are.
template <class T, class Histogram>
MomentState block_moments(const T* x, int64_t n, double center, Histogram&& histogram,
                          bool may_center_again = true) {
  const F64 shift = f64(center);
  PowerSums even, odd;
  double smallest = center, largest_value = center;
  const auto widen_range = [&](auto low_end, auto high_end, auto* lane, int lanes) {
    store(lane, low_end);
    for (int i = 0; i < lanes; i++) smallest = lane[i] < smallest ? lane[i] : smallest;
    store(lane, high_end);
    for (int i = 0; i < lanes; i++) largest_value = lane[i] > largest_value ? lane[i] : largest_value;
  };
  if constexpr (sizeof(T) == sizeof(double)) {
    F64 low_end = shift, high_end = shift;
    double lane[8];
    for (int64_t i = 0; i < n; i += 16) {
      const int size = static_cast<int>(smaller(16, n - i));
      histogram(narrowed(x + i, size), size);
    }
    for (int64_t i = 0; i < n; i += 8) {
      prefetch(x + i);
      const bool whole = i + 8 <= n;
      for (int j = 0; j < 8 && !whole; j++) lane[j] = i + j < n ? x[i + j] : center;
      const F64 v = load(whole ? x + i : lane);
      (i / 8 % 2 ? odd : even).add_elements(v, shift);
      low_end = min(low_end, v);
      high_end = max(high_end, v);
    }
    widen_range(low_end, high_end, lane, 8);
  } else {
    const F32 fill = f32(static_cast<float>(center));
    F32 low_end = fill, high_end = fill;
    float lane[16];
    for_each_vector(x, n, [&](int64_t i, F32 v, int size) {
      prefetch(x + i);
      histogram(v, size);
      if (size < 16) {
        store(lane, fill);
        store_partial(lane, v, size);
        v = load(lane);
      }
      even.add_elements(low(v), shift);
      odd.add_elements(high(v), shift);
      low_end = min(low_end, v);
      high_end = max(high_end, v);
    });
    widen_range(low_end, high_end, lane, 16);
  }

  const double s1 = sum(add(even.s1, odd.s1)), s2 = sum(add(even.s2, odd.s2));
  if (!is_finite(s1)) {
    // NaN or infinities: leave them out. (Huge float64 values may overflow a sum: then nothing is left out,
    // and the moments are not finite.)
    T kept[kMomentsBlock];
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
      kept[count] = x[i];
      count += is_finite(element(x + i));
    }
    if (count < n) {
      MomentState state =
          count > 0 ? block_moments(kept, count, element(kept), no_histogram) : empty_moments();
      state.nonfinite = static_cast<double>(n - count);
      return state;
    }
  }
  // An element far from all others is a bad center: the powers about the mean would be small differences of
  // large sums. Four standard deviations cost two of sixteen digits.
  if (may_center_again && s1 * s1 > 0.9375 * static_cast<double>(n) * s2) {
    const double mean = center + s1 / static_cast<double>(n);
    const double bounded = mean < smallest ? smallest : mean > largest_value ? largest_value : mean;
    return block_moments(x, n, sizeof(T) == sizeof(double) ? bounded : static_cast<float>(bounded),
                         no_histogram,
                         /*may_center_again=*/false);
  }
  return moments_about(center, static_cast<double>(n), s1, s2, sum(add(even.s3, odd.s3)),
                       sum(add(even.s4, odd.s4)), smallest, largest_value);
}

// histogram_bin of common/moments.h for vectors: the bits of |x| at the start of the first bin and of the
// last.
constexpr int32_t kFirstBinBits = ((111 << 3) - 1) << 20;
constexpr int32_t kLastBinBits = kFirstBinBits + ((kHistogramBins - 1) << 20);

// The bin of |x| in the upper 12 bits, its place in the bin in the lower 20; what is not finite goes to the
// last bin.
inline I32 bin_and_place(F32 x) {
  const I32 magnitude = min(bits_of(abs(x)), i32(kLastBinBits));
  return add(max(magnitude, i32(kFirstBinBits)), -kFirstBinBits);
}

// Adds the counts to histogram [258, 2] and takes them out of the lanes.
void unpack_histogram(HistogramLanes& lanes, int64_t* histogram) {
  for (int bin = 0; bin < kHistogramBins; bin++) {
    int64_t counts = 0, places = 0;
    for (auto& lane : lanes.entries) {
      const int64_t n = static_cast<int64_t>(lane[bin] >> kCountShift);
      counts += n;
      places += static_cast<int64_t>(lane[bin] & ((1ull << kCountShift) - 1)) -
                n * (static_cast<int64_t>(bin) << 20);
      lane[bin] = 0;
    }
    histogram[2 * bin] += counts;
    // The two end bins have no edges to measure from.
    if (bin > 0 && bin < kHistogramBins - 1) histogram[2 * bin + 1] += places;
  }
  lanes.counted = 0;
}

// Counts a block of elements in the lanes of its language. Counting an element takes a load, an addition and
// a store through an address that comes from the element; it follows the vectors that compute addresses by
// kBehind elements, so that these are read from the cache and not from the queue of pending stores.
struct LaneCounter {
  static constexpr int64_t kBehind = 64;
  HistogramLanes& lanes;
  int64_t filled = 0, counted = 0;
  int32_t found[kMomentsBlock];

  // cppcheck-suppress uninitMemberVar ; each place in `found` is stored before it is counted
  explicit LaneCounter(HistogramLanes& own) : lanes(own) {}

  inline __attribute__((always_inline)) void count(int64_t i, int lane) {
    const uint64_t bin_place = static_cast<uint32_t>(found[i]);
    lanes.entries[lane][bin_place >> 20] += (1ull << kCountShift) + bin_place;
  }
  inline __attribute__((always_inline)) void operator()(const F32& x, int size) {
    store(found + filled, bin_and_place(x));
    filled += size;
    if (filled >= kBehind + 16) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++) count(counted + j, j % kHistogramLanes);
      counted += 16;
    }
  }
  void finish() {
    for (; counted < filled; counted++) count(counted, static_cast<int>(counted % kHistogramLanes));
  }
};

// Counts in the histogram itself: for a few elements, or more languages than lanes are kept for.
struct DirectCounter {
  int64_t* histogram;

  void operator()(const F32& x, int size) {
    int32_t found[16];
    store(found, bin_and_place(x));
    for (int j = 0; j < size; j++) {
      histogram[2 * (found[j] >> 20)] += 1;
      histogram[2 * (found[j] >> 20) + 1] += found[j] & 0xFFFFF;
    }
    histogram[1] = histogram[2 * kHistogramBins - 1] = 0;  // the two end bins have no edges to measure from
  }
};

template <class T>
void moments_of(const T* x, const Languages& languages, int64_t begin, int64_t end, MomentState* states,
                HistogramLanes* lanes, int64_t* histograms) {
  for (int64_t i = begin; i < end;) {
    const int32_t row = language_of(languages, i);
    int64_t* const histogram = histograms ? histograms + 2 * kHistogramBins * row : nullptr;
    const int64_t span_end = languages.ids ? smaller(end, (i / languages.span + 1) * languages.span) : end;
    while (i < span_end) {
      const int64_t n = smaller(kMomentsBlock, span_end - i);
      const double first = element(x + i);
      MomentState state;
      if (histogram == nullptr) {
        state = block_moments(x + i, n, first, no_histogram);
      } else if (lanes == nullptr) {
        state = block_moments(x + i, n, first, DirectCounter{histogram});
      } else {
        // Every lane counts at most its share of this number.
        const int64_t whole_vectors = (n + 15) / 16 * 16;
        if (lanes[row].counted + whole_vectors > kMaxCounted) unpack_histogram(lanes[row], histogram);
        lanes[row].counted += whole_vectors;
        LaneCounter counter(lanes[row]);
        state = block_moments(x + i, n, first, counter);
        counter.finish();
      }
      if (histogram) histogram[2 * (kHistogramBins - 1)] -= static_cast<int64_t>(state.nonfinite);
      merge_moments(states[row], state);
      i += n;
    }
  }
}

void moments(const MomentsArgs& args, int64_t begin, int64_t end, MomentState* states, HistogramLanes* lanes,
             int64_t* histograms) {
  if (args.dtype == DType::kFloat64) {
    moments_of(static_cast<const double*>(args.x), args.languages, begin, end, states, lanes, histograms);
    return;
  }
  with_type(args.dtype, args.x,
            [&](auto* x) { moments_of(x, args.languages, begin, end, states, lanes, histograms); });
}

}  // namespace
}  // namespace la_aciq::cpu

// Streaming moments: sums of powers about an element of the block, in one pass and in float64, made central
// at the end of the block and merged in the order of memory.
#pragma once

#include "cpu/kernels/common.h"

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
template <bool kAboutZero>
struct PowerSums {
  F64 s1 = f64(0), s2 = f64(0), s3 = f64(0), s4 = f64(0);

  inline __attribute__((always_inline)) void add_elements(F64 x, F64 center) {
    const F64 d = kAboutZero ? x : sub(x, center), d2 = mul(d, d);
    s1 = add(s1, d);
    s2 = muladd(d, d, s2);
    s3 = muladd(d2, d, s3);
    s4 = muladd(d2, d2, s4);
  }
  void merge(const PowerSums& other) {
    s1 = add(s1, other.s1);
    s2 = add(s2, other.s2);
    s3 = add(s3, other.s3);
    s4 = add(s4, other.s4);
  }
};

constexpr auto no_histogram = [](const F32&, int) {};

// One pass over n >= 1 elements, n <= kMomentsBlock, that also calls histogram(16 elements in float32, number
// of them that count). center is 0 (kAboutZero, which saves subtracting it), or a float32 or, where the
// elements are, a float64. centered_again, where it is given, tells that the elements lie so far from center
// that it had to be done over about their mean.
template <bool kAboutZero, class T, class Histogram>
MomentState block_moments(const T* x, int64_t n, double center, Histogram&& histogram,
                          bool* centered_again = nullptr) {
  const F64 shift = f64(center);
  PowerSums<kAboutZero> sums[kPowerSums];
  const double first_element = element(x);
  double smallest = first_element, largest_value = first_element;
  const auto widen_range = [&](auto low_end, auto high_end, auto* lane, int lanes) {
    store(lane, low_end);
    for (int i = 0; i < lanes; i++) smallest = lane[i] < smallest ? lane[i] : smallest;
    store(lane, high_end);
    for (int i = 0; i < lanes; i++) largest_value = lane[i] > largest_value ? lane[i] : largest_value;
  };
  if constexpr (sizeof(T) == sizeof(double)) {
    F64 low_end = f64(first_element), high_end = low_end;
    double lane[8];
    for (int64_t i = 0; i < n; i += 16) {
      const int size = static_cast<int>(smaller(16, n - i));
      histogram(narrowed(x + i, size), size);
    }
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      prefetch(x + i);
      const F64 v = load(x + i);
      sums[i / 8 % 2].add_elements(v, shift);
      low_end = min(low_end, v);
      high_end = max(high_end, v);
    }
    if (i < n) {
      for (int j = 0; j < 8; j++) lane[j] = i + j < n ? x[i + j] : center;
      sums[0].add_elements(load(lane), shift);
      for (int j = 0; j < 8; j++) lane[j] = i + j < n ? x[i + j] : first_element;
      low_end = min(low_end, load(lane));
      high_end = max(high_end, load(lane));
    }
    widen_range(low_end, high_end, lane, 8);
  } else {
    const F32 fill = f32(static_cast<float>(first_element));
    F32 low_end = fill, high_end = fill;
    float lane[16];
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      F32 first16, next16;
      F64 part[4];
      load_unordered(x + i, first16, next16);
      if constexpr (sizeof(T) == sizeof(float)) {
        prefetch(x + i + 16);
        load_wide(x + i, part[0], part[1]);
        load_wide(x + i + 16, part[2], part[3]);
      } else {
        part[0] = low(first16), part[1] = high(first16), part[2] = low(next16), part[3] = high(next16);
      }
      prefetch(x + i);
      histogram(first16, 16);
      histogram(next16, 16);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sums[j % kPowerSums].add_elements(part[j], shift);
      low_end = min(low_end, min(first16, next16));
      high_end = max(high_end, max(first16, next16));
    }
    for (; i < n; i += 16) {
      const int size = static_cast<int>(smaller(16, n - i));
      F32 v = size == 16 ? load(x + i) : load_partial(x + i, size), in_range = v;
      histogram(v, size);
      if (size < 16) {
        store(lane, f32(static_cast<float>(center)));
        store_partial(lane, v, size);
        const F32 filled = load(lane);
        store(lane, fill);
        store_partial(lane, v, size);
        in_range = load(lane);
        v = filled;
      }
      sums[0].add_elements(low(v), shift);
      sums[1].add_elements(high(v), shift);
      low_end = min(low_end, in_range);
      high_end = max(high_end, in_range);
    }
    widen_range(low_end, high_end, lane, 16);
  }
  for (int i = 1; i < kPowerSums; i++) sums[0].merge(sums[i]);

  const double s1 = sum(sums[0].s1), s2 = sum(sums[0].s2);
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
          count > 0 ? block_moments<false>(kept, count, element(kept), no_histogram) : empty_moments();
      state.nonfinite = static_cast<double>(n - count);
      return state;
    }
  }
  // A center far from all elements is a bad one: the powers about the mean would be small differences of
  // large sums. Four standard deviations cost two of sixteen digits.
  if (centered_again && s1 * s1 > 0.9375 * static_cast<double>(n) * s2) {
    *centered_again = true;
    const double mean = center + s1 / static_cast<double>(n);
    const double bounded = mean < smallest ? smallest : mean > largest_value ? largest_value : mean;
    return block_moments<false>(x, n, sizeof(T) == sizeof(double) ? bounded : static_cast<float>(bounded),
                                no_histogram);
  }
  return moments_about(center, static_cast<double>(n), s1, s2, sum(sums[0].s3), sum(sums[0].s4), smallest,
                       largest_value);
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

// Counts a block of elements in the lanes of its entry. Counting an element takes a load, an addition and
// a store through an address that comes from the element; it follows the vectors that compute addresses by
// kBehind elements, so that these are read from the cache and not from the queue of pending stores.
struct LaneCounter {
  static constexpr int64_t kBehind = 64;
  HistogramLanes& lanes;
  int64_t filled = 0, counted = 0;
  int32_t bins_and_places[kMomentsBlock];

  // cppcheck-suppress uninitMemberVar ; each place in `bins_and_places` is stored before it is counted
  explicit LaneCounter(HistogramLanes& own) : lanes(own) {}

  inline __attribute__((always_inline)) void count(int64_t i, int lane) {
    const uint64_t bin_place = static_cast<uint32_t>(bins_and_places[i]);
    lanes.entries[lane][bin_place >> 20] += (1ull << kCountShift) + bin_place;
  }
  inline __attribute__((always_inline)) void operator()(const F32& x, int size) {
    store(bins_and_places + filled, bin_and_place(x));
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

// Counts in the histogram itself: for a few elements, or more entries than lanes are kept for.
struct DirectCounter {
  int64_t* histogram;

  void operator()(const F32& x, int size) {
    int32_t bins_and_places[16];
    store(bins_and_places, bin_and_place(x));
    for (int j = 0; j < size; j++) {
      histogram[2 * (bins_and_places[j] >> 20)] += 1;
      histogram[2 * (bins_and_places[j] >> 20) + 1] += bins_and_places[j] & 0xFFFFF;
    }
    histogram[1] = histogram[2 * kHistogramBins - 1] = 0;  // the two end bins have no edges to measure from
  }
};

template <class T>
void moments_of(const T* x, const LanguageIds& language_ids, int64_t begin, int64_t end, MomentState* states,
                HistogramLanes* lanes, int64_t* histograms) {
  bool far_from_zero = false;  // what elements are like that lie together
  for (int64_t i = begin; i < end;) {
    const int32_t entry = entry_of(language_ids, i);
    int64_t* const histogram = histograms ? histograms + 2 * kHistogramBins * entry : nullptr;
    const int64_t span_end =
        language_ids.ids ? smaller(end, (i / language_ids.span + 1) * language_ids.span) : end;
    while (i < span_end) {
      const int64_t n = smaller(kMomentsBlock, span_end - i);
      const auto of_block = [&](auto&& count) {
        return far_from_zero ? block_moments<false>(x + i, n, element(x + i), count, &far_from_zero)
                             : block_moments<true>(x + i, n, 0, count, &far_from_zero);
      };
      MomentState state;
      if (histogram == nullptr) {
        state = of_block(no_histogram);
      } else if (lanes == nullptr) {
        state = of_block(DirectCounter{histogram});
      } else {
        // Every lane counts at most its share of this number.
        const int64_t whole_vectors = (n + 15) / 16 * 16;
        if (lanes[entry].counted + whole_vectors > kMaxCounted) unpack_histogram(lanes[entry], histogram);
        lanes[entry].counted += whole_vectors;
        LaneCounter counter(lanes[entry]);
        state = of_block(counter);
        counter.finish();
      }
      if (histogram) histogram[2 * (kHistogramBins - 1)] -= static_cast<int64_t>(state.nonfinite);
      merge_moments(states[entry], state);
      i += n;
    }
  }
}

void moments(const MomentsArgs& args, int64_t begin, int64_t end, MomentState* states, HistogramLanes* lanes,
             int64_t* histograms) {
  if (args.dtype == DType::kFloat64) {
    moments_of(static_cast<const double*>(args.x), args.language_ids, begin, end, states, lanes, histograms);
    return;
  }
  with_type(args.dtype, args.x,
            [&](auto* x) { moments_of(x, args.language_ids, begin, end, states, lanes, histograms); });
}

}  // namespace
}  // namespace la_aciq::cpu

// Moments per entry, in one pass over x, and the log-histogram of |x|.
//
// Rows are cut in pieces; the pieces in the order of their entries are cut in tiles of a fixed number
// (sorted_rows.cuh), a warp per tile. Sums are of powers of d = x - pivot, where the pivot is a value of the
// data itself, the same for the whole run: no cancellation when the mean is far from zero. Eight elements are
// summed in float32, which costs one float64 addition per power and vector; vectors that float32 cannot hold
// (something is not finite, powers overflow or lose digits) are summed in float64 element by element. At the
// end of a run lane 0 turns the warp's sums into a state about the mean; the second kernel merges states in
// float64.
//
// The histogram is counted per warp in shared memory with integer atomics, whose order does not matter, and
// added to memory at the end of a run.
#pragma once

#include "cuda/sorted_rows.cuh"

namespace la_aciq::cuda {

constexpr int kMomentThreads = 256;
constexpr int kMergeThreads = 512;
constexpr int64_t kMomentPiece = 4096;         // elements of a row handled as one
constexpr int64_t kMomentTileElements = 8192;  // a warp's share of a small input
constexpr int64_t kMomentTiles = 8192;         // and how many shares there are at most
constexpr int kLoads = 2;                      // vectors on their way before the first is used
constexpr int kVectorsBetweenDrains = 16;      // 16 * 32 * 8 elements of 20 bits fill a 32-bit sum

struct MomentArgs {
  Matrix x;
  SortedRows sorted;
  int64_t piece, pieces;          // elements per piece, pieces per row
  int64_t tile, tiles;            // pieces per tile, number of tiles
  MomentState* partials;          // [tiles + num_entries]
  unsigned long long* histogram;  // [num_entries, 258, 2] or null
};

// Division of numbers that mostly fit 32 bits.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

template <class T>
struct Real {
  using type = float;
};
template <>
struct Real<double> {
  using type = double;
};

__device__ __forceinline__ double to_float(double x) {
  return x;
}

// Sums of one thread; C is float, or double for float64 data.
template <class C>
struct PowerSums {
  double s1 = 0, s2 = 0, s3 = 0, s4 = 0;
  C low = static_cast<C>(INFINITY), high = static_cast<C>(-INFINITY);
  uint32_t finite = 0, nonfinite = 0;

  __device__ __forceinline__ void add_exactly(const C (&v)[8], int used, C pivot) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i >= used) continue;
      if (!is_finite(v[i])) {
        nonfinite++;
        continue;
      }
      const double d = static_cast<double>(v[i]) - static_cast<double>(pivot), square = d * d;
      finite++;
      s1 += d;
      s2 += square;
      s3 += square * d;
      s4 += square * square;
      low = v[i] < low ? v[i] : low;
      high = v[i] > high ? v[i] : high;
    }
  }

  __device__ __forceinline__ void add(const C (&v)[8], int used, C pivot) {
    if constexpr (sizeof(C) == 8) {
      add_exactly(v, used, pivot);
    } else {
      float f1 = 0, f2 = 0, f3 = 0, f4 = 0, least = v[0], most = v[0];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float d = v[i] - pivot, square = d * d;
        f1 += d;
        f2 += square;
        f3 = __fmaf_rn(square, d, f3);
        f4 = __fmaf_rn(square, square, f4);
        least = fminf(least, v[i]);
        most = fmaxf(most, v[i]);
      }
      const bool all_equal = f4 == 0.0f && least == pivot && most == pivot;
      if (used == 8 && ((f4 > 1e-28f && f4 < 1e38f) || all_equal)) {
        finite += 8;
        s1 += f1;
        s2 += f2;
        s3 += f3;
        s4 += f4;
        low = fminf(low, least);
        high = fmaxf(high, most);
      } else {
        add_exactly(v, used, pivot);
      }
    }
  }
};

// A warp's histogram: counts, and sums of mantissas since the last drain. The lanes hold the drained sums,
// lane l those of bins l, l + 32, ...
constexpr int kBinsPerLane = (kHistogramBins + kWarp - 1) / kWarp;

struct WarpHistogram {
  uint32_t* count;
  uint32_t* mantissa;
  unsigned long long drained[kBinsPerLane];

  __device__ __forceinline__ void clear(int lane) {
#pragma unroll
    for (int i = 0; i < kBinsPerLane; i++) {
      drained[i] = 0;
      const int bin = lane + kWarp * i;
      if (bin < kHistogramBins) count[bin] = mantissa[bin] = 0;
    }
    __syncwarp();
  }

  template <class C>
  __device__ __forceinline__ void add(const C (&v)[8], int used) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i >= used || !is_finite(v[i])) continue;
      const C magnitude = v[i] < 0 ? -v[i] : v[i];
      const float in_range = static_cast<float>(
          magnitude < static_cast<C>(3.402823466e+38f) ? magnitude : static_cast<C>(3.402823466e+38f));
      const uint32_t bits = __float_as_uint(in_range) & 0x7FFFFFFF;
      const int bin = histogram_bin(static_cast<int32_t>(bits));
      atomicAdd(count + bin, 1u);
      if (bin > 0 && bin < kHistogramBins - 1) atomicAdd(mantissa + bin, bits & 0xFFFFFu);
    }
  }

  __device__ __forceinline__ void drain(int lane) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBinsPerLane; i++) {
      const int bin = lane + kWarp * i;
      if (bin >= kHistogramBins) continue;
      drained[i] += mantissa[bin];
      mantissa[bin] = 0;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void flush(unsigned long long* histogram, int lane) {
    drain(lane);
#pragma unroll
    for (int i = 0; i < kBinsPerLane; i++) {
      const int bin = lane + kWarp * i;
      if (bin >= kHistogramBins || count[bin] == 0) continue;
      atomicAdd(histogram + 2 * bin, static_cast<unsigned long long>(count[bin]));
      atomicAdd(histogram + 2 * bin + 1, drained[i]);
    }
    __syncwarp();
  }
};

template <class T, class C, bool kAligned>
__device__ __forceinline__ void load_eight(C (&v)[8], const T* p, int used) {
  if constexpr (kAligned) {
    const Pack<T, 8> pack = load_pack<T, 8>(p);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_float(pack.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = i < used ? to_float(__ldg(p + i)) : C(0);
  }
}

// The middle one of the first three elements: an isolated outlier makes a bad pivot.
template <class C, class T>
__device__ __forceinline__ C choose_pivot(const T* p, int64_t elements) {
  const C a = to_float(__ldg(p)), b = elements > 2 ? to_float(__ldg(p + 1)) : a,
          c = elements > 2 ? to_float(__ldg(p + 2)) : a;
  const C low = a < b ? a : b, high = a < b ? b : a, middle = c < low ? low : c > high ? high : c;
  return is_finite(middle) ? middle : is_finite(a) ? a : C(0);
}

template <class T, bool kAligned, bool kHistogram>
__global__ void __launch_bounds__(kMomentThreads, kHistogram || sizeof(T) == 8 ? 2 : 3)
    moments_kernel(const MomentArgs args) {
  using C = typename Real<T>::type;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * (kMomentThreads / kWarp) + warp;
  if (tile >= args.tiles) return;
  WarpHistogram histogram;
  if constexpr (kHistogram) {
    histogram.count = static_cast<uint32_t*>(shared_memory()) + warp * 2 * kHistogramBins;
    histogram.mantissa = histogram.count + kHistogramBins;
  }
  const int64_t positions = args.x.rows * args.pieces, first = tile * args.tile;
  const int64_t end = first + args.tile < positions ? first + args.tile : positions;
  // Lanes that share a piece, so that short pieces keep all lanes busy.
  const int vectors = static_cast<int>((args.piece + 7) / 8);
  int across = 1;
  while (across < kWarp && across < vectors) across *= 2;
  const int down = kWarp / across, vectors_per_lane = (vectors + across - 1) / across;

  for (int64_t begin = first; begin < end;) {
    const int64_t first_row = divide(begin, args.pieces);
    const int32_t entry = entry_at(args.sorted, first_row);
    int64_t run_end = first_position(args.sorted, args.x.rows, static_cast<int64_t>(entry) + 1) * args.pieces;
    if (run_end > end) run_end = end;
    const int64_t piece_of_row = begin - first_row * args.pieces;
    const T* run = static_cast<const T*>(args.x.data) + row_at(args.sorted, first_row) * args.x.stride +
                   piece_of_row * args.piece;
    const C pivot = choose_pivot<C>(run, args.x.k - piece_of_row * args.piece);
    PowerSums<C> sums;
    if constexpr (kHistogram) histogram.clear(lane);

    // Every lane takes the same number of steps; those past the end of the run or of a short piece find
    // nothing to add.
    int64_t position = begin + lane / across;
    int vector = lane % across, left_in_piece = 0;
    const T* piece = nullptr;
    const int64_t steps = ceil_divide(run_end - begin, down) * vectors_per_lane;
    int64_t since_drain = 0;
    for (int64_t step = 0; step < steps; step += kLoads) {
      C v[kLoads][8];
      int used[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        if (piece == nullptr && position < run_end) {
          const int64_t row = divide(position, args.pieces),
                        start = (position - row * args.pieces) * args.piece;
          piece = static_cast<const T*>(args.x.data) + row_at(args.sorted, row) * args.x.stride + start;
          left_in_piece = static_cast<int>(args.x.k - start < args.piece ? args.x.k - start : args.piece);
        }
        const int left = position < run_end ? left_in_piece - 8 * vector : 0;
        used[i] = left < 0 ? 0 : left < 8 ? left : 8;
        if (used[i] > 0) load_eight<T, C, kAligned>(v[i], piece + 8 * vector, used[i]);
        vector += across;
        if (vector >= across * vectors_per_lane) {
          vector = lane % across;
          position += down;
          piece = nullptr;
        }
      }
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        if (used[i] == 0) continue;
        sums.add(v[i], used[i], pivot);
        if constexpr (kHistogram) histogram.add(v[i], used[i]);
      }
      if constexpr (kHistogram) {
        since_drain += kLoads;
        if (since_drain >= kVectorsBetweenDrains) {
          histogram.drain(lane);
          since_drain = 0;
        }
      }
    }

    const uint32_t finite = reduce_lanes(sums.finite, kWarp, Add()),
                   nonfinite = reduce_lanes(sums.nonfinite, kWarp, Add());
    const double s1 = reduce_lanes(sums.s1, kWarp, Add()), s2 = reduce_lanes(sums.s2, kWarp, Add());
    const double s3 = reduce_lanes(sums.s3, kWarp, Add()), s4 = reduce_lanes(sums.s4, kWarp, Add());
    const C low = reduce_lanes(sums.low, kWarp, Smaller()), high = reduce_lanes(sums.high, kWarp, Larger());
    if (lane == 0) {
      MomentState state =
          finite == 0 ? empty_moments() : moments_about(pivot, finite, s1, s2, s3, s4, low, high);
      state.nonfinite = nonfinite;
      args.partials[tile + entry] = state;
    }
    if constexpr (kHistogram)
      histogram.flush(args.histogram + static_cast<int64_t>(entry) * 2 * kHistogramBins, lane);
    begin = run_end;
  }
}

// --- Merging ---

// The union of the states of all lanes, in order of lanes.
__device__ __forceinline__ MomentState merge_lanes(MomentState state, int lane) {
#pragma unroll 1
  for (int distance = 1; distance < kWarp; distance *= 2) {
    MomentState other;
    other.count = __shfl_xor_sync(kFullWarp, state.count, distance);
    other.mean = __shfl_xor_sync(kFullWarp, state.mean, distance);
    other.m2 = __shfl_xor_sync(kFullWarp, state.m2, distance);
    other.m3 = __shfl_xor_sync(kFullWarp, state.m3, distance);
    other.m4 = __shfl_xor_sync(kFullWarp, state.m4, distance);
    other.min = __shfl_xor_sync(kFullWarp, state.min, distance);
    other.max = __shfl_xor_sync(kFullWarp, state.max, distance);
    other.nonfinite = __shfl_xor_sync(kFullWarp, state.nonfinite, distance);
    if (lane & distance) {
      merge_moments(other, state);
      state = other;
    } else {
      merge_moments(state, other);
    }
  }
  return state;
}

// A block per entry.
__global__ void __launch_bounds__(kMergeThreads)
    merge_moments_kernel(const MomentArgs args, MomentState* states) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp,
            warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t entry = blockIdx.x;
  const int64_t begin = first_position(args.sorted, args.x.rows, entry) * args.pieces;
  const int64_t end = first_position(args.sorted, args.x.rows, entry + 1) * args.pieces;
  MomentState state = empty_moments();
  if (end > begin) {
    const int64_t last = (end - 1) / args.tile;
#pragma unroll 1
    for (int64_t tile = begin / args.tile + thread; tile <= last; tile += blockDim.x) {
      merge_moments(state, args.partials[tile + entry]);
    }
  }
  state = merge_lanes(state, lane);
  auto* of_warps = static_cast<MomentState*>(shared_memory());
  if (lane == 0) of_warps[thread / kWarp] = state;
  __syncthreads();
  if (thread >= kWarp) return;
  state = merge_lanes(lane < warps ? of_warps[lane] : empty_moments(), lane);
  if (lane == 0) states[entry] = state;
}

}  // namespace la_aciq::cuda

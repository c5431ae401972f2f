// INT4 codes, or rounded values, of elements under given clips: one streaming pass.
//
// Layout: a block covers 256 / across rows, `across` threads side by side on each (row_tiles). A thread reads
// its row's entry once, then handles pieces of kWidth elements, `across` pieces apart: 8 where rows are
// aligned and groups are multiples of 8 (16-byte loads, 4-byte stores, a warp's accesses contiguous), else 2
// (one byte of codes). Up to kUnroll loads are in flight before the first is used.
//
// Tail sums: tiles of kTailRows rows in the order of their entries (sorted_rows.cuh); a thread keeps to one
// piece of the columns.
#pragma once

#include "cuda/sorted_rows.cuh"

namespace la_aciq::cuda {

constexpr int kUnroll = 4;
constexpr int kTailRows = 64;
constexpr int kTailThreads = 128;

// As loaded: 16-bit elements widen only when they are used, which leaves registers for loads in flight.
template <class T, int kWidth>
struct Piece {
  Pack<T, kWidth> pack;

  // Of the elements left in the row; zeros after them.
  __device__ __forceinline__ void load(const T* p, int64_t left) {
    if constexpr (kWidth == 8) {
      pack = load_pack<T, 8>(p);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; i++) pack.element[i] = i < left ? __ldg(p + i) : T{};
    }
  }

  __device__ __forceinline__ void widen(float (&value)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; i++) value[i] = to_float(pack.element[i]);
  }

  __device__ __forceinline__ void store_codes(uint8_t* codes, float inverse, Codebook codebook,
                                              int64_t left) const {
    float value[kWidth];
    widen(value);
    const uint32_t nibbles = encode_nibbles(value, inverse, codebook);
    if constexpr (kWidth == 8) {
      *reinterpret_cast<uint32_t*>(codes) = nibbles;
    } else {
      *codes = static_cast<uint8_t>(left == 1 ? nibbles & 15 : nibbles);
    }
  }

  __device__ __forceinline__ void store_values(T* out, float clip, Codebook codebook, int bits,
                                               int64_t left) const {
    const float inverse = inverse_step(clip, bits), valid_clip = clip_or_zero(clip);
    float value[kWidth];
    widen(value);
    Pack<T, kWidth> rounded;
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      const int code = signed_code(value[i], inverse, bits, codebook) + (1 << (bits - 1));
      rounded.element[i] = from_float<T>(level_of_code(code, bits, codebook) * valid_clip);
    }
    if constexpr (kWidth == 8) {
      store_pack(out, rounded);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; i++) {
        if (i < left) out[i] = rounded.element[i];
      }
    }
  }
};

struct ElementwiseArgs {
  Matrix x;
  Clips clips;
  Codebook codebook;
  int bits;
  uint8_t* codes;  // or null, then
  void* values;
};

template <class T, int kWidth, bool kCodes>
__global__ void __launch_bounds__(256, 3) quantize_kernel(const ElementwiseArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= args.x.rows) return;
  const int64_t k = args.x.k;
  const int pieces = static_cast<int>((k + kWidth - 1) / kWidth), across = static_cast<int>(blockDim.x);
  const int pieces_per_group = static_cast<int>(args.clips.size / kWidth);
  const T* x = static_cast<const T*>(args.x.data) + row * args.x.stride;
  const float* clips = nullptr;
  for (int first = static_cast<int>(threadIdx.x); first < pieces; first += kUnroll * across) {
    Piece<T, kWidth> piece[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; i++) {
      const int p = first + i * across;
      if (p < pieces)
        piece[i].load(x + static_cast<int64_t>(p) * kWidth, k - static_cast<int64_t>(p) * kWidth);
    }
    // After the loads are on their way: the entry and its clips depend on each other.
    if (clips == nullptr) clips = clips_of_row(args.clips, row);
#pragma unroll
    for (int i = 0; i < kUnroll; i++) {
      const int p = first + i * across;
      if (p >= pieces) continue;
      const float clip = __ldg(clips + (args.clips.groups == 1 ? 0 : p / pieces_per_group));
      const int64_t start = static_cast<int64_t>(p) * kWidth;
      if constexpr (kCodes) {
        piece[i].store_codes(args.codes + row * ((k + 1) / 2) + start / 2, inverse_step(clip, 4),
                             args.codebook, k - start);
      } else {
        piece[i].store_values(static_cast<T*>(args.values) + row * k + start, clip, args.codebook, args.bits,
                              k - start);
      }
    }
  }
}

// --- Tail sums ---

struct TailPartial {
  double sum;
  uint32_t finite, beyond, nonfinite, padding;
};

struct TailArgs {
  Matrix x;
  Clips clips;
  SortedRows sorted;
  Codebook codebook;
  uint8_t* codes;
  TailPartial* partials;  // [tiles + num_entries, pieces]
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kTailThreads) quantize_tails_kernel(const TailArgs args) {
  const int64_t k = args.x.k, pieces = (k + kWidth - 1) / kWidth;
  const int64_t p = static_cast<int64_t>(blockIdx.y) * kTailThreads + threadIdx.x, start = p * kWidth,
                left = k - start;
  if (p >= pieces) return;
  const int64_t tile = blockIdx.x, group = start / args.clips.size;
  const int64_t first = tile * kTailRows;
  const int64_t end = first + kTailRows < args.x.rows ? first + kTailRows : args.x.rows;
  const auto elements = static_cast<uint32_t>(left < kWidth ? left : kWidth);
  int32_t entry = entry_at(args.sorted, first);
  TailPartial sums{};
  for (int64_t position = first; position < end; position++) {
    const int32_t next = entry_at(args.sorted, position);
    if (next != entry) {
      args.partials[(tile + entry) * pieces + p] = sums;
      sums = {};
      entry = next;
    }
    const int64_t row = row_at(args.sorted, position);
    const float clip = __ldg(args.clips.table + entry * args.clips.groups + group);
    Piece<T, kWidth> piece;
    piece.load(static_cast<const T*>(args.x.data) + row * args.x.stride + start, left);
    piece.store_codes(args.codes + row * ((k + 1) / 2) + start / 2, inverse_step(clip, 4), args.codebook,
                      left);
    uint32_t finite = 0;
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      const float magnitude = fabsf(to_float(piece.pack.element[i]));
      const bool is_element = i < static_cast<int>(elements), usable = is_element && is_finite(magnitude);
      finite += usable;
      if (usable && magnitude > clip) {
        sums.beyond++;
        sums.sum += static_cast<double>(magnitude);
      }
    }
    sums.finite += finite;
    sums.nonfinite += elements - finite;
  }
  args.partials[(tile + entry) * pieces + p] = sums;
}

// A block per group and entry. Thread t adds every kTailThreads-th partial from the t-th on, then the
// threads add up as a tree.
template <int kWidth>
__global__ void __launch_bounds__(kTailThreads, 4) merge_tails_kernel(const TailArgs args, double* tail) {
  const int64_t k = args.x.k, pieces = (k + kWidth - 1) / kWidth,
                per_group = (args.clips.size + kWidth - 1) / kWidth;
  const int64_t group = blockIdx.x, num_entries = args.sorted.num_entries;
  for (int64_t entry = blockIdx.y; entry < num_entries; entry += gridDim.y) {
    const int64_t begin = first_position(args.sorted, args.x.rows, entry);
    const int64_t end = first_position(args.sorted, args.x.rows, entry + 1);
    const int64_t first_tile = begin / kTailRows,
                  tiles = end > begin ? (end - 1) / kTailRows - first_tile + 1 : 0;
    const int64_t first_piece = group * per_group;
    const int64_t width = per_group < pieces - first_piece ? per_group : pieces - first_piece;
    double total[4] = {0, 0, 0, 0};
    for (int64_t i = threadIdx.x; i < tiles * width; i += kTailThreads) {
      const TailPartial part =
          args.partials[(first_tile + i / width + entry) * pieces + first_piece + i % width];
      total[0] += part.finite;
      total[1] += part.beyond;
      total[2] += part.sum;
      total[3] += part.nonfinite;
    }
    double* shared = static_cast<double*>(shared_memory());
#pragma unroll
    for (int i = 0; i < 4; i++) {
      total[i] = reduce_lanes(total[i], kWarp, Add());
      if (threadIdx.x % kWarp == 0) shared[4 * (threadIdx.x / kWarp) + i] = total[i];
    }
    __syncthreads();
    if (threadIdx.x < 4) {
      double sum = 0;
      for (int warp = 0; warp < kTailThreads / kWarp; warp++) sum += shared[4 * warp + threadIdx.x];
      tail[4 * (entry * args.clips.groups + group) + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

}  // namespace la_aciq::cuda

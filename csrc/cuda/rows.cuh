// Operations that need a whole row, or a whole segment of one, on chip: rotation, and clips measured on the
// data.
//
// A row is cut in segments of whole Hadamard blocks and whole groups. A team of threads holds one segment in
// registers, kVectors vectors of 8 elements per thread:
//
//   element of the segment = 8 * (thread + team * vector) + position in the vector
//   bits of the index:       0-2 position, 3-7 lane, 8 and up warp and vector
//
// Hadamard stages over bits 0-2 stay in a thread's registers, those over bits 3-7 are shuffles, those above
// go through shared memory, up to three bits at a time. Groups of 8 to 256 elements, a power of two, are
// aligned runs of lanes and are measured by shuffles; a row that is one group by its team; other groups from
// shared memory, a warp each.
//
// A team is one warp for segments up to 256 elements, then several teams share a block, and several rows
// share a warp where they are shorter still; beyond that a team is the block. Blocks take rows in turns, so
// the signs are read once per block.
#pragma once

#include "cuda/device.cuh"

namespace la_aciq::cuda {

// Threads of 2 vectors each; more would leave each of them fewer registers than it needs.
constexpr int kLargestTeam = 896, kLargestIrregularTeam = 512;

enum class Grouping {
  kRow,        // one group per row, and the row is one segment
  kLanes,      // groups that are aligned runs of lanes
  kIrregular,  // any even size
};

struct RowsArgs {
  Matrix x;
  Rotation rotation;
  float rotation_scale;  // 1 / sqrt(block)
  int segment;  // elements, a multiple of the block, of the group size and of 8; the last one of a row may be
                // short
  int lanes_per_row;  // of a warp; 32 unless several rows share it
  bool row_in_shared_memory;
  Clips clips;
  Clip clip;
  Codebook codebook;
  uint8_t* codes;  // or null, then
  void* out;
  float* row_clips;
};

// In floats.
struct SharedLayout {
  int row, clips, scratch, total;
};

__host__ __device__ inline SharedLayout shared_layout(int segment, bool row_in_shared_memory, int groups) {
  const int row = row_in_shared_memory ? segment : 0, clips = (groups + 3) / 4 * 4;
  return {0, row, row + clips, row + clips + 2 * kWarp};
}

// A block that is one warp per team synchronizes by warps.
__device__ __forceinline__ void synchronize_team() {
  if (blockDim.x == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

template <class T, class Combine>
__device__ __forceinline__ T reduce_team(T value, int lanes, Combine combine, float* scratch) {
  value = reduce_lanes(value, lanes, combine);
  if (blockDim.x == kWarp) return value;
  T* of_warps = reinterpret_cast<T*>(scratch);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < warps; warp++) value = combine(value, of_warps[warp]);
  __syncthreads();
  return value;
}

// --- Hadamard transform ---

template <int kBits>
__device__ __forceinline__ void shared_memory_stage(float* row, int length, int first_bit) {
  constexpr int kRadix = 1 << kBits;
#pragma unroll 1  // several sets at a time would not fit in the registers
  for (int set = static_cast<int>(threadIdx.x); set < length >> kBits; set += static_cast<int>(blockDim.x)) {
    float* base = row + ((set >> first_bit << (first_bit + kBits)) | (set & ((1 << first_bit) - 1)));
    float value[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; i++) value[i] = base[i << first_bit];
#pragma unroll
    for (int half = 1; half < kRadix; half *= 2) {
#pragma unroll
      for (int i = 0; i < kRadix; i++) {
        if (i & half) continue;
        const float even = value[i], odd = value[i + half];
        value[i] = even + odd;
        value[i + half] = even - odd;
      }
    }
#pragma unroll
    for (int i = 0; i < kRadix; i++) base[i << first_bit] = value[i];
  }
}

template <int kVectors, int kMostBits>
__device__ __forceinline__ void hadamard_segment(float (&v)[kVectors][8], int64_t block, int length,
                                                 float* row) {
#pragma unroll
  for (int half = 1; half < 8; half *= 2) {
    if (half >= block) break;
#pragma unroll
    for (int m = 0; m < kVectors; m++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (i & half) continue;
        const float even = v[m][i], odd = v[m][i + half];
        v[m][i] = even + odd;
        v[m][i + half] = even - odd;
      }
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int distance = 1; distance < kWarp && 8 * distance < block; distance *= 2) {
    const float sign = lane & distance ? -1.0f : 1.0f;
#pragma unroll
    for (int m = 0; m < kVectors; m++) {
#pragma unroll
      for (int i = 0; i < 8; i++)
        v[m][i] = __fmaf_rn(sign, v[m][i], __shfl_xor_sync(kFullWarp, v[m][i], distance));
    }
  }
  if (block <= 8 * kWarp) return;

  const int thread = static_cast<int>(threadIdx.x), team = static_cast<int>(blockDim.x);
#pragma unroll
  for (int m = 0; m < kVectors; m++) {
    float* target = row + 8 * (thread + team * m);
    if (target >= row + length) continue;
    *reinterpret_cast<float4*>(target) = make_float4(v[m][0], v[m][1], v[m][2], v[m][3]);
    *reinterpret_cast<float4*>(target + 4) = make_float4(v[m][4], v[m][5], v[m][6], v[m][7]);
  }
  __syncthreads();
  int bits = 0;
  while (block >> bits > 1) bits++;
  for (int bit = 8; bit < bits;) {
    const int stage = bits - bit < kMostBits ? bits - bit : kMostBits;
    if (stage == 1) {
      shared_memory_stage<1>(row, length, bit);
    } else if (stage == 2) {
      shared_memory_stage<2>(row, length, bit);
    } else {
      shared_memory_stage<kMostBits>(row, length, bit);
    }
    bit += stage;
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < kVectors; m++) {
    const float* source = row + 8 * (thread + team * m);
    if (source >= row + length) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) v[m][i] = source[i];
  }
  __syncthreads();
}

// --- Statistics ---

// Sums of squares that float32 holds without losing digits at either end; also false for NaN.
__device__ __forceinline__ bool in_float_range(float sum_of_squares) {
  return sum_of_squares > 1e-30f && sum_of_squares < 1e38f;
}

// A power of two that brings magnitudes up to `largest` to between 1 and 4, or as near as float32 has powers
// of two.
__device__ __forceinline__ float scale_to_one(float largest) {
  const uint32_t exponent = __float_as_uint(largest) >> 23;
  return __uint_as_float((254 - (exponent < 253 ? exponent : 253)) << 23);
}

// rms or absmax of the finite elements of a group of `elements`, of which this thread holds the first `used`
// in v. reduce(value, combine) combines over the threads of the group; any(flag) says whether a thread taking
// part in the same reductions raises the flag, threads without elements aside.
template <int kCount, class Reduce, class Any>
__device__ __forceinline__ float measure(const float (&v)[kCount], int used, Clip clip, int64_t elements,
                                         Reduce reduce, Any any) {
  float squares = 0;
  bool usual = false;
  if (clip == Clip::kRms) {
#pragma unroll
    for (int i = 0; i < kCount; i++) squares = __fmaf_rn(v[i], v[i], squares);
    squares = reduce(squares, Add());
    usual = in_float_range(squares);
    if (!any(!usual)) return sqrtf(squares / static_cast<float>(elements));
  }
  // Something is not finite, or zero, or its square leaves float32.
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    const float magnitude = fabsf(v[i]);
    largest = fmaxf(largest, is_finite(magnitude) ? magnitude : 0.0f);
  }
  largest = reduce(largest, Larger());
  if (clip == Clip::kAbsmax) return largest;
  const float scale = scale_to_one(largest);
  float scaled_squares = 0;
  int count = 0;
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    const bool counts = i < used && is_finite(v[i]);
    const float scaled = counts ? v[i] * scale : 0.0f;
    scaled_squares = __fmaf_rn(scaled, scaled, scaled_squares);
    count += counts;
  }
  scaled_squares = reduce(scaled_squares, Add());
  count = reduce(count, Add());
  if (usual) return sqrtf(squares / static_cast<float>(elements));
  return count == 0 ? 0.0f : sqrtf(scaled_squares / static_cast<float>(count)) / scale;
}

// Clips of the groups of a segment in shared memory, a warp per group.
__device__ __forceinline__ void measure_irregular(const RowsArgs& args, const float* row, int length,
                                                  int64_t start, const float* table, float* row_clips,
                                                  float* clips) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, size = static_cast<int>(args.clips.size);
  const int groups = (length + size - 1) / size, warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t first_group = start / args.clips.size;
  for (int group = static_cast<int>(threadIdx.x) / kWarp; group < groups; group += warps) {
    const int end = size * (group + 1) < length ? size * (group + 1) : length;
    double squares = 0;
    float largest = 0;
    int count = 0;
    for (int i = size * group + lane; i < end; i += kWarp) {
      if (!is_finite(row[i])) continue;
      squares += static_cast<double>(row[i]) * row[i];
      largest = fmaxf(largest, fabsf(row[i]));
      count++;
    }
    squares = reduce_lanes(squares, kWarp, Add());
    largest = reduce_lanes(largest, kWarp, Larger());
    count = reduce_lanes(count, kWarp, Add());
    const float rms = count == 0 ? 0.0f : static_cast<float>(sqrt(squares / count));
    const float clip = table[first_group + group] * (args.clip == Clip::kRms ? rms : largest);
    if (lane == 0) {
      clips[group] = clip;
      row_clips[first_group + group] = clip;
    }
  }
}

// --- The kernel ---

template <class T, bool kAligned>
__device__ __forceinline__ void load_vector(float (&v)[8], const T* x, int left) {
  if constexpr (kAligned) {
    Pack<T, 8> pack{};
    if (left > 0) pack = load_pack<T, 8>(x);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_float(pack.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = i < left ? to_float(__ldg(x + i)) : 0.0f;
  }
}

// 8 codes whose elements may belong to different groups: clip_of(i) is the clip of elements i and i + 1.
template <class ClipOf>
__device__ __forceinline__ uint32_t encode_pairs(const float (&v)[8], Codebook codebook, ClipOf clip_of) {
  uint32_t nibbles = 0;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float pair[2] = {v[i], v[i + 1]};
    nibbles |= encode_nibbles(pair, inverse_step(clip_of(i), 4), codebook) << 4 * i;
  }
  return nibbles;
}

template <bool kAligned>
__device__ __forceinline__ void store_codes(uint8_t* codes, uint32_t nibbles, int left) {
  if constexpr (kAligned) {
    if (left > 0) *reinterpret_cast<uint32_t*>(codes) = nibbles;
  } else {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      if (i + 1 < left) codes[i / 2] = static_cast<uint8_t>(nibbles >> 4 * i);
      if (i + 1 == left) codes[i / 2] = static_cast<uint8_t>(nibbles >> 4 * i & 15);
    }
  }
}

constexpr int resident_blocks(Grouping grouping, int vectors, int threads) {
  return threads > 256 ? 1 : vectors == 1 && grouping != Grouping::kIrregular ? 4 : 3;
}

// Out: void for codes, else the element type of the rotated rows. kThreads: the largest block.
template <class T, class Out, Grouping kGrouping, int kVectors, bool kAligned, int kThreads>
__global__ void __launch_bounds__(kThreads, resident_blocks(kGrouping, kVectors, kThreads))
    rows_kernel(const RowsArgs args) {
  const int thread = static_cast<int>(threadIdx.x), team = static_cast<int>(blockDim.x);
  const int lanes = args.lanes_per_row, rows_per_team = kWarp / lanes;
  const int64_t start = static_cast<int64_t>(args.segment) * blockIdx.y;
  const int length = static_cast<int>(args.x.k - start < args.segment ? args.x.k - start : args.segment);
  const int first = 8 * (lanes == kWarp ? thread : thread % lanes);  // element of this thread's first vector
  const int groups_of_segment = kGrouping == Grouping::kIrregular
                                    ? static_cast<int>((length + args.clips.size - 1) / args.clips.size)
                                    : 0;
  const SharedLayout layout =
      shared_layout(args.segment, args.row_in_shared_memory,
                    kGrouping == Grouping::kIrregular
                        ? static_cast<int>((args.segment + args.clips.size - 1) / args.clips.size)
                        : 0);
  float* shared = static_cast<float*>(shared_memory()) + threadIdx.y * layout.total;
  float *row_shared = shared + layout.row, *clips_shared = shared + layout.clips,
        *scratch = shared + layout.scratch;

  uint32_t negative = 0;  // a bit per element of this thread
  if (args.rotation.signs != nullptr) {
#pragma unroll
    for (int m = 0; m < kVectors; m++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int element = first + 8 * team * m + i;
        if (element >= length) continue;
        const bool is_negative =
            args.rotation.int8 ? __ldg(static_cast<const int8_t*>(args.rotation.signs) + start + element) < 0
                               : __ldg(static_cast<const float*>(args.rotation.signs) + start + element) < 0;
        negative |= static_cast<uint32_t>(is_negative) << (8 * m + i);
      }
    }
  }

  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y * rows_per_team;
  int64_t first_row = (static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y) * rows_per_team;
  for (; first_row < args.x.rows; first_row += step) {
    const int64_t row = first_row + (rows_per_team > 1 ? thread / lanes : 0);
    const bool exists = row < args.x.rows;
    const T* x = static_cast<const T*>(args.x.data) + row * args.x.stride + start;
    float v[kVectors][8];
#pragma unroll
    for (int m = 0; m < kVectors; m++) {
      const int element = first + 8 * team * m;
      load_vector<T, kAligned>(v[m], x + element, exists ? length - element : 0);
    }
    if (args.rotation.signs != nullptr) {
#pragma unroll
      for (int m = 0; m < kVectors; m++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const uint32_t sign = (negative >> (8 * m + i) & 1) << 31;
          v[m][i] *= __uint_as_float(__float_as_uint(args.rotation_scale) ^ sign);
        }
      }
      hadamard_segment<kVectors, kThreads == kLargestTeam ? 2 : 3>(v, args.rotation.block, length,
                                                                   row_shared);
    }

    if constexpr (!std::is_same_v<Out, void>) {
      Out* out = static_cast<Out*>(args.out) + row * args.x.k + start;
#pragma unroll
      for (int m = 0; m < kVectors; m++) {
        const int element = first + 8 * team * m, left = exists ? length - element : 0;
        Pack<Out, 8> pack;
#pragma unroll
        for (int i = 0; i < 8; i++) pack.element[i] = from_float<Out>(v[m][i]);
        if constexpr (kAligned) {
          if (left > 0) store_pack(out + element, pack);
        } else {
#pragma unroll
          for (int i = 0; i < 8; i++) {
            if (i < left) out[element + i] = pack.element[i];
          }
        }
      }
    } else {
      const float* table = clips_of_row(args.clips, exists ? row : 0);
      float* row_clips = args.row_clips == nullptr ? nullptr : args.row_clips + row * args.clips.groups;
      uint8_t* codes = args.codes + row * ((args.x.k + 1) / 2) + start / 2;
      float row_clip = 0;
      if constexpr (kGrouping == Grouping::kRow) {
        row_clip = __ldg(table);
        if (args.clip != Clip::kStatic) {
          float flat[8 * kVectors];
#pragma unroll
          for (int i = 0; i < 8 * kVectors; i++) flat[i] = v[i / 8][i % 8];
          // Elements beyond the row are zeros; the exact sums must not count them.
          int used = 8 * kVectors;
          if (first + 8 * team * (kVectors - 1) + 8 > length) {
            used = 0;
#pragma unroll
            for (int m = 0; m < kVectors; m++) {
              const int left = length - first - 8 * team * m;
              used += left < 0 ? 0 : left < 8 ? left : 8;
            }
          }
          const auto reduce = [&](auto value, auto combine) {
            return reduce_team(value, lanes, combine, scratch);
          };
          const auto any = [&](bool flag) {
            return blockDim.x == kWarp ? __any_sync(kFullWarp, exists && flag) : flag;
          };
          row_clip *= measure(flat, used, args.clip, args.x.k, reduce, any);
          if (exists && first == 0) row_clips[0] = row_clip;
        }
      } else if (kGrouping == Grouping::kIrregular && args.clip != Clip::kStatic) {
#pragma unroll
        for (int m = 0; m < kVectors; m++) {
#pragma unroll
          for (int i = 0; i < 8; i++) {
            if (first + 8 * team * m + i < length) row_shared[first + 8 * team * m + i] = v[m][i];
          }
        }
        synchronize_team();
        measure_irregular(args, row_shared, length, start, table, row_clips, clips_shared);
        synchronize_team();
      }
#pragma unroll
      for (int m = 0; m < kVectors; m++) {
        const int element = first + 8 * team * m, left = exists ? length - element : 0;
        uint32_t nibbles;
        if constexpr (kGrouping == Grouping::kIrregular) {
          const float* clips = args.clip == Clip::kStatic ? table + start / args.clips.size : clips_shared;
          const int size = static_cast<int>(args.clips.size);
          nibbles = encode_pairs(v[m], args.codebook, [&](int i) {
            const int group = (element + i) / size;
            return group < groups_of_segment ? clips[group] : 0.0f;
          });
        } else {
          float clip = row_clip;
          if constexpr (kGrouping == Grouping::kLanes) {
            const int64_t group = (start + element) / args.clips.size;
            const bool in_row = element < length;
            clip = in_row ? __ldg(table + group) : 0.0f;
            if (args.clip != Clip::kStatic) {
              const int width = static_cast<int>(args.clips.size / 8);
              const int64_t rest = args.x.k - group * args.clips.size;
              const auto reduce = [&](auto value, auto combine) {
                return reduce_lanes(value, width, combine);
              };
              const auto any = [&](bool flag) { return __any_sync(kFullWarp, left > 0 && flag); };
              clip *= measure(v[m], left < 8 ? left : 8, args.clip,
                              rest < args.clips.size ? rest : args.clips.size, reduce, any);
              if (exists && in_row && element % args.clips.size == 0) row_clips[group] = clip;
            }
          }
          nibbles = encode_nibbles(v[m], inverse_step(clip, 4), args.codebook);
        }
        store_codes<kAligned>(codes + element / 2, nibbles, left);
      }
      // The next row writes the shared memory this one has read.
      if (kGrouping == Grouping::kIrregular) synchronize_team();
    }
  }
}

// --- Clips of rows of any length: a warp per row and group ---

struct MeasureArgs {
  Matrix x;
  Clips clips;
  Clip clip;
  float* row_clips;
};

template <class T>
__global__ void __launch_bounds__(256) measure_clips_kernel(const MeasureArgs args) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * (256 / kWarp) + threadIdx.x / kWarp;
  if (pair >= args.x.rows * args.clips.groups) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = pair / args.clips.groups, group = pair % args.clips.groups;
  const int64_t begin = group * args.clips.size;
  const int64_t end = begin + args.clips.size < args.x.k ? begin + args.clips.size : args.x.k;
  const T* x = static_cast<const T*>(args.x.data) + row * args.x.stride;
  double squares = 0;
  float largest = 0;
  int64_t count = 0;
  for (int64_t i = begin + lane; i < end; i += kWarp) {
    const float value = to_float(__ldg(x + i));
    if (!is_finite(value)) continue;
    squares += static_cast<double>(value) * value;
    largest = fmaxf(largest, fabsf(value));
    count++;
  }
  squares = reduce_lanes(squares, kWarp, Add());
  largest = reduce_lanes(largest, kWarp, Larger());
  count = reduce_lanes(count, kWarp, Add());
  if (lane > 0) return;
  const float rms = count == 0 ? 0.0f : static_cast<float>(sqrt(squares / static_cast<double>(count)));
  args.row_clips[pair] =
      __ldg(clips_of_row(args.clips, row) + group) * (args.clip == Clip::kRms ? rms : largest);
}

}  // namespace la_aciq::cuda

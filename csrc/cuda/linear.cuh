// out [rows, n] = x [rows, k] times INT4 weights [n, k], for up to 16 rows: bound by reading the weights
// once.
//
// Layout: a block has 16 or 32 outputs and all rows. Its 8 warps take chunks of 32 * kWords elements along K
// in turns, so that together they read runs of each weight row; blockIdx.y cuts K further where n gives too
// few blocks. In a chunk, lane (g, t) = (l / 4, l % 4) reads 4 * kWords bytes of weight rows g and g + 8 from
// element 8 * kWords * t on. The tensor cores contract over K in any order as long as both operands agree, so
// the elements of a word go where they decode cheaply: 0 and 4, 1 and 5 in the first instruction, 2 and 6, 3
// and 7 in the second; the rows of x are loaded alike and paired by byte permutations. A chunk lies within
// one group of weights: its sum is scaled in float32 and added to the total. At the end the warps' totals are
// added in order in shared memory.
//
// Weights are decoded exactly (small integers), products are exact and sums are in float32, so the result is
// as good as that of 16-bit weights.
#pragma once

#include "cuda/mma.cuh"

namespace la_aciq::cuda {

constexpr int kLinearWarps = 8;
constexpr int kChunksInFlight = 2;

struct LinearArgs {
  Matrix x;
  Weights weights;
  int64_t chunks_per_split;
  const float* bias;
  void* out;
  float* partials;  // [splits, rows, n], or null where there is one split
};

template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&words)[kWords], const uint8_t* p) {
  if constexpr (kWords == 4) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
    words[0] = v.x, words[1] = v.y;
  } else {
    words[0] = __ldg(reinterpret_cast<const uint32_t*>(p));
  }
}

// kOutputTiles: 16 outputs each. kRowTiles: 8 rows of x each.
template <class T, int kWords, int kOutputTiles, int kRowTiles>
__global__ void __launch_bounds__(kLinearWarps* kWarp) linear_kernel(const LinearArgs args) {
  constexpr int kChunk = 32 * kWords, kOutputs = 16 * kOutputTiles, kRows = 8 * kRowTiles;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int64_t k = args.x.k, n = args.weights.n, first_output = static_cast<int64_t>(blockIdx.x) * kOutputs;
  const float offset = args.weights.codebook == Codebook::kMidrise ? 15.0f : 16.0f;

  // Outputs past the end read the last row and are not written.
  const uint8_t* codes[kOutputTiles][2];
  const float* clips[kOutputTiles][2];
#pragma unroll
  for (int i = 0; i < kOutputTiles; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t output = first_output + 16 * i + 8 * half + g;
      const int64_t row = output < n ? output : n - 1;
      codes[i][half] = args.weights.codes + row * (k / 2) + 4 * kWords * t;
      clips[i][half] = args.weights.clips + row * args.weights.groups;
    }
  }
  const T* x[kRowTiles];
#pragma unroll
  for (int j = 0; j < kRowTiles; j++) {
    const int row = 8 * j + g;
    x[j] = row < args.x.rows ? static_cast<const T*>(args.x.data) + row * args.x.stride + 8 * kWords * t
                             : nullptr;
  }

  const int chunks = static_cast<int>(k / kChunk);
  const int begin = static_cast<int>(blockIdx.y * args.chunks_per_split);
  const int end =
      begin + args.chunks_per_split < chunks ? begin + static_cast<int>(args.chunks_per_split) : chunks;
  const int chunks_per_group = static_cast<int>(args.weights.group_size / kChunk);
  float total[kOutputTiles][kRowTiles][4] = {};
#pragma unroll 1
  for (int first = begin + warp; first < end; first += kChunksInFlight * kLinearWarps) {
    uint32_t words[kChunksInFlight][kOutputTiles][2][kWords];
#pragma unroll
    for (int c = 0; c < kChunksInFlight; c++) {
      const int chunk = first + c * kLinearWarps;
      if (chunk >= end) continue;
#pragma unroll
      for (int i = 0; i < kOutputTiles; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++)
          load_words(words[c][i][half], codes[i][half] + static_cast<int64_t>(chunk) * (kChunk / 2));
      }
    }
#pragma unroll
    for (int c = 0; c < kChunksInFlight; c++) {
      const int chunk = first + c * kLinearWarps;
      if (chunk >= end) break;
      float sum[kOutputTiles][kRowTiles][4] = {};
#pragma unroll
      for (int word = 0; word < kWords; word++) {
        uint32_t activations[kRowTiles][2][2];
#pragma unroll
        for (int j = 0; j < kRowTiles; j++) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (x[j] != nullptr)
            v = __ldg(reinterpret_cast<const uint4*>(x[j] + static_cast<int64_t>(chunk) * kChunk + 8 * word));
          activations[j][0][0] = __byte_perm(v.x, v.z, 0x5410);  // elements 0, 4
          activations[j][0][1] = __byte_perm(v.x, v.z, 0x7632);  // 1, 5
          activations[j][1][0] = __byte_perm(v.y, v.w, 0x5410);  // 2, 6
          activations[j][1][1] = __byte_perm(v.y, v.w, 0x7632);  // 3, 7
        }
#pragma unroll
        for (int i = 0; i < kOutputTiles; i++) {
          const uint32_t low = words[c][i][0][word], high = words[c][i][1][word];
          const uint32_t a0[4] = {decode_pair<T, 0>(low, offset), decode_pair<T, 0>(high, offset),
                                  decode_pair<T, 1>(low, offset), decode_pair<T, 1>(high, offset)};
          const uint32_t a1[4] = {decode_pair<T, 2>(low, offset), decode_pair<T, 2>(high, offset),
                                  decode_pair<T, 3>(low, offset), decode_pair<T, 3>(high, offset)};
#pragma unroll
          for (int j = 0; j < kRowTiles; j++) {
            mma_m16n8k16<T>(sum[i][j], a0, activations[j][0]);
            mma_m16n8k16<T>(sum[i][j], a1, activations[j][1]);
          }
        }
      }
      const int group = args.weights.groups == 1 ? 0 : chunk / chunks_per_group;
#pragma unroll
      for (int i = 0; i < kOutputTiles; i++) {
        const float half_step[2] = {clip_or_zero(__ldg(clips[i][0] + group)) * (1.0f / 15.0f),
                                    clip_or_zero(__ldg(clips[i][1] + group)) * (1.0f / 15.0f)};
#pragma unroll
        for (int j = 0; j < kRowTiles; j++) {
#pragma unroll
          for (int e = 0; e < 4; e++)
            total[i][j][e] = __fmaf_rn(half_step[e / 2], sum[i][j][e], total[i][j][e]);
        }
      }
    }
  }

  // [warp][row of x][output]
  float* shared = static_cast<float*>(shared_memory());
#pragma unroll
  for (int i = 0; i < kOutputTiles; i++) {
#pragma unroll
    for (int j = 0; j < kRowTiles; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        shared[(warp * kRows + 8 * j + 2 * t + e % 2) * kOutputs + 16 * i + g + 8 * (e / 2)] = total[i][j][e];
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kOutputs; i += kLinearWarps * kWarp) {
    const int row = i / kOutputs;
    const int64_t output = first_output + i % kOutputs;
    if (row >= args.x.rows || output >= n) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kLinearWarps; w++) sum += shared[w * kRows * kOutputs + i];
    if (args.partials != nullptr) {
      args.partials[(blockIdx.y * args.x.rows + row) * n + output] = sum;
    } else {
      static_cast<T*>(args.out)[row * n + output] =
          from_float<T>(sum + (args.bias == nullptr ? 0.0f : args.bias[output]));
    }
  }
}

// Adds up the splits in order.
template <class T>
__global__ void __launch_bounds__(256) add_splits_kernel(const LinearArgs args, int splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x,
                elements = args.x.rows * args.weights.n;
  if (i >= elements) return;
  float sum = 0;
  for (int split = 0; split < splits; split++) sum += args.partials[split * elements + i];
  static_cast<T*>(args.out)[i] =
      from_float<T>(sum + (args.bias == nullptr ? 0.0f : args.bias[i % args.weights.n]));
}

}  // namespace la_aciq::cuda

// Values of INT4 codes. Layout as in quantize.cuh: a thread decodes pieces of 8 codes (a 4-byte load, 16-byte
// stores) where rows are aligned and groups are multiples of 8, else pieces of 2.
#pragma once

#include "cuda/device.cuh"

namespace la_aciq::cuda {

struct DequantizeArgs {
  const uint8_t* codes;
  int64_t rows, k;
  Clips clips;
  Codebook codebook;
  void* out;
};

template <class T, int kWidth>
__global__ void __launch_bounds__(256) dequantize_kernel(const DequantizeArgs args) {
  constexpr int kLoads = 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= args.rows) return;
  const int64_t k = args.k;
  const int pieces = static_cast<int>((k + kWidth - 1) / kWidth), across = static_cast<int>(blockDim.x);
  const int pieces_per_group = static_cast<int>(args.clips.size / kWidth);
  const uint8_t* codes = args.codes + row * ((k + 1) / 2);
  T* out = static_cast<T*>(args.out) + row * k;
  const float* clips = nullptr;
  for (int first = static_cast<int>(threadIdx.x); first < pieces; first += kLoads * across) {
    uint32_t nibbles[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int p = first + i * across;
      if (p >= pieces) continue;
      if constexpr (kWidth == 8) {
        nibbles[i] = __ldg(reinterpret_cast<const uint32_t*>(codes) + p);
      } else {
        nibbles[i] = __ldg(codes + p);
      }
    }
    if (clips == nullptr) clips = clips_of_row(args.clips, row);
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int p = first + i * across;
      if (p >= pieces) continue;
      const float clip = clip_or_zero(__ldg(clips + (args.clips.groups == 1 ? 0 : p / pieces_per_group)));
      Pack<T, kWidth> pack;
#pragma unroll
      for (int j = 0; j < kWidth; j++) {
        pack.element[j] =
            from_float<T>(level_of_code(static_cast<int>(nibbles[i] >> 4 * j & 15), 4, args.codebook) * clip);
      }
      T* target = out + static_cast<int64_t>(p) * kWidth;
      if constexpr (kWidth == 8) {
        store_pack(target, pack);
      } else {
        target[0] = pack.element[0];
        if (2 * static_cast<int64_t>(p) + 1 < k) target[1] = pack.element[1];
      }
    }
  }
}

}  // namespace la_aciq::cuda

// What the kernels share: launches, element types and their vectors, warp reductions, codes of eight
// elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace la_aciq::cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;
constexpr int kWarp = 32;

// --- Host ---

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream,
                   A... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_memory;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

__host__ __device__ __forceinline__ int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>()) with the element type of a 16 or 32-bit dtype.
template <class Body>
cudaError_t with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>());
    case DType::kBFloat16:
      return body(Type<__nv_bfloat16>());
    case DType::kFloat16:
      return body(Type<__half>());
    case DType::kFloat64:
      break;  // moments alone takes float64
  }
  return cudaErrorInvalidValue;
}

// How a block of 256 threads covers rows of `vectors` pieces each: `across` threads share a row, so that no
// lane idles when rows are short, and each has several pieces of a long one.
struct RowTiles {
  dim3 grid, block;
};

inline RowTiles row_tiles(int64_t rows, int64_t vectors) {
  unsigned across = 1;
  while (across < 256 && across < vectors && (across < kWarp || 4 * across < vectors)) across *= 2;
  const unsigned down = 256 / across;
  return {dim3(static_cast<unsigned>(ceil_divide(rows, down))), dim3(across, down)};
}

inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Whether every row starts on 16 bytes and holds whole vectors of 8 elements.
inline bool rows_are_aligned(const Matrix& x) {
  return x.k % 8 == 0 && is_aligned(x.data, 16) &&
         (x.rows == 1 || x.stride * element_size(x.dtype) % 16 == 0);
}

// --- Device: elements ---

#ifdef __CUDACC__
// Dynamic shared memory; tests run this source on a CPU, where it is an ordinary array.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return dynamic_shared_memory;
}
#else
using emulation::shared_memory;
#endif

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// N consecutive elements as they lie in memory, moved by the widest accesses their alignment allows.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T element[N];
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  Pack<T, N> pack;
  if constexpr (sizeof(pack) % 16 == 0) {
    uint4 words[sizeof(pack) / 16];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); i++)
      words[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
    memcpy(&pack, words, sizeof(pack));
  } else {
    static_assert(sizeof(pack) == 8);
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(p));
    memcpy(&pack, &words, sizeof(pack));
  }
  return pack;
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// --- Device: warps ---

__device__ __forceinline__ int lane_of_warp() {
  return static_cast<int>((threadIdx.x + blockDim.x * threadIdx.y) % kWarp);
}

// Over aligned runs of `width` lanes, a power of two; every lane gets the result.
template <class T, class Combine>
__device__ __forceinline__ T reduce_lanes(T value, int width, Combine combine) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ double operator()(double a, double b) const { return a > b ? a : b; }
};
struct Smaller {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
  __device__ __forceinline__ double operator()(double a, double b) const { return a < b ? a : b; }
};

// --- Device: codes ---

__device__ __forceinline__ bool is_finite(float x) {
  return fabsf(x) <= 3.402823466e+38f;
}
__device__ __forceinline__ bool is_finite(double x) {
  return fabs(x) <= 1.7976931348623157e308;
}

// The INT4 codes of N elements, the first in the lowest nibble. encode() gives code - 8 in [-8, 7], so one
// addition at the end shifts all of them.
template <int N>
__device__ __forceinline__ uint32_t encode_nibbles(const float (&x)[N], float inverse, Codebook codebook) {
  uint32_t codes = 0;
  if (codebook == Codebook::kMidrise) {
#pragma unroll
    for (int i = 0; i < N; i++)
      codes += static_cast<uint32_t>(signed_code(x[i], inverse, 4, Codebook::kMidrise)) << 4 * i;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      codes += static_cast<uint32_t>(signed_code(x[i], inverse, 4, Codebook::kMidtread)) << 4 * i;
  }
  return codes + (0x88888888u & (N == 8 ? 0xFFFFFFFFu : (1u << 4 * N % 32) - 1));
}

// level() by two multiply-adds in place of a division: the quotient of two small integers comes out correctly
// rounded.
__device__ __forceinline__ float level_of_code(int code, int bits, Codebook codebook) {
  const int levels = 1 << bits;
  const float numerator =
      static_cast<float>(2 * code - (codebook == Codebook::kMidrise ? levels - 1 : levels));
  const float divisor = static_cast<float>(levels - 1), reciprocal = bits == 4 ? 1.0f / 15.0f : 1.0f / 255.0f;
  const float quotient = numerator * reciprocal;
  return __fmaf_rn(__fmaf_rn(-divisor, quotient, numerator), reciprocal, quotient);
}

// The table's clips of a row.
__device__ __forceinline__ const float* clips_of_row(const Clips& clips, int64_t row) {
  return clips.table + clips.groups * (clips.per_row ? row : entry_of(clips.language_ids, row));
}

}  // namespace la_aciq::cuda

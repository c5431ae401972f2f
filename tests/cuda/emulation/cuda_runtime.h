// Runs the source of csrc/cuda on the CPU: stands in for the CUDA headers when a .cu file is compiled as
// ordinary C++.
//
// A kernel launch runs the blocks one after the other, each CUDA thread as a fiber (emulation.cpp). A fiber
// runs until it waits at a barrier, then the next one runs; the order of blocks and of threads is a
// parameter, so that a test can demand the same result from several orders, which a missing barrier or an
// order-dependent sum does not give.
//
// Covered is what csrc/cuda uses: one-dimensional to three-dimensional grids and blocks of whole warps,
// dynamic shared memory,
// __syncthreads, __syncwarp, shuffles, votes and atomics of the whole warp, 16-bit floats, vector types, the
// mma instructions of mma.cuh, launches, memset and the attributes asked for. Refused at run time: barriers
// that some threads never reach, masks other than the full warp, writes beyond the shared memory asked for,
// and more of it than the device would give. Shared memory holds NaN (all bits set) before a block runs. Not
// covered: anything about time, memory ordering between warps within an interval without barriers, and what
// the compiler makes of the source.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

// --- Runtime API ---

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct EmulatedStream*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };

namespace emulation {

// Calls body once per thread of the grid.
using Body = void (*)(void* closure);
cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel, Body body, void* closure);
cudaError_t allow_shared_memory(const void* kernel, int bytes);

void* shared_memory();
void block_barrier();
// Every lane of the warp gives `size` <= 32 bytes; returns where those of lane 0, 1, ... stand, 32 bytes
// apart.
const unsigned char* exchange(const void* value, size_t size);
int lane();
void require_full_mask(unsigned mask);

// The order in which blocks and threads run: 0 ascending, 1 descending, else shuffled by this seed.
extern "C" void la_aciq_emulation_order(unsigned order);

template <class T>
T from_lane(T value, int source) {
  T result;
  memcpy(&result, exchange(&value, sizeof(T)) + 32 * source, sizeof(T));
  return result;
}

}  // namespace emulation

// Of the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  auto call = [&] { kernel(static_cast<P>(args)...); };
  return emulation::run_grid(
      *config, reinterpret_cast<const void*>(kernel),
      [](void* closure) { (*static_cast<decltype(call)*>(closure))(); }, &call);
}

template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int bytes) {
  return emulation::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t) {
  memset(p, value, size);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Of a small device, so that tests of ordinary size meet the limits.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 99 * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "emulated CUDA error";
}

// --- Synchronization, shuffles, votes, atomics ---

inline void __syncthreads() {
  emulation::block_barrier();
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emulation::require_full_mask(mask);
  const char nothing = 0;
  emulation::exchange(&nothing, 1);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  emulation::require_full_mask(mask);
  return emulation::from_lane(value, source & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  emulation::require_full_mask(mask);
  return emulation::from_lane(value, (emulation::lane() ^ bits) & 31);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  emulation::require_full_mask(mask);
  const unsigned char* votes = emulation::exchange(&vote, sizeof(vote));
  unsigned result = 0;
  for (int i = 0; i < 32; i++) result |= static_cast<unsigned>(votes[32 * i]) << i;
  return result;
}
inline bool __any_sync(unsigned mask, bool vote) {
  return __ballot_sync(mask, vote) != 0;
}

template <class T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p += value;
  return before;
}

// --- Vector types and arithmetic ---

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; i++)
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}

// Kernels with the faults the emulation has to find; tests/cuda/test_emulation.py runs them.
#include <exception>
#include <string>

#include "cuda_runtime.h"

namespace {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

float* shared() {
  return static_cast<float*>(emulation::shared_memory());
}

// Reverses 64 numbers through shared memory; right with the barrier.
void reverse(float* data, bool barrier) {
  shared()[threadIdx.x] = data[threadIdx.x];
  if (barrier) __syncthreads();
  data[threadIdx.x] = shared()[63 - threadIdx.x];
}

void add_in_order_of_arrival(float* data, bool) {
  atomicAdd(data, threadIdx.x == 0 ? 1e8f : 1.0f);
}

void barrier_in_a_branch(float*, bool) {
  if (threadIdx.x < 40) __shfl_xor_sync(kFullWarp, 1, 1);
}

void write_beyond_shared_memory(float*, bool) {
  shared()[64 + threadIdx.x % 2] = 0;
}

void partial_mask(float*, bool) {
  __shfl_xor_sync(0xFFFFu, 1, 1);
}

}  // namespace

// Runs a kernel on one block of 64 threads with 256 bytes of shared memory; the message of what was found, or
// an empty one.
extern "C" const char* la_aciq_emulation_fault(const char* name, float* data) {
  static std::string message;
  const std::string kernel = name;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 256;
  try {
    message.clear();
    cudaError_t error = cudaErrorInvalidValue;
    if (kernel == "reverse") error = cudaLaunchKernelEx(&config, reverse, data, true);
    if (kernel == "reverse without barrier") error = cudaLaunchKernelEx(&config, reverse, data, false);
    if (kernel == "add in order of arrival")
      error = cudaLaunchKernelEx(&config, add_in_order_of_arrival, data, true);
    if (kernel == "barrier in a branch") error = cudaLaunchKernelEx(&config, barrier_in_a_branch, data, true);
    if (kernel == "write beyond shared memory")
      error = cudaLaunchKernelEx(&config, write_beyond_shared_memory, data, true);
    if (kernel == "partial mask") error = cudaLaunchKernelEx(&config, partial_mask, data, true);
    if (kernel == "too much shared memory") {
      config.dynamicSmemBytes = 49 << 10;
      error = cudaLaunchKernelEx(&config, reverse, data, true);
    }
    if (error != cudaSuccess) message = "error " + std::to_string(error);
  } catch (const std::exception& fault) {
    message = fault.what();
  }
  return message.c_str();
}

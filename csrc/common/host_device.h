// How the arithmetic in csrc/common is shared: each function has internal linkage in every file that includes
// it.
//
// An ordinary inline function compiled into the AVX-512 object and the baseline object is one function to the
// linker, which may keep the AVX-512 copy for both; older CPUs then stop with SIGILL.
#pragma once

#if defined(__CUDACC__)
#define LA_ACIQ_HD static __host__ __device__ __forceinline__
#else
#define LA_ACIQ_HD static inline __attribute__((always_inline, unused))
#endif

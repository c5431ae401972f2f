// The CPU kernels for x86-64 with AVX2, FMA and F16C.
#include "cpu/kernels/dot_avx2.h"

#define LA_ACIQ_KERNELS kAvx2Kernels
#define LA_ACIQ_ISA "avx2"
#include "cpu/kernels/all.h"

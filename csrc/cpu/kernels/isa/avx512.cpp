// The CPU kernels for x86-64 with AVX-512 F, BW, VL and DQ.
#include "cpu/kernels/dot_avx512.h"

#define LA_ACIQ_KERNELS kAvx512Kernels
#define LA_ACIQ_ISA "avx512"
#include "cpu/kernels/all.h"

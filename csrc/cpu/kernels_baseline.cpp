// The CPU kernels for any CPU.
#include "cpu/vec_baseline.h"

#define LA_ACIQ_KERNELS kBaselineKernels
#define LA_ACIQ_ISA "baseline"
#include "cpu/kernels_all.h"

// The CPU kernels for any CPU.
#include "cpu/dot_baseline.h"

#define LA_ACIQ_KERNELS kBaselineKernels
#define LA_ACIQ_ISA "baseline"
#include "cpu/kernels_all.h"

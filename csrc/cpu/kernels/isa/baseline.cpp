// The CPU kernels for any CPU.
#include "cpu/kernels/dot_baseline.h"

#define LA_ACIQ_KERNELS kBaselineKernels
#define LA_ACIQ_ISA "baseline"
#include "cpu/kernels/all.h"

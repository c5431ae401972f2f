// Every kernel, for the instruction set whose vec_<isa>.h the including file has chosen. Kernels have
// internal linkage and use no std:: templates: nothing compiled with wider instructions may be shared with
// other files (see common/host_device.h).
#include "cpu/kernels/dequantize.h"
#include "cpu/kernels/moments.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/quantize.h"
#include "cpu/kernels/rotate.h"
#include "cpu/kernels/round.h"

namespace la_aciq::cpu {

extern const Kernels LA_ACIQ_KERNELS;
const Kernels LA_ACIQ_KERNELS = {
    LA_ACIQ_ISA,   moments,       unpack_histogram, quantize,        dequantize,        rotate,
    round_scratch, round_weights, float_product(),  float_product(), integer_product(),
};

}  // namespace la_aciq::cpu

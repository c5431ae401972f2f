// Every kernel, for the instruction set whose vec_<isa>.h the including file has chosen. Kernels have
// internal linkage and use no std:: templates: nothing compiled with wider instructions may be shared with
// other files (see common/host_device.h).
#include "cpu/dequantize_impl.h"
#include "cpu/moments_impl.h"
#include "cpu/products.h"
#include "cpu/quantize_impl.h"
#include "cpu/rotate_impl.h"

namespace la_aciq::cpu {

extern const Kernels LA_ACIQ_KERNELS;
const Kernels LA_ACIQ_KERNELS = {
    LA_ACIQ_ISA, moments,         unpack_histogram, quantize,          dequantize,
    rotate,      float_product(), float_product(),  integer_product(),
};

}  // namespace la_aciq::cpu

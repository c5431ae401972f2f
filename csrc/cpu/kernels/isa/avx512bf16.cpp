// The product of bfloat16 activations for x86-64 with AVX-512 BF16, beside the kernels of AVX-512 VNNI.
#include "cpu/kernels/dot_avx512.h"
//
#include "cpu/kernels/bfloat16.h"
#include "cpu/kernels/products.h"

namespace la_aciq::cpu {

extern const Product kAvx512Bf16Product;
const Product kAvx512Bf16Product = product<BFloat16Product>(pack_bfloat16);

}  // namespace la_aciq::cpu

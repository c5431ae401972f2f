// The product of bfloat16 activations for x86-64 with AVX-512 BF16, beside the kernels of AVX-512 VNNI.
#include "cpu/dot_avx512.h"
//
#include "cpu/bfloat16_impl.h"
#include "cpu/products.h"

namespace la_aciq::cpu {

extern const Product kAvx512Bf16Product;
const Product kAvx512Bf16Product = product<BFloat16Product>(pack_bfloat16);

}  // namespace la_aciq::cpu

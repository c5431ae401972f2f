// The integer products for x86-64 with AVX-512 VNNI, beside AVX-512's other kernels.
#include "cpu/kernels/dot_avx512.h"
//
#include "cpu/kernels/products.h"

namespace la_aciq::cpu {

extern const Product kAvx512VnniProduct;
const Product kAvx512VnniProduct = integer_product();

}  // namespace la_aciq::cpu

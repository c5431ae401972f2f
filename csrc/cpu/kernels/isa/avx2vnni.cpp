// The integer products for x86-64 with AVX-VNNI, beside AVX2's other kernels.
#include "cpu/kernels/dot_avx2.h"
//
#include "cpu/kernels/products.h"

namespace la_aciq::cpu {

extern const Product kAvx2VnniProduct;
const Product kAvx2VnniProduct = integer_product();

}  // namespace la_aciq::cpu

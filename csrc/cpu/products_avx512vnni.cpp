// The integer matrix product for x86-64 with AVX-512 VNNI, beside AVX-512's other kernels.
#include "cpu/dot_avx512.h"
//
#include "cpu/product_impl.h"

namespace la_aciq::cpu {

extern const Product kAvx512VnniProduct;
const Product kAvx512VnniProduct = product<IntegerProduct>(pack_codes);

}  // namespace la_aciq::cpu

// The integer matrix product for x86-64 with AVX-VNNI, beside AVX2's other kernels.
#include "cpu/dot_avx2.h"
//
#include "cpu/product_impl.h"

namespace la_aciq::cpu {

extern const Product kAvx2VnniProduct;
const Product kAvx2VnniProduct = product<IntegerProduct>(pack_codes);

}  // namespace la_aciq::cpu

// The two products of a linear layer, for the instruction set whose dot_<isa>.h the including file has
// chosen.
#include "cpu/kernels/few_rows.h"
#include "cpu/kernels/product.h"

namespace la_aciq::cpu {
namespace {

template <class Type>
constexpr Product product(void (*pack)(const PackArgs&, int64_t, int64_t)) {
  return {pack,
          multiply_few<Type>,
          multiply<Type>,
          sizeof(typename Type::Element),
          Type::kTileMembers,
          16 * kPanelVectors};
}
constexpr Product float_product() { return product<FloatProduct>(pack_floats); }
constexpr Product integer_product() { return product<IntegerProduct>(pack_codes); }

}  // namespace
}  // namespace la_aciq::cpu

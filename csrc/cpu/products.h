// The two products of a linear layer, for the instruction set whose dot_<isa>.h the including file has
// chosen.
#include "cpu/matvec_impl.h"
#include "cpu/product_impl.h"

namespace la_aciq::cpu {
namespace {

template <class Many, class Few>
constexpr Product product(void (*arrange)(const ArrangeArgs&, int64_t, int64_t),
                          void (*pack)(const PackArgs&, int64_t, int64_t)) {
  return {arrange,
          matvec<Few>,
          pack,
          multiply<Many>,
          sizeof(typename Many::Element),
          Many::kTileMembers,
          16 * kPanelVectors};
}
constexpr Product float_product() { return product<FloatProduct, FloatMatvec>(arrange_floats, pack_floats); }
constexpr Product integer_product() {
  return product<IntegerProduct, IntegerMatvec>(arrange_codes, pack_codes);
}

}  // namespace
}  // namespace la_aciq::cpu

// Checks of the arguments of the operations, the same on every device. Each function has internal linkage.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "common/codebook.h"
#include "common/hadamard.h"
#include "common/types.h"

namespace la_aciq {
namespace {

using at::Tensor;
using std::optional;

inline DType dtype_of(const char* name, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected float32, bfloat16 or float16, got ", type);
  }
}

inline Codebook codebook_of(const char* name, c10::string_view codebook) {
  TORCH_CHECK_VALUE(codebook == "midrise" || codebook == "midtread", name,
                    ": expected 'midrise' or 'midtread', got '", codebook, "'");
  return codebook == "midrise" ? Codebook::kMidrise : Codebook::kMidtread;
}

inline Clip clip_of(const char* name, c10::string_view clip) {
  TORCH_CHECK_VALUE(clip == "static" || clip == "rms" || clip == "absmax", name,
                    ": expected 'static', 'rms' or 'absmax', got '", clip, "'");
  return clip == "static" ? Clip::kStatic : clip == "rms" ? Clip::kRms : Clip::kAbsmax;
}

struct Groups {
  int64_t size, count;
};

inline Groups groups_of(int64_t k, int64_t group_size) {
  TORCH_CHECK_VALUE(group_size == 0 || (group_size >= 2 && group_size % 2 == 0),
                    "group_size: expected 0 or an even number of at least 2, got ", group_size);
  const int64_t size = group_size == 0 ? k : std::min(group_size, k + k % 2);
  return {size, (k + size - 1) / size};
}

inline void check_rows_of_k(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) > 0, name, ": expected shape [..., K] with K >= 1, got ",
                    x.sizes());
}

inline int64_t product(at::IntArrayRef sizes) {
  return c10::multiply_integers(sizes);
}

inline Tensor checked_table(const char* name, const Tensor& table, int64_t groups) {
  TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat, name, ": expected float32, got ", table.scalar_type());
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) > 0 && table.size(1) == groups, name,
                    ": expected shape [num_entries, ", groups, "], got ", table.sizes());
  return table.contiguous();
}

// Ids of shape lead[:d] (or 1 in any place) as contiguous memory, each standing for `span` consecutive rows.
struct CheckedIds {
  Tensor ids;
  int64_t span = 1;

  LanguageIds of(int64_t num_entries, int64_t elements_per_row = 1) const {
    return {ids.defined() ? ids.const_data_ptr<int32_t>() : nullptr, span * elements_per_row,
            static_cast<int32_t>(num_entries)};
  }
};

inline CheckedIds checked_language_ids(const optional<Tensor>& language_ids, at::IntArrayRef lead) {
  if (!language_ids) return {};
  TORCH_CHECK_TYPE(language_ids->scalar_type() == at::kInt, "language_ids: expected int32, got ",
                   language_ids->scalar_type());
  bool matches = language_ids->dim() <= static_cast<int64_t>(lead.size());
  for (int64_t i = 0; matches && i < language_ids->dim(); i++) {
    matches = language_ids->size(i) == 1 || language_ids->size(i) == lead[i];
  }
  TORCH_CHECK_VALUE(matches, "language_ids: expected a shape that matches the leading dimensions ", lead,
                    " from the left, got ", language_ids->sizes());
  int64_t used = language_ids->dim();
  if (language_ids->is_contiguous() && language_ids->sizes() == lead.slice(0, used)) {
    return {*language_ids, std::max<int64_t>(product(lead.slice(used)), 1)};
  }
  while (used > 0 && language_ids->size(used - 1) == 1) used--;
  const auto prefix = lead.slice(0, used);
  const Tensor ids = language_ids->reshape(language_ids->sizes().slice(0, used)).expand(prefix).contiguous();
  return {ids, std::max<int64_t>(product(lead.slice(used)), 1)};
}

// The length of the Hadamard blocks: block_size, or for 0 the largest power of two that divides k.
inline int64_t checked_block(const Tensor& signs, int64_t block_size, int64_t k) {
  TORCH_CHECK_TYPE(signs.scalar_type() == at::kFloat || signs.scalar_type() == at::kChar,
                   "signs: expected float32 or int8, got ", signs.scalar_type());
  TORCH_CHECK_VALUE(signs.dim() == 1 && signs.size(0) == k, "signs: expected shape [", k, "], got ",
                    signs.sizes());
  const int64_t block = block_size == 0 ? largest_power_of_two_divisor(k) : block_size;
  TORCH_CHECK_VALUE(block > 0 && (block & (block - 1)) == 0 && k % block == 0,
                    "block_size: expected a power of two that divides K=", k, ", got ", block_size);
  return block;
}

inline void check_codes(const char* name, const Tensor& codes, int64_t k) {
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, name, ": expected uint8, got ", codes.scalar_type());
  TORCH_CHECK_VALUE(k >= 1 && codes.dim() > 0 && codes.size(-1) == (k + 1) / 2, name,
                    ": expected shape [..., ", (k + 1) / 2, "] for k=", k, ", got ", codes.sizes());
}

// Clips [*lead, groups], one per row and group.
inline Tensor checked_row_clips(const char* name, const Tensor& row_clips, at::IntArrayRef lead,
                                int64_t groups) {
  auto expected = lead.vec();
  expected.push_back(groups);
  TORCH_CHECK_TYPE(row_clips.scalar_type() == at::kFloat, name, ": expected float32, got ",
                   row_clips.scalar_type());
  TORCH_CHECK_VALUE(row_clips.sizes() == at::IntArrayRef(expected), name, ": expected shape ",
                    at::IntArrayRef(expected), " with per_row, got ", row_clips.sizes());
  return row_clips.contiguous();
}

// Weights as la_aciq.repack_weight arranges them.
inline bool is_repacked(const Tensor& weight) {
  return weight.scalar_type() == at::kInt;
}

inline void check_linear(const Tensor& weight, const Tensor& weight_clip, const optional<Tensor>& bias,
                         int64_t k, int64_t groups, int64_t activation_bits) {
  int64_t n;
  if (is_repacked(weight)) {
    n = weight_clip.dim() > 0 ? weight_clip.size(0) : 0;
    const int64_t expected[] = {(n + 15) / 16, (k + 7) / 8, 16};
    TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef(expected), "weight: expected shape ",
                      at::IntArrayRef(expected), " from repack_weight for N=", n, ", K=", k, ", got ",
                      weight.sizes());
  } else {
    TORCH_CHECK_TYPE(weight.scalar_type() == at::kByte,
                     "weight: expected uint8, or int32 from repack_weight, got ", weight.scalar_type());
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == (k + 1) / 2, "weight: expected shape [N, ",
                      (k + 1) / 2, "] for K=", k, ", got ", weight.sizes());
    n = weight.size(0);
  }
  TORCH_CHECK_TYPE(weight_clip.scalar_type() == at::kFloat, "weight_clip: expected float32, got ",
                   weight_clip.scalar_type());
  TORCH_CHECK_VALUE(weight_clip.sizes() == at::IntArrayRef({n, groups}), "weight_clip: expected shape [", n,
                    ", ", groups, "], got ", weight_clip.sizes());
  TORCH_CHECK_VALUE(activation_bits == 16 || activation_bits == 8 || activation_bits == 4,
                    "activation_bits: expected 16, 8 or 4, got ", activation_bits);
  TORCH_CHECK_VALUE(!bias || bias->sizes() == at::IntArrayRef({n}), "bias: expected shape [", n, "]");
}

inline Groups check_rounding(const Tensor& weight, const Tensor& second_moments, const Tensor& factor,
                             int64_t group_size) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) > 0,
                    "weight: expected shape [N, K] with K >= 1, got ", weight.sizes());
  const int64_t k = weight.size(1);
  const auto check = [&](const char* name, const Tensor& matrix) {
    TORCH_CHECK_TYPE(matrix.scalar_type() == at::kFloat, name, ": expected float32, got ",
                     matrix.scalar_type());
    TORCH_CHECK_VALUE(matrix.sizes() == at::IntArrayRef({k, k}), name, ": expected shape [", k, ", ", k,
                      "], got ", matrix.sizes());
  };
  check("second_moments", second_moments);
  check("factor", factor);
  return groups_of(k, group_size);
}

}  // namespace
}  // namespace la_aciq

// y = x W^T with INT4 weights on CPU tensors: checks, which kernel takes which shape, and threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace la_aciq::cpu {
namespace {

constexpr int64_t kMatvecRows = 16;  // up to here decoding weights in registers beats a matrix product
constexpr int64_t kWeightTileElements = 4 << 20;  // float32 weights decoded at a time for a matrix product

// y [rows, n] = x [rows, k] times INT4 weights: a few rows.
void multiply_few_rows(const Tensor& x, const Tensor& weight, const Tensor& clips, const Groups& groups,
                       Codebook codebook, const float* bias, const Tensor& y) {
  const int64_t rows = x.size(0), k = x.size(1), n = weight.size(0);
  const Tensor arranged = at::empty({rows, groups.count * arranged_group(groups.size)}, at::kFloat);
  const Kernels& kernels = active_kernels();
  kernels.arrange_activations(x.const_data_ptr<float>(), rows, k, groups.size, groups.count,
                              arranged.mutable_data_ptr<float>());
  const MatvecArgs args{
      .x = arranged.const_data_ptr<float>(),
      .rows = rows,
      .k = k,
      .n = n,
      .group_size = groups.size,
      .groups = groups.count,
      .weight = weight.const_data_ptr<uint8_t>(),
      .clips = clips.const_data_ptr<float>(),
      .bias = bias,
      .codebook = codebook,
      .out = y.mutable_data_ptr<float>(),
  };
  // Decoding a weight costs less than an element costs elsewhere.
  for_rows(n, k * rows / 4, [&](int64_t begin, int64_t end) { kernels.matvec(args, begin, end); });
}

// The same for many rows: weights go back to float32 a tile at a time, and the matrix product is PyTorch's.
void multiply_many_rows(const Tensor& x, const Tensor& weight, const Tensor& clips, const Groups& groups,
                        Codebook codebook, const Tensor& bias, const Tensor& y) {
  const int64_t k = x.size(1), n = weight.size(0);
  const int64_t tile = std::min(n, std::max<int64_t>(kWeightTileElements / k, 1));
  const Tensor dense = at::empty({tile, k}, at::kFloat);
  const Kernels& kernels = active_kernels();
  for (int64_t first = 0; first < n; first += tile) {
    const int64_t size = std::min(tile, n - first);
    const DequantizeArgs args{
        .codes = weight.const_data_ptr<uint8_t>() + first * weight.size(1),
        .k = k,
        .group_size = groups.size,
        .groups = groups.count,
        .table = clips.const_data_ptr<float>() + first * groups.count,
        .per_row = true,
        .languages = {},
        .codebook = codebook,
        .out = dense.mutable_data_ptr(),
        .dtype = DType::kFloat32,
    };
    for_rows(size, k, [&](int64_t begin, int64_t end) { kernels.dequantize(args, begin, end); });
    Tensor part = y.narrow(1, first, size);
    const Tensor columns = dense.narrow(0, 0, size).t();
    if (bias.defined()) {
      at::addmm_out(part, bias.narrow(0, first, size), x, columns);
    } else {
      at::mm_out(part, x, columns);
    }
  }
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const optional<Tensor>& bias,
              int64_t group_size, c10::string_view weight_codebook, const optional<Tensor>& signs,
              int64_t block_size, int64_t activation_bits, c10::string_view activation_clip,
              const optional<Tensor>& clip, const optional<Tensor>& language, int64_t activation_group_size,
              c10::string_view activation_codebook) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_rows_of_k("x", x);
  const int64_t k = x.size(-1), rows = x.numel() / k;
  const auto lead = x.sizes().slice(0, x.dim() - 1);
  const DType dtype = dtype_of("x", x.scalar_type());
  const Groups groups = groups_of(k, group_size);
  check_linear(weight, weight_scale, bias, k, groups.count, activation_bits);
  const int64_t n = weight.size(0);
  const Codebook codebook = codebook_of("weight_codebook", weight_codebook);
  const Rotation rotation = checked_rotation(signs, block_size, k);

  // Activations as float32 [rows, k], rotated and rounded to their codebook.
  Tensor activations = x.reshape({rows, k}).contiguous();
  if (activation_bits < 16) {
    TORCH_CHECK_VALUE(clip.has_value(),
                      "clip: expected the clips of the activations for activation_bits=", activation_bits);
    const Groups activation_groups = groups_of(k, activation_group_size);
    const Tensor table = checked_table("clip", *clip, activation_groups.count);
    const LanguageIds ids = checked_language(language, lead);
    const Tensor rounded = at::empty({rows, k}, at::kFloat);
    const QuantizeArgs args{
        .x = activations.const_data_ptr(),
        .dtype = dtype,
        .k = k,
        .group_size = activation_groups.size,
        .groups = activation_groups.count,
        .table = table.const_data_ptr<float>(),
        .languages = ids.of(table.size(0)),
        .clip = clip_of("activation_clip", activation_clip),
        .codebook = codebook_of("activation_codebook", activation_codebook),
        .bits = static_cast<int>(activation_bits),
        .signs = rotation.data(),
        .block = rotation.block,
        .codes = nullptr,
        .values = rounded.mutable_data_ptr<float>(),
        .scales = nullptr,
    };
    const Kernels& kernels = active_kernels();
    for_rows(rows, k, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(rotation.data() ? k : 0);
      kernels.quantize(args, begin, end, scratch.data(), nullptr);
    });
    activations = rounded;
  } else if (rotation.data()) {
    const Tensor rotated = at::empty({rows, k}, at::kFloat);
    rotate_rows(activations, rotation, rotated);
    activations = rotated;
  } else {
    activations = activations.to(at::kFloat);
  }

  const Tensor packed = weight.contiguous(), clips = weight_scale.contiguous();
  const Tensor offset = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const Tensor y = at::empty({rows, n}, at::kFloat);
  if (rows == 0 || n == 0) {
    // nothing to multiply
  } else if (rows <= kMatvecRows) {
    multiply_few_rows(activations, packed, clips, groups, codebook,
                      offset.defined() ? offset.const_data_ptr<float>() : nullptr, y);
  } else {
    multiply_many_rows(activations, packed, clips, groups, codebook, offset, y);
  }
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  return y.to(x.scalar_type()).view(sizes);
}

}  // namespace

// cppcheck-suppress syntaxError ; it does not see the macro
TORCH_LIBRARY_IMPL(la_aciq, CPU, m) { m.impl("linear", linear); }

}  // namespace la_aciq::cpu

// The operations on CUDA tensors: checks, memory, and which kernels in which order. Work goes to the current
// stream of the device of x, memory comes from PyTorch's allocator, and nothing waits for the device, so that
// all of it can be captured in a graph.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "arguments.h"
#include "common/hadamard.h"
#include "cuda/kernels.h"

namespace la_aciq {
namespace {

using cuda::Clips;
using cuda::Matrix;
using cuda::Rotation;
using cuda::SortedRows;
using cuda::Weights;

// --- Arguments ---

void check(cudaError_t error) {
  // Taken, so that the next operation of PyTorch does not report it as its own.
  if (error != cudaSuccess) (void)cudaGetLastError();
  TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, ": expected on ", x.device(), ", got on ",
                    tensor.device());
}

Tensor checked_table_like(const char* name, const Tensor& table, int64_t groups, const Tensor& x) {
  check_device(name, table, x);
  return checked_table(name, table, groups);
}

CheckedIds checked_language_ids_like(const optional<Tensor>& language_ids, at::IntArrayRef lead,
                                     const Tensor& x) {
  if (language_ids) check_device("language_ids", *language_ids, x);
  return checked_language_ids(language_ids, lead);
}

// Elements between the starts of consecutive rows of x [..., k], if all of them are equally far apart and
// each is contiguous.
optional<int64_t> stride_of_rows(const Tensor& x) {
  if (x.stride(-1) != 1 && x.size(-1) > 1) return std::nullopt;
  int64_t stride = x.size(-1), rows_inside = 0;
  for (int64_t i = x.dim() - 2; i >= 0; i--) {
    if (x.size(i) == 1) continue;
    if (rows_inside == 0) {
      stride = x.stride(i);
      rows_inside = x.size(i);
    } else if (x.stride(i) != stride * rows_inside) {
      return std::nullopt;
    } else {
      rows_inside *= x.size(i);
    }
  }
  return stride;
}

// Rows of x [..., k] as the kernels take them, and the tensor that holds them.
struct Rows {
  Tensor tensor;
  Matrix matrix;

  Rows(const Tensor& x, DType dtype) {
    const auto stride = stride_of_rows(x);
    tensor = stride ? x : x.contiguous();
    const int64_t k = x.size(-1);
    matrix = {tensor.const_data_ptr(), dtype, x.numel() / k, k, stride ? *stride : k};
  }
};

LanguageIds ids_of(const CheckedIds& ids, const Tensor& table) {
  return ids.of(table.size(0));
}

struct RotationArgument {
  Tensor signs;  // undefined for none
  Rotation rotation{nullptr, false, 1};
};

RotationArgument checked_rotation(const optional<Tensor>& signs, int64_t block_size, const Tensor& x) {
  RotationArgument result;
  if (!signs) return result;
  check_device("signs", *signs, x);
  result.signs = signs->contiguous();
  result.rotation = {result.signs.const_data_ptr(), signs->scalar_type() == at::kChar,
                     checked_block(*signs, block_size, x.size(-1))};
  return result;
}

// Rows in the order of their entries, for sums per entry.
struct Sorted {
  Tensor order, ids;
  SortedRows rows;

  Sorted(const CheckedIds& checked, int64_t num_entries) : rows{nullptr, nullptr, 0, 1, num_entries} {
    if (!checked.ids.defined()) return;
    const Tensor flat = checked.ids.flatten();
    const Tensor valid =
        at::where(flat.ge(0).logical_and(flat.lt(num_entries)), flat, at::zeros({}, flat.options()));
    std::tie(ids, order) = at::sort(valid, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    rows = {order.const_data_ptr<int64_t>(), ids.const_data_ptr<int32_t>(), flat.numel(), checked.span,
            num_entries};
  }
};

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  auto result = sizes.vec();
  result.back() = last;
  return result;
}

// --- Steps ---

// x [rows, k] rotated, in type. Blocks too long for a multiprocessor are done in parts, and the rest of the
// transform on the parts.
Tensor rotated(const Tensor& x, const RotationArgument& argument, at::ScalarType type, cudaStream_t stream) {
  const Rows rows(x, dtype_of("x", x.scalar_type()));
  const int64_t k = x.size(-1), block = argument.rotation.block;
  Rotation rotation = argument.rotation;
  while (!cuda::block_fits(rotation.block)) rotation.block /= 2;
  const bool whole = rotation.block == block;
  const Tensor out = at::empty(x.sizes(), x.options().dtype(whole ? type : at::kFloat));
  check(cuda::rotate(rows.matrix, rotation, out.mutable_data_ptr(),
                     whole ? dtype_of("x", type) : DType::kFloat32, stream));
  if (whole) return out;
  Tensor y = out.view({-1, k / block, block / rotation.block, rotation.block});
  for (int64_t half = 1; half < block / rotation.block; half *= 2) {
    const Tensor pairs = y.view({-1, block / rotation.block / (2 * half), 2, half * rotation.block});
    const Tensor even = pairs.select(2, 0), odd = pairs.select(2, 1);
    y = at::stack({at::add(even, odd), at::sub(even, odd)}, 2).mul_(M_SQRT1_2);
  }
  return y.view(x.sizes()).to(type);
}

// --- Operations ---

std::tuple<Tensor, Tensor> moments(const Tensor& x, const optional<Tensor>& language_ids, int64_t num_entries,
                                   bool histogram) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  TORCH_CHECK_VALUE(num_entries >= 1 && num_entries <= INT32_MAX, "num_entries: expected at least 1, got ",
                    num_entries);
  const DType dtype = x.scalar_type() == at::kDouble ? DType::kFloat64 : dtype_of("x", x.scalar_type());
  const auto lead = x.dim() ? x.sizes().slice(0, x.dim() - 1) : x.sizes();
  const CheckedIds ids = checked_language_ids_like(language_ids, lead, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Tensor states = at::empty({num_entries, 8}, x.options().dtype(at::kDouble));
  const Tensor counts =
      at::empty({num_entries, histogram ? kHistogramBins : 0, 2}, x.options().dtype(at::kLong));
  // Where there are no ids, rows need not be kept apart.
  const bool flat = !ids.ids.defined() && (x.dim() == 0 || x.is_contiguous());
  const Sorted sorted(ids, num_entries);
  Matrix matrix{x.const_data_ptr(), dtype, x.numel() > 0, x.numel(), x.numel()};
  optional<Rows> rows;
  if (!flat && x.numel() > 0) matrix = rows.emplace(x, dtype).matrix;
  const Tensor partials = at::empty({cuda::moment_partials(matrix, sorted.rows), 8}, states.options());
  check(cuda::moments(matrix, sorted.rows, static_cast<MomentState*>(states.mutable_data_ptr()),
                      histogram ? counts.mutable_data_ptr<int64_t>() : nullptr,
                      static_cast<MomentState*>(partials.mutable_data_ptr()), stream));
  return {states, counts};
}

std::tuple<Tensor, Tensor> quantize(const Tensor& x, const Tensor& clips,
                                    const optional<Tensor>& language_ids, int64_t group_size,
                                    c10::string_view codebook, const optional<Tensor>& signs,
                                    int64_t block_size, bool tail_sums) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_rows_of_k("x", x);
  const int64_t k = x.size(-1);
  const Groups groups = groups_of(k, group_size);
  const DType dtype = dtype_of("x", x.scalar_type());
  const Codebook book = codebook_of("codebook", codebook);
  const Tensor table = checked_table_like("clips", clips, groups.count, x);
  const CheckedIds ids = checked_language_ids_like(language_ids, x.sizes().slice(0, x.dim() - 1), x);
  const RotationArgument rotation = checked_rotation(signs, block_size, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Clips table_clips{table.const_data_ptr<float>(), groups.count, groups.size, false,
                          ids_of(ids, table)};
  const Tensor codes = at::empty(with_last(x.sizes(), (k + 1) / 2), x.options().dtype(at::kByte));
  auto* target = codes.mutable_data_ptr<uint8_t>();
  Tensor tail = at::empty({tail_sums ? table.size(0) : 0, groups.count, 4}, x.options().dtype(at::kDouble));

  Rows rows(x, dtype);
  if (rotation.signs.defined()) {
    if (!tail_sums && cuda::row_fits(rows.matrix, rotation.rotation, table_clips, Clip::kStatic)) {
      check(cuda::quantize_rows(rows.matrix, rotation.rotation, table_clips, Clip::kStatic, book, target,
                                nullptr, stream));
      return {codes, tail};
    }
    rows = Rows(rotated(x, rotation, at::kFloat, stream), DType::kFloat32);
  }
  if (!tail_sums) {
    check(cuda::quantize(rows.matrix, table_clips, book, target, stream));
    return {codes, tail};
  }
  const Sorted sorted(ids, table.size(0));
  const Tensor partials =
      at::empty({cuda::tail_partials_size(rows.matrix, table_clips, sorted.rows)}, codes.options());
  check(cuda::quantize_tails(rows.matrix, table_clips, sorted.rows, book, target,
                             tail.mutable_data_ptr<double>(), partials.mutable_data_ptr(), stream));
  return {codes, tail};
}

std::tuple<Tensor, Tensor> quantize_dynamic(const Tensor& x, const Tensor& clip_factor,
                                            const optional<Tensor>& language_ids, int64_t group_size,
                                            c10::string_view statistic, c10::string_view codebook,
                                            const optional<Tensor>& signs, int64_t block_size) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_rows_of_k("x", x);
  const int64_t k = x.size(-1);
  const Groups groups = groups_of(k, group_size);
  TORCH_CHECK_VALUE(statistic != "static", "statistic: expected 'rms' or 'absmax', got 'static'");
  const Clip clip = clip_of("statistic", statistic);
  const Codebook book = codebook_of("codebook", codebook);
  const Tensor table = checked_table_like("clip_factor", clip_factor, groups.count, x);
  const CheckedIds ids = checked_language_ids_like(language_ids, x.sizes().slice(0, x.dim() - 1), x);
  const RotationArgument rotation = checked_rotation(signs, block_size, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Clips factors{table.const_data_ptr<float>(), groups.count, groups.size, false, ids_of(ids, table)};
  const Tensor codes = at::empty(with_last(x.sizes(), (k + 1) / 2), x.options().dtype(at::kByte));
  const Tensor row_clips = at::empty(with_last(x.sizes(), groups.count), x.options().dtype(at::kFloat));
  auto* target = codes.mutable_data_ptr<uint8_t>();

  Rows rows(x, dtype_of("x", x.scalar_type()));
  if (cuda::row_fits(rows.matrix, rotation.rotation, factors, clip)) {
    check(cuda::quantize_rows(rows.matrix, rotation.rotation, factors, clip, book, target,
                              row_clips.mutable_data_ptr<float>(), stream));
    return {codes, row_clips};
  }
  if (rotation.signs.defined()) rows = Rows(rotated(x, rotation, at::kFloat, stream), DType::kFloat32);
  check(cuda::measure_clips(rows.matrix, factors, clip, row_clips.mutable_data_ptr<float>(), stream));
  const Clips measured{row_clips.const_data_ptr<float>(), groups.count, groups.size, true, {}};
  check(cuda::quantize(rows.matrix, measured, book, target, stream));
  return {codes, row_clips};
}

Tensor dequantize(const Tensor& codes, const Tensor& clips, const optional<Tensor>& language_ids, int64_t k,
                  int64_t group_size, c10::string_view codebook, bool per_row, at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_codes("codes", codes, k);
  const auto lead = codes.sizes().slice(0, codes.dim() - 1);
  const Groups groups = groups_of(k, group_size);
  check_device("clips", clips, codes);
  const Tensor table = per_row ? checked_row_clips("clips", clips, lead, groups.count)
                               : checked_table("clips", clips, groups.count);
  const CheckedIds ids = per_row ? CheckedIds{} : checked_language_ids_like(language_ids, lead, codes);
  const c10::cuda::CUDAGuard guard(codes.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Tensor packed = codes.contiguous(),
               out = at::empty(with_last(codes.sizes(), k), codes.options().dtype(dtype));
  const Clips table_clips{table.const_data_ptr<float>(), groups.count, groups.size, per_row,
                          ids_of(ids, table)};
  check(cuda::dequantize(packed.const_data_ptr<uint8_t>(), product(lead), k, table_clips,
                         codebook_of("codebook", codebook), out.mutable_data_ptr(), dtype_of("dtype", dtype),
                         stream));
  return out;
}

Tensor rotate(const Tensor& x, const Tensor& signs, int64_t block_size) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_rows_of_k("x", x);
  const RotationArgument rotation = checked_rotation(signs, block_size, x);
  const c10::cuda::CUDAGuard guard(x.device());
  return rotated(x, rotation, x.scalar_type(), c10::cuda::getCurrentCUDAStream());
}

// x [rows, k] rounded to the codebook of its activations, in the dtype it has.
Tensor rounded(const Tensor& x, const Tensor& table, const CheckedIds& ids, Groups groups, Clip clip,
               Codebook codebook, int64_t bits, cudaStream_t stream) {
  const Rows rows(x, dtype_of("x", x.scalar_type()));
  Clips table_clips{table.const_data_ptr<float>(), groups.count, groups.size, false, ids_of(ids, table)};
  Tensor row_clips;
  if (clip != Clip::kStatic) {
    row_clips = at::empty({x.size(0), groups.count}, x.options().dtype(at::kFloat));
    check(cuda::measure_clips(rows.matrix, table_clips, clip, row_clips.mutable_data_ptr<float>(), stream));
    table_clips = {row_clips.const_data_ptr<float>(), groups.count, groups.size, true, {}};
  }
  const Tensor values = at::empty(x.sizes(), x.options());
  check(cuda::round_to_codebook(rows.matrix, table_clips, codebook, static_cast<int>(bits),
                                values.mutable_data_ptr(), stream));
  return values;
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& weight_clip, const optional<Tensor>& bias,
              int64_t group_size, c10::string_view weight_codebook, const optional<Tensor>& signs,
              int64_t block_size, int64_t activation_bits, c10::string_view activation_clip,
              const optional<Tensor>& clips, const optional<Tensor>& language_ids,
              int64_t activation_group_size, c10::string_view activation_codebook) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_rows_of_k("x", x);
  const int64_t k = x.size(-1), rows = x.numel() / k;
  const DType dtype = dtype_of("x", x.scalar_type());
  const Groups groups = groups_of(k, group_size);
  check_linear(weight, weight_clip, bias, k, groups.count, activation_bits);
  TORCH_CHECK_VALUE(!is_repacked(weight), "weight: expected uint8 codes on ", x.device(),
                    ", got int32: repack_weight is for the CPU");
  const int64_t n = weight.size(0);
  check_device("weight", weight, x);
  check_device("weight_clip", weight_clip, x);
  if (bias) check_device("bias", *bias, x);
  const Codebook codebook = codebook_of("weight_codebook", weight_codebook);
  const RotationArgument rotation = checked_rotation(signs, block_size, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();

  // Activations in the dtype of x; what is rounded to a codebook is rotated in float32 first.
  Tensor activations = x.reshape({rows, k});
  if (rotation.signs.defined()) {
    activations = rotated(activations, rotation, activation_bits < 16 ? at::kFloat : x.scalar_type(), stream);
  }
  if (activation_bits < 16) {
    TORCH_CHECK_VALUE(clips.has_value(),
                      "clips: expected the clips of the activations for activation_bits=", activation_bits);
    const Groups activation_groups = groups_of(k, activation_group_size);
    const Tensor table = checked_table_like("clips", *clips, activation_groups.count, x);
    const CheckedIds ids = checked_language_ids_like(language_ids, x.sizes().slice(0, x.dim() - 1), x);
    activations =
        rounded(activations, table, ids, activation_groups, clip_of("activation_clip", activation_clip),
                codebook_of("activation_codebook", activation_codebook), activation_bits, stream)
            .to(x.scalar_type());
  }

  const Tensor packed = weight.contiguous(), weight_clips = weight_clip.contiguous();
  const Rows input(activations, dtype);
  const Weights weights{packed.const_data_ptr<uint8_t>(),
                        weight_clips.const_data_ptr<float>(),
                        n,
                        groups.count,
                        groups.size,
                        codebook};
  Tensor out;
  if (rows == 0 || n == 0) {
    out = at::empty({rows, n}, x.options());
  } else if (cuda::linear_fits(input.matrix, weights)) {
    out = at::empty({rows, n}, x.options());
    const Tensor offset = bias ? bias->to(at::kFloat).contiguous() : Tensor();
    const Tensor partials =
        at::empty({cuda::linear_partials(input.matrix, weights)}, x.options().dtype(at::kFloat));
    check(cuda::linear(input.matrix, weights, offset.defined() ? offset.const_data_ptr<float>() : nullptr,
                       out.mutable_data_ptr(), partials.mutable_data_ptr<float>(), stream));
  } else {
    const Tensor dense = dequantize(packed, weight_clips, std::nullopt, k, group_size, weight_codebook,
                                    /*per_row=*/true, x.scalar_type());
    out = at::linear(activations, dense, bias ? optional<Tensor>(bias->to(x.scalar_type())) : std::nullopt);
  }
  return out.view(with_last(x.sizes(), n));
}

}  // namespace

TORCH_LIBRARY_IMPL(la_aciq, CUDA, m) {
  m.impl("moments", moments);
  m.impl("quantize", quantize);
  m.impl("quantize_dynamic", quantize_dynamic);
  m.impl("dequantize", dequantize);
  m.impl("rotate", rotate);
  m.impl("linear", linear);
}

}  // namespace la_aciq

// y = x W^T with INT4 weights on CPU tensors: checks, which kernel takes which shape, and threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "cpu/aten/rows.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/segments.h"

namespace la_aciq::cpu {
namespace {

constexpr int64_t kFewRows = 16;  // up to here decoding weights in registers beats decoding them in the cache
constexpr int64_t kProductRows = 192;  // their sums for a panel of outputs stay in a core's own cache

// The activations of a matrix product: floats, or codes of one byte with their clips.
struct Activations {
  const void* x;  // [rows, k]
  DType dtype;    // of x, where it holds floats
  int64_t rows, k;
  const float* row_clips;  // [rows, groups.count], null for floats
  Groups groups;
  int bits;           // of the codes
  Codebook codebook;  // of the codes, as bits

  bool codes() const { return row_clips != nullptr; }
  int64_t levels() const { return int64_t{1} << bits; }
  int zero() const { return static_cast<int>(codebook == Codebook::kMidrise ? levels() - 1 : levels()); }
  int steps() const { return codes() ? static_cast<int>(levels() - 1) : 1; }
};

// Whether every 8 members from a multiple of 8 on are in one group.
bool whole_eights(const Groups& groups) { return groups.count == 1 || groups.size % 8 == 0; }

void check_whole_eights(const char* name, const Groups& groups) {
  TORCH_CHECK_VALUE(whole_eights(groups), name,
                    ": expected a multiple of 8 for weights from repack_weight, got ", groups.size);
}

// out [rows, n] = x [rows, k] times INT4 weights.
void multiply(const Product& product, const Activations& activations, const Tensor& weight,
              const Tensor& weight_clip, const Groups& groups, Codebook codebook, const float* bias,
              const Tensor& out) {
  const int64_t rows = activations.rows, k = activations.k, n = out.size(-1);
  const bool codes = activations.codes();
  const std::vector<Segment> segments =
      segments_of(k, activations.groups.size, groups.size, product.tile_members);
  const int64_t width = segments.back().offset + segments.back().padded(), packed_rows = rows + codes;
  const at::DataPtr packed = new_scratch(packed_rows * width * product.element_size);
  const PackArgs pack{
      .x = activations.x,
      .dtype = activations.dtype,
      .rows = rows,
      .k = k,
      .segments = segments.data(),
      .segment_count = static_cast<int64_t>(segments.size()),
      .packed_rows = packed_rows,
      .out = packed.get(),
  };
  for_rows(packed_rows, k, [&](int64_t begin, int64_t end) { product.pack(pack, begin, end); });

  const int64_t blocks = (rows + kProductRows - 1) / kProductRows;
  const int64_t block_rows = (rows + blocks - 1) / blocks;
  const ProductArgs args{
      .x = packed.get(),
      .rows = rows,
      .k = k,
      .n = n,
      .segments = segments.data(),
      .segment_count = static_cast<int64_t>(segments.size()),
      .packed_rows = packed_rows,
      .width = width,
      .row_clips = activations.row_clips,
      .activation_groups = activations.groups.count,
      .zero = activations.zero(),
      .weight = static_cast<const uint8_t*>(weight.const_data_ptr()),
      .repacked = is_repacked(weight),
      .clips = weight_clip.const_data_ptr<float>(),
      .weight_groups = groups.count,
      .steps = activations.steps(),
      .bias = bias,
      .codebook = codebook,
      .out = out.mutable_data_ptr(),
      .dtype = dtype_of("out", out.scalar_type()),
      .row_blocks = blocks,
      .block_rows = block_rows,
  };
  const auto lanes = [&](int64_t panels) { return args.repacked ? 0 : panels * width * 8; };  // bytes
  if (rows <= kFewRows) {
    // Multiplying with a weight costs a twelfth of what an element costs elsewhere.
    for_rows((n + 15) / 16, 16 * k * rows / 12, [&](int64_t begin, int64_t end) {
      const at::DataPtr scratch = new_scratch(lanes(std::min(end - begin, kFewPanels)));
      product.multiply_few(args, begin, end, static_cast<uint8_t*>(scratch.get()));
    });
    return;
  }
  const int64_t panels = (n + product.panel - 1) / product.panel;
  const int64_t tile = product.tile_members * product.panel * product.element_size / 4;  // in floats
  const int64_t starts = product.tile_members / 8 * product.panel, panel_clips = groups.count * product.panel;
  for_rows(panels * blocks, product.panel * k / 4, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = new_scratch(4 * (tile + starts + panel_clips + block_rows * product.panel) +
                                            lanes(product.panel / 16));
    float* memory = static_cast<float*>(scratch.get());
    float* totals = memory + tile + starts + panel_clips;
    product.multiply(args, begin, end,
                     {reinterpret_cast<uint8_t*>(totals + block_rows * product.panel), memory,
                      reinterpret_cast<int32_t*>(memory + tile), memory + tile + starts, totals});
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& weight_clip, const optional<Tensor>& bias,
              int64_t group_size, c10::string_view weight_codebook, const optional<Tensor>& signs,
              int64_t block_size, int64_t activation_bits, c10::string_view activation_clip,
              const optional<Tensor>& clips, const optional<Tensor>& language_ids,
              int64_t activation_group_size, c10::string_view activation_codebook) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_rows_of_k("x", x);
  const int64_t k = x.size(-1), rows = x.numel() / k;
  const auto lead = x.sizes().slice(0, x.dim() - 1);
  const DType dtype = dtype_of("x", x.scalar_type());
  const Groups groups = groups_of(k, group_size);
  check_linear(weight, weight_clip, bias, k, groups.count, activation_bits);
  const int64_t n = weight_clip.size(0);
  if (is_repacked(weight)) check_whole_eights("group_size", groups);
  const Codebook codebook = codebook_of("weight_codebook", weight_codebook);
  const Rotation rotation = checked_rotation(signs, block_size, k);

  const Kernels& kernels = active_kernels();
  const Tensor packed = weight.contiguous(), weight_clips = weight_clip.contiguous();
  const Tensor offset = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const float* offsets = offset.defined() ? offset.const_data_ptr<float>() : nullptr;
  at::DimVector sizes(x.sizes());
  sizes.back() = n;
  const Tensor out = at::empty(sizes, x.scalar_type()), input = x.contiguous();
  if (activation_bits < 16) {
    TORCH_CHECK_VALUE(clips.has_value(),
                      "clips: expected the clips of the activations for activation_bits=", activation_bits);
    const Groups activation_groups = groups_of(k, activation_group_size);
    if (is_repacked(weight)) check_whole_eights("activation_group_size", activation_groups);
    const Tensor table = checked_table("clips", *clips, activation_groups.count);
    const CheckedIds ids = checked_language_ids(language_ids, lead);
    const at::DataPtr codes = new_scratch(rows * k),
                      row_clips = new_scratch(4 * rows * activation_groups.count);
    const QuantizeArgs args{
        .x = input.const_data_ptr(),
        .dtype = dtype,
        .k = k,
        .group_size = activation_groups.size,
        .groups = activation_groups.count,
        .table = table.const_data_ptr<float>(),
        .language_ids = ids.of(table.size(0)),
        .clip = clip_of("activation_clip", activation_clip),
        .codebook = codebook_of("activation_codebook", activation_codebook),
        .bits = static_cast<int>(activation_bits),
        .rotation = rotation.args(),
        .codes = nullptr,
        .bytes = static_cast<uint8_t*>(codes.get()),
        .row_clips = static_cast<float*>(row_clips.get()),
    };
    if (rows == 0 || n == 0) return out;
    for_rows(rows, k, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(rotation ? k : 0);
      kernels.quantize(args, begin, end, scratch.data(), nullptr);
      for (int64_t i = begin * args.groups; i < end * args.groups; i++) {
        args.row_clips[i] = clip_or_zero(args.row_clips[i]);
      }
    });
    multiply(kernels.integer_product,
             {.x = args.bytes,
              .dtype = dtype,
              .rows = rows,
              .k = k,
              .row_clips = args.row_clips,
              .groups = activation_groups,
              .bits = args.bits,
              .codebook = args.codebook},
             packed, weight_clips, groups, codebook, offsets, out);
    return out;
  }
  if (rows == 0 || n == 0) return out;
  Tensor activations = input;
  if (rotation) {
    // bfloat16 stays what it is, for its product; float16's range is not enough for sums of a block.
    activations = at::empty({rows, k}, dtype == DType::kBFloat16 ? at::kBFloat16 : at::kFloat);
    rotate_rows(input, rotation, activations);
  }
  const DType type = dtype_of("x", activations.scalar_type());
  multiply(type == DType::kBFloat16 ? kernels.bfloat16_product : kernels.float_product,
           {.x = activations.const_data_ptr(),
            .dtype = type,
            .rows = rows,
            .k = k,
            .row_clips = nullptr,
            .groups = groups_of(k, 0),
            .bits = 0,
            .codebook = Codebook::kMidrise},
           packed, weight_clips, groups, codebook, offsets, out);
  return out;
}

}  // namespace

// cppcheck-suppress syntaxError ; it does not see the macro
TORCH_LIBRARY_IMPL(la_aciq, CPU, m) { m.impl("linear", linear); }

}  // namespace la_aciq::cpu

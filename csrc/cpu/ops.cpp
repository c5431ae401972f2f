// The operations on CPU tensors: checks, contiguous memory, and which thread works on which rows. The
// arithmetic is in the kernels.
//
// Nothing here depends on the number of threads except who does the work: whatever is summed over rows is
// summed per chunk, chunks follow from the shape alone, and their results are merged in order.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace la_aciq::cpu {
namespace {

constexpr int64_t kMaxChunks = 256;  // partial results of reductions
constexpr int64_t kMaxPartialBytes = 64 << 20;

// --- Work for threads ---

// How many partial results a reduction over `elements` keeps: enough for every thread, few enough that
// zeroing and merging partial results of `partial_bytes` each is cheap beside reading the elements.
int64_t chunk_count(int64_t elements, int64_t partial_bytes) {
  const int64_t at_most = std::min(kMaxChunks, kMaxPartialBytes / std::max<int64_t>(partial_bytes, 1));
  const int64_t elements_per_chunk = std::max<int64_t>(2 * kElementsPerTask, partial_bytes / 4);
  return std::clamp<int64_t>(elements / elements_per_chunk, 1, std::max<int64_t>(at_most, 1));
}

// body(chunk, begin, end): chunk c of `chunks` equal parts of [0, count).
template <class Body>
void for_chunks(int64_t chunks, int64_t count, const Body& body) {
  const int64_t size = (count + chunks - 1) / chunks;
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; chunk++) {
      body(chunk, std::min(chunk * size, count), std::min((chunk + 1) * size, count));
    }
  });
}

// --- Operations ---

std::tuple<Tensor, Tensor> moments(const Tensor& x, const optional<Tensor>& language, int64_t languages,
                                   bool histogram) {
  TORCH_CHECK_VALUE(languages >= 1 && languages <= INT32_MAX, "languages: expected at least 1, got ",
                    languages);
  const DType dtype = x.scalar_type() == at::kDouble ? DType::kFloat64 : dtype_of("x", x.scalar_type());
  const auto lead = x.dim() ? x.sizes().slice(0, x.dim() - 1) : x.sizes();
  const LanguageIds ids = checked_language(language, lead);
  const Tensor values = x.contiguous();
  const int64_t k = x.dim() ? x.size(-1) : 1, elements = x.numel();
  const MomentsArgs args{values.const_data_ptr(), dtype, ids.of(languages, std::max<int64_t>(k, 1))};
  const Kernels& kernels = active_kernels();

  const int64_t bins = histogram ? 2 * kHistogramBins : 0;
  const int64_t chunks =
      chunk_count(elements, languages * static_cast<int64_t>(sizeof(MomentState) + 8 * bins));
  std::vector<MomentState> states(chunks * languages, empty_moments());
  const Tensor counts = at::zeros({chunks, languages, bins / 2, 2}, at::kLong);
  for_chunks(chunks, elements, [&](int64_t chunk, int64_t begin, int64_t end) {
    int64_t* histogram_of_chunk =
        histogram ? counts.mutable_data_ptr<int64_t>() + chunk * languages * bins : nullptr;
    kernels.moments(args, begin, end, states.data() + chunk * languages, histogram_of_chunk);
  });

  const Tensor out = at::empty({languages, 8}, at::kDouble);
  for (int64_t row = 0; row < languages; row++) {
    MomentState total = states[row];
    for (int64_t chunk = 1; chunk < chunks; chunk++) merge_moments(total, states[chunk * languages + row]);
    memcpy(out.mutable_data_ptr<double>() + 8 * row, &total, sizeof(total));
  }
  return {out, chunks == 1 ? counts[0].clone() : counts.sum(0)};
}

std::tuple<Tensor, Tensor> quantize(const Tensor& x, const Tensor& alpha, const optional<Tensor>& language,
                                    int64_t group_size, c10::string_view codebook,
                                    const optional<Tensor>& signs, int64_t block_size, bool tail_sums) {
  check_rows_of_k("x", x);
  const int64_t k = x.size(-1), rows = x.numel() / k;
  const auto lead = x.sizes().slice(0, x.dim() - 1);
  const Groups groups = groups_of(k, group_size);
  const Tensor table = checked_table("alpha", alpha, groups.count), values = x.contiguous();
  const LanguageIds ids = checked_language(language, lead);
  const Rotation rotation = checked_rotation(signs, block_size, k);
  auto sizes = x.sizes().vec();
  sizes.back() = (k + 1) / 2;
  const Tensor codes = at::empty(sizes, at::kByte);
  const QuantizeArgs args{
      .x = values.const_data_ptr(),
      .dtype = dtype_of("x", x.scalar_type()),
      .k = k,
      .group_size = groups.size,
      .groups = groups.count,
      .table = table.const_data_ptr<float>(),
      .languages = ids.of(table.size(0)),
      .clip = Clip::kStatic,
      .codebook = codebook_of("codebook", codebook),
      .bits = 4,
      .signs = rotation.data(),
      .block = rotation.block,
      .codes = codes.mutable_data_ptr<uint8_t>(),
      .bytes = nullptr,
      .scales = nullptr,
  };
  const Kernels& kernels = active_kernels();
  const auto scratch_size = rotation.data() ? k : 0;
  if (!tail_sums) {
    for_rows(rows, k, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(scratch_size);
      kernels.quantize(args, begin, end, scratch.data(), nullptr);
    });
    return {codes, at::empty({0, groups.count, 4}, at::kDouble)};
  }
  const int64_t entries = table.numel() * 4;
  const int64_t chunks = chunk_count(x.numel(), entries * static_cast<int64_t>(sizeof(double)));
  const Tensor tails = at::zeros({chunks, table.size(0), groups.count, 4}, at::kDouble);
  for_chunks(chunks, rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    std::vector<float> scratch(scratch_size);
    kernels.quantize(args, begin, end, scratch.data(), tails.mutable_data_ptr<double>() + chunk * entries);
  });
  const Tensor tail = tails[0].clone();
  for (int64_t chunk = 1; chunk < chunks; chunk++) tail.add_(tails[chunk]);
  return {codes, tail};
}

std::tuple<Tensor, Tensor> quantize_dynamic(const Tensor& x, const Tensor& shape,
                                            const optional<Tensor>& language, int64_t group_size,
                                            c10::string_view statistic, c10::string_view codebook,
                                            const optional<Tensor>& signs, int64_t block_size) {
  check_rows_of_k("x", x);
  const int64_t k = x.size(-1), rows = x.numel() / k;
  const auto lead = x.sizes().slice(0, x.dim() - 1);
  const Groups groups = groups_of(k, group_size);
  const Tensor table = checked_table("shape", shape, groups.count), values = x.contiguous();
  const LanguageIds ids = checked_language(language, lead);
  const Rotation rotation = checked_rotation(signs, block_size, k);
  TORCH_CHECK_VALUE(statistic != "static", "statistic: expected 'rms' or 'absmax', got 'static'");
  auto sizes = x.sizes().vec();
  sizes.back() = (k + 1) / 2;
  const Tensor codes = at::empty(sizes, at::kByte);
  sizes.back() = groups.count;
  const Tensor scales = at::empty(sizes, at::kFloat);
  const QuantizeArgs args{
      .x = values.const_data_ptr(),
      .dtype = dtype_of("x", x.scalar_type()),
      .k = k,
      .group_size = groups.size,
      .groups = groups.count,
      .table = table.const_data_ptr<float>(),
      .languages = ids.of(table.size(0)),
      .clip = clip_of("statistic", statistic),
      .codebook = codebook_of("codebook", codebook),
      .bits = 4,
      .signs = rotation.data(),
      .block = rotation.block,
      .codes = codes.mutable_data_ptr<uint8_t>(),
      .bytes = nullptr,
      .scales = scales.mutable_data_ptr<float>(),
  };
  const Kernels& kernels = active_kernels();
  for_rows(rows, k, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(rotation.data() ? k : 0);
    kernels.quantize(args, begin, end, scratch.data(), nullptr);
  });
  return {codes, scales};
}

Tensor dequantize(const Tensor& codes, const Tensor& alpha, const optional<Tensor>& language, int64_t k,
                  int64_t group_size, c10::string_view codebook, bool per_row, at::ScalarType dtype) {
  check_codes("codes", codes, k);
  const auto lead = codes.sizes().slice(0, codes.dim() - 1);
  const Groups groups = groups_of(k, group_size);
  const Tensor packed = codes.contiguous();
  Tensor table;
  LanguageIds ids;
  if (per_row) {
    table = checked_scales("alpha", alpha, lead, groups.count);
  } else {
    table = checked_table("alpha", alpha, groups.count);
    ids = checked_language(language, lead);
  }
  auto sizes = codes.sizes().vec();
  sizes.back() = k;
  const Tensor out = at::empty(sizes, dtype);
  const DequantizeArgs args{
      .codes = packed.const_data_ptr<uint8_t>(),
      .k = k,
      .group_size = groups.size,
      .groups = groups.count,
      .table = table.const_data_ptr<float>(),
      .per_row = per_row,
      .languages = ids.of(table.size(0)),
      .codebook = codebook_of("codebook", codebook),
      .out = out.mutable_data_ptr(),
      .dtype = dtype_of("dtype", dtype),
  };
  const Kernels& kernels = active_kernels();
  for_rows(product(lead), k, [&](int64_t begin, int64_t end) { kernels.dequantize(args, begin, end); });
  return out;
}

Tensor rotate(const Tensor& x, const Tensor& signs, int64_t block_size) {
  check_rows_of_k("x", x);
  const Rotation rotation = checked_rotation(signs, block_size, x.size(-1));
  const Tensor values = x.contiguous(), out = at::empty(x.sizes(), values.options());
  rotate_rows(values, rotation, out);
  return out;
}

}  // namespace

// cppcheck-suppress syntaxError ; it does not see the macro
TORCH_LIBRARY_IMPL(la_aciq, CPU, m) {
  m.impl("moments", moments);
  m.impl("quantize", quantize);
  m.impl("quantize_dynamic", quantize_dynamic);
  m.impl("dequantize", dequantize);
  m.impl("rotate", rotate);
}

}  // namespace la_aciq::cpu

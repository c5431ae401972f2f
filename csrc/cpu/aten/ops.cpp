// The operations on CPU tensors: checks, contiguous memory, and which thread works on which rows. The
// arithmetic is in the kernels.
//
// Nothing here depends on the number of threads except who does the work: whatever is summed over rows is
// summed per chunk, chunks follow from the shape alone, and their results are merged in order.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/aten/rows.h"
#include "cpu/kernels/kernels.h"

namespace la_aciq::cpu {
namespace {

constexpr int64_t kMaxChunks = 256;  // partial results of reductions
constexpr int64_t kMaxPartialBytes = 64 << 20;
// Lanes of a histogram are 16 KiB per entry and thread, zeroed and read once per call.
constexpr int64_t kMaxEntriesInLanes = 128;
constexpr int64_t kMinElementsInLanes = 16384;

// --- Work for threads ---

// How many partial results a reduction over `elements` keeps: enough for every thread, few enough that
// zeroing and merging partial results of `partial_bytes` each is cheap beside reading the elements.
int64_t chunk_count(int64_t elements, int64_t partial_bytes) {
  const int64_t at_most = std::min(kMaxChunks, kMaxPartialBytes / std::max<int64_t>(partial_bytes, 1));
  const int64_t elements_per_chunk = std::max<int64_t>(kElementsPerTask, partial_bytes / 4);
  return std::clamp<int64_t>(elements / elements_per_chunk, 1, std::max<int64_t>(at_most, 1));
}

// body(first, last, range_of) for ranges of chunks, where range_of(chunk) is the chunk's part of [0, count):
// a pair.
template <class Body>
void for_chunks(int64_t chunks, int64_t count, const Body& body) {
  const int64_t size = (count + chunks - 1) / chunks;
  const auto range_of = [&](int64_t chunk) {
    return std::pair(std::min(chunk * size, count), std::min((chunk + 1) * size, count));
  };
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) { body(first, last, range_of); });
}

// --- Operations ---

std::tuple<Tensor, Tensor> moments(const Tensor& x, const optional<Tensor>& language_ids, int64_t num_entries,
                                   bool histogram) {
  TORCH_CHECK_VALUE(num_entries >= 1 && num_entries <= INT32_MAX, "num_entries: expected at least 1, got ",
                    num_entries);
  const DType dtype = x.scalar_type() == at::kDouble ? DType::kFloat64 : dtype_of("x", x.scalar_type());
  const auto lead = x.dim() ? x.sizes().slice(0, x.dim() - 1) : x.sizes();
  const CheckedIds ids = checked_language_ids(language_ids, lead);
  const Tensor values = x.contiguous();
  const int64_t k = x.dim() ? x.size(-1) : 1, elements = x.numel();
  const MomentsArgs args{values.const_data_ptr(), dtype, ids.of(num_entries, std::max<int64_t>(k, 1))};
  const Kernels& kernels = active_kernels();

  const int64_t bins = histogram ? 2 * kHistogramBins : 0;
  const int64_t chunks =
      chunk_count(elements, num_entries * static_cast<int64_t>(sizeof(MomentState) + 8 * bins));
  const bool in_lanes = histogram && num_entries <= kMaxEntriesInLanes && elements >= kMinElementsInLanes;
  std::vector<MomentState> states(chunks * num_entries, empty_moments());
  const Tensor counts = histogram ? at::zeros({num_entries, kHistogramBins, 2}, at::kLong)
                                  : at::empty({num_entries, 0, 2}, at::kLong);
  std::mutex counts_mutex;
  for_chunks(chunks, elements, [&](int64_t first, int64_t last, const auto& range_of) {
    // Counts are integers: one histogram per thread is enough, and the order in which they are added does not
    // show.
    int64_t* all_counts = counts.mutable_data_ptr<int64_t>();
    std::vector<HistogramLanes> lanes(in_lanes ? num_entries : 0);
    std::vector<int64_t> thread_counts(chunks > 1 ? num_entries * bins : 0);
    int64_t* histograms = !histogram ? nullptr : chunks > 1 ? thread_counts.data() : all_counts;
    for (int64_t chunk = first; chunk < last; chunk++) {
      const auto [begin, end] = range_of(chunk);
      kernels.moments(args, begin, end, states.data() + chunk * num_entries,
                      in_lanes ? lanes.data() : nullptr, histograms);
    }
    for (size_t entry = 0; entry < lanes.size(); entry++) {
      kernels.unpack_histogram(lanes[entry], histograms + entry * bins);
    }
    if (!thread_counts.empty()) {
      const std::lock_guard<std::mutex> lock(counts_mutex);
      for (size_t i = 0; i < thread_counts.size(); i++) all_counts[i] += thread_counts[i];
    }
  });

  const Tensor out = at::empty({num_entries, 8}, at::kDouble);
  for (int64_t entry = 0; entry < num_entries; entry++) {
    MomentState total = states[entry];
    for (int64_t chunk = 1; chunk < chunks; chunk++)
      merge_moments(total, states[chunk * num_entries + entry]);
    memcpy(out.mutable_data_ptr<double>() + 8 * entry, &total, sizeof(total));
  }
  return {out, counts};
}

// What `quantize` and `quantize_dynamic` share: checked arguments and new outputs.
struct Quantization {
  int64_t rows;
  Tensor values, table, codes, row_clips;
  CheckedIds ids;
  Rotation rotation;
  QuantizeArgs args;

  void run(int64_t begin, int64_t end, double* tail) const {
    std::vector<float> scratch(rotation ? args.k : 0);
    active_kernels().quantize(args, begin, end, scratch.data(), tail);
  }
};

Quantization quantization(const Tensor& x, const char* table_name, const Tensor& table,
                          const optional<Tensor>& language_ids, int64_t group_size, Clip clip,
                          c10::string_view codebook, const optional<Tensor>& signs, int64_t block_size) {
  check_rows_of_k("x", x);
  const int64_t k = x.size(-1);
  const auto lead = x.sizes().slice(0, x.dim() - 1);
  const DType dtype = dtype_of("x", x.scalar_type());
  const Groups groups = groups_of(k, group_size);
  Quantization q{.rows = x.numel() / k,
                 .values = x.contiguous(),
                 .table = checked_table(table_name, table, groups.count),
                 .codes = {},
                 .row_clips = {},
                 .ids = checked_language_ids(language_ids, lead),
                 .rotation = checked_rotation(signs, block_size, k),
                 .args = {}};
  at::DimVector sizes(x.sizes());
  sizes.back() = (k + 1) / 2;
  q.codes = new_output(sizes, at::kByte);
  if (clip != Clip::kStatic) {
    sizes.back() = groups.count;
    q.row_clips = new_output(sizes, at::kFloat);
  }
  q.args = {
      .x = q.values.const_data_ptr(),
      .dtype = dtype,
      .k = k,
      .group_size = groups.size,
      .groups = groups.count,
      .table = q.table.const_data_ptr<float>(),
      .language_ids = q.ids.of(table.size(0)),
      .clip = clip,
      .codebook = codebook_of("codebook", codebook),
      .bits = 4,
      .rotation = q.rotation.args(),
      .codes = q.codes.mutable_data_ptr<uint8_t>(),
      .bytes = nullptr,
      .row_clips = q.row_clips.defined() ? q.row_clips.mutable_data_ptr<float>() : nullptr,
  };
  return q;
}

std::tuple<Tensor, Tensor> quantize(const Tensor& x, const Tensor& clips,
                                    const optional<Tensor>& language_ids, int64_t group_size,
                                    c10::string_view codebook, const optional<Tensor>& signs,
                                    int64_t block_size, bool tail_sums) {
  const Quantization q =
      quantization(x, "clips", clips, language_ids, group_size, Clip::kStatic, codebook, signs, block_size);
  const int64_t num_entries = q.table.size(0), groups = q.args.groups;
  if (!tail_sums) {
    for_rows(q.rows, q.args.k, [&](int64_t begin, int64_t end) { q.run(begin, end, nullptr); });
    return {q.codes, at::empty({0, groups, 4}, at::kDouble)};
  }
  const int64_t sums = num_entries * groups * 4;
  const int64_t chunks = chunk_count(x.numel(), sums * static_cast<int64_t>(sizeof(double)));
  std::vector<double> tails(chunks * sums);
  for_chunks(chunks, q.rows, [&](int64_t first, int64_t last, const auto& range_of) {
    for (int64_t chunk = first; chunk < last; chunk++) {
      const auto [begin, end] = range_of(chunk);
      q.run(begin, end, tails.data() + chunk * sums);
    }
  });
  const Tensor tail = at::empty({num_entries, groups, 4}, at::kDouble);
  double* total = tail.mutable_data_ptr<double>();
  std::copy_n(tails.begin(), sums, total);
  for (int64_t chunk = 1; chunk < chunks; chunk++) {
    for (int64_t i = 0; i < sums; i++) total[i] += tails[chunk * sums + i];
  }
  return {q.codes, tail};
}

std::tuple<Tensor, Tensor> quantize_dynamic(const Tensor& x, const Tensor& clip_factor,
                                            const optional<Tensor>& language_ids, int64_t group_size,
                                            c10::string_view statistic, c10::string_view codebook,
                                            const optional<Tensor>& signs, int64_t block_size) {
  TORCH_CHECK_VALUE(statistic != "static", "statistic: expected 'rms' or 'absmax', got 'static'");
  const Quantization q = quantization(x, "clip_factor", clip_factor, language_ids, group_size,
                                      clip_of("statistic", statistic), codebook, signs, block_size);
  for_rows(q.rows, q.args.k, [&](int64_t begin, int64_t end) { q.run(begin, end, nullptr); });
  return {q.codes, q.row_clips};
}

Tensor dequantize(const Tensor& codes, const Tensor& clips, const optional<Tensor>& language_ids, int64_t k,
                  int64_t group_size, c10::string_view codebook, bool per_row, at::ScalarType dtype) {
  check_codes("codes", codes, k);
  const auto lead = codes.sizes().slice(0, codes.dim() - 1);
  const Groups groups = groups_of(k, group_size);
  const Tensor packed = codes.contiguous();
  Tensor table;
  CheckedIds ids;
  if (per_row) {
    table = checked_row_clips("clips", clips, lead, groups.count);
  } else {
    table = checked_table("clips", clips, groups.count);
    ids = checked_language_ids(language_ids, lead);
  }
  at::DimVector sizes(codes.sizes());
  sizes.back() = k;
  const Tensor out = new_output(sizes, dtype);
  const DequantizeArgs args{
      .codes = packed.const_data_ptr<uint8_t>(),
      .k = k,
      .group_size = groups.size,
      .groups = groups.count,
      .table = table.const_data_ptr<float>(),
      .per_row = per_row,
      .language_ids = ids.of(table.size(0)),
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
  const Tensor values = x.contiguous(), out = new_output(x.sizes(), x.scalar_type());
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

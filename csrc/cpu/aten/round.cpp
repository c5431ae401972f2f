// `round_weights` on CPU tensors: checks, and which thread rounds which rows.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "arguments.h"
#include "cpu/aten/rows.h"
#include "cpu/kernels/kernels.h"

namespace la_aciq::cpu {
namespace {

// Rows of a task: with more, each block of the matrices is packed for more rows; with fewer, threads that run
// slower than others hold up the rest for less time, and the rows' columns need less memory.
constexpr int64_t kLeastRows = 32, kMostRows = 128;
constexpr int64_t kTasksPerThread = 4;

int64_t rows_per_task(int64_t rows) {
  const int64_t tasks = kTasksPerThread * at::get_num_threads(), wanted = (rows + tasks - 1) / tasks;
  return std::clamp((wanted + 15) / 16 * 16, kLeastRows, kMostRows);
}

// The inverses of the upper triangular blocks on the factor's diagonal, as RoundArgs has them.
std::vector<float> inverses_of(const float* factor, int64_t k, int64_t group_size) {
  std::vector<float> inverses(k * kRoundBlock);
  std::vector<double> rows(kRoundBlock * kRoundBlock);
  for (int64_t group = 0; group < k; group += group_size) {
    const int64_t group_end = std::min(group + group_size, k);
    for (int64_t first = group; first < group_end; first += kRoundBlock) {
      const int64_t size = std::min(kRoundBlock, group_end - first);
      // From the last row on: a row is what is left of the identity's once the rows after it are taken off.
      for (int64_t j = size - 1; j >= 0; j--) {
        const float* upper = factor + (first + j) * k + first;
        double* row = rows.data() + j * kRoundBlock;
        std::fill_n(row, size, 0.0);
        row[j] = 1;
        for (int64_t m = j + 1; m < size; m++) {
          const double* later = rows.data() + m * kRoundBlock;
          for (int64_t i = m; i < size; i++) row[i] -= upper[m] * later[i];
        }
        for (int64_t i = j; i < size; i++) row[i] /= upper[j];
        std::copy_n(row, size, inverses.data() + (first + j) * kRoundBlock);
      }
    }
  }
  return inverses;
}

std::tuple<Tensor, Tensor> round_weights(const Tensor& weight, const Tensor& second_moments,
                                         const Tensor& factor, int64_t group_size,
                                         c10::string_view codebook) {
  const Groups groups = check_rounding(weight, second_moments, factor, group_size);
  const int64_t n = weight.size(0), k = weight.size(1);
  const Tensor values = weight.contiguous(), moments = second_moments.contiguous(),
               upper = factor.contiguous();
  const Tensor codes = new_output({n, (k + 1) / 2}, at::kByte),
               clips = new_output({n, groups.count}, at::kFloat);
  const std::vector<float> inverses = inverses_of(upper.const_data_ptr<float>(), k, groups.size);
  const RoundArgs args{
      .weight = values.const_data_ptr(),
      .dtype = dtype_of("weight", weight.scalar_type()),
      .k = k,
      .group_size = groups.size,
      .groups = groups.count,
      .second_moments = moments.const_data_ptr<float>(),
      .factor = upper.const_data_ptr<float>(),
      .inverses = inverses.data(),
      .codebook = codebook_of("codebook", codebook),
      .codes = codes.mutable_data_ptr<uint8_t>(),
      .clips = clips.mutable_data_ptr<float>(),
  };
  const Kernels& kernels = active_kernels();
  const int64_t rows = rows_per_task(n), tasks = (n + rows - 1) / rows;
  // Threads take tasks in turn, so that one that shares its core with another process takes fewer of them.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const at::DataPtr scratch =
        new_scratch(kernels.round_scratch(args, std::min(rows, n)) * static_cast<int64_t>(sizeof(float)));
    for (int64_t task = next++; task < tasks; task = next++) {
      kernels.round_weights(args, task * rows, std::min((task + 1) * rows, n),
                            static_cast<float*>(scratch.get()));
    }
  });
  return {codes, clips};
}

}  // namespace

// cppcheck-suppress syntaxError ; it does not see the macro
TORCH_LIBRARY_IMPL(la_aciq, CPU, m) { m.impl("round_weights", round_weights); }

}  // namespace la_aciq::cpu

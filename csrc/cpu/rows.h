// What the operations on CPU tensors share: handing rows to threads, and the rotation of rows.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"

namespace la_aciq::cpu {
namespace {

// Below that, handing work to a thread costs more than it saves: with two threads, 64 Ki elements of float32
// take as long as with one or longer, and 128 Ki no longer.
constexpr int64_t kElementsPerTask = 65536;

// body(begin, end) over ranges of rows of `width` elements.
template <class Body>
void for_rows(int64_t rows, int64_t width, const Body& body) {
  const int64_t grain = std::max<int64_t>(kElementsPerTask / std::max<int64_t>(width, 1), 1);
  at::parallel_for(0, rows, grain, body);
}

// A new tensor for the kernels to fill. Large memory comes from the operating system when it is first
// written, zeroed, and by default in pages of 4 KiB; asking for pages of 2 MiB makes that several times
// faster. Pages are asked for only inside the tensor, which needs them all in any case.
inline Tensor new_output(at::IntArrayRef sizes, at::ScalarType dtype) {
  Tensor out = at::empty(sizes, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = 2 << 20, kWorthIt = 2 * kHugePage;
  if (out.nbytes() >= kWorthIt) {
    const auto begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr()), end = begin + out.nbytes();
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage,
                    last = end / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), last - first,
            MADV_HUGEPAGE);  // advice: nothing is lost if it fails
  }
#endif
  return out;
}

// Rotation by blocks; signs hold +-1 / sqrt(block).
struct Rotation {
  Tensor signs;
  int64_t block = 0;

  const float* data() const { return signs.defined() ? signs.const_data_ptr<float>() : nullptr; }
};

inline Rotation checked_rotation(const optional<Tensor>& signs, int64_t block_size, int64_t k) {
  if (!signs) return {};
  const int64_t block = checked_block(*signs, block_size, k);
  // In a loop of its own: two operations of PyTorch take a quarter of a small linear layer's time.
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  const Tensor scaled = at::empty({k}, at::kFloat), given = signs->contiguous();
  float* out = scaled.mutable_data_ptr<float>();
  const auto fill = [&](const auto* sign) {
    for (int64_t i = 0; i < k; i++) out[i] = static_cast<float>(sign[i]) * scale;
  };
  if (given.scalar_type() == at::kChar) {
    fill(given.const_data_ptr<int8_t>());
  } else {
    fill(given.const_data_ptr<float>());
  }
  return {scaled, block};
}

// x [rows, k] rotated into out [rows, k].
inline void rotate_rows(const Tensor& x, const Rotation& rotation, const Tensor& out) {
  const int64_t k = x.size(-1);
  const RotateArgs args{
      x.const_data_ptr(),     dtype_of("x", x.scalar_type()),    k, rotation.data(), rotation.block,
      out.mutable_data_ptr(), dtype_of("out", out.scalar_type())};
  const Kernels& kernels = active_kernels();
  for_rows(x.numel() / k, k, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(k);
    kernels.rotate(args, begin, end, scratch.data());
  });
}

}  // namespace
}  // namespace la_aciq::cpu

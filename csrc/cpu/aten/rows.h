// What the operations on CPU tensors share: handing rows to threads, and the rotation of rows.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "cpu/kernels/kernels.h"

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

// Memory that begins with a cache line, for what an operation needs only while it runs: a tensor for it takes
// several times as long to make, a twentieth of a small call.
inline at::DataPtr new_scratch(int64_t bytes) {
  at::DataPtr memory = at::getCPUAllocator()->allocate(bytes);
  // As in at::empty, so that the tests that fill new tensors with NaN find what is read before it is written.
  const at::Context& context = at::globalContext();
  if (bytes > 0 && context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    std::memset(memory.get(), 0xFF, bytes);
  }
  return memory;
}

// Rotation by blocks, where it has signs: a bit each, as RotationArgs says.
struct Rotation {
  std::vector<uint16_t> signs;
  int64_t block = 0;
  float scale = 1;

  explicit operator bool() const { return !signs.empty(); }
  RotationArgs args() const { return {signs.empty() ? nullptr : signs.data(), block, scale}; }
};

// A bit for each of 16 signs, set where it is -1. all_signs becomes false where one of them is neither 1 nor
// -1.
inline uint16_t pack_16_signs(const int8_t* signs, bool& all_signs) {
#if defined(__SSE2__)
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(signs));
  const __m128i negative = _mm_cmpeq_epi8(values, _mm_set1_epi8(-1));
  const __m128i known = _mm_or_si128(negative, _mm_cmpeq_epi8(values, _mm_set1_epi8(1)));
  all_signs = all_signs && _mm_movemask_epi8(known) == 0xFFFF;
  return static_cast<uint16_t>(_mm_movemask_epi8(negative));
#else
  unsigned bits = 0;
  for (int i = 0; i < 16; i++) {
    all_signs = all_signs && (signs[i] == 1 || signs[i] == -1);
    bits |= static_cast<unsigned>(signs[i] == -1) << i;
  }
  return static_cast<uint16_t>(bits);
#endif
}

inline Rotation checked_rotation(const optional<Tensor>& signs, int64_t block_size, int64_t k) {
  if (!signs) return {};
  const int64_t block = checked_block(*signs, block_size, k);
  const Tensor values = signs->contiguous();
  std::vector<int8_t> converted;  // float32 signs as int8, 0 for what is not a sign
  if (values.scalar_type() == at::kFloat) {
    converted.resize(k);
    const float* sign = values.const_data_ptr<float>();
    int8_t* __restrict byte = converted.data();
    for (int64_t i = 0; i < k; i++) byte[i] = static_cast<int8_t>((sign[i] == 1) - (sign[i] == -1));
  }
  const int8_t* bytes = converted.empty() ? values.const_data_ptr<int8_t>() : converted.data();
  Rotation rotation{std::vector<uint16_t>((k + 15) / 16), block,
                    static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)))};
  bool all_signs = true;
  for (int64_t i = 0; i + 16 <= k; i += 16) rotation.signs[i / 16] = pack_16_signs(bytes + i, all_signs);
  if (k % 16 != 0) {
    int8_t last[16];
    std::fill_n(last, 16, int8_t{1});
    std::copy_n(bytes + k / 16 * 16, k % 16, last);
    rotation.signs.back() = pack_16_signs(last, all_signs);
  }
  if (!all_signs) {
    const Tensor numbers = values.to(at::kDouble);
    const double* number = numbers.const_data_ptr<double>();
    int64_t i = 0;
    while (number[i] == 1 || number[i] == -1) i++;
    TORCH_CHECK_VALUE(false, "signs: expected nothing but 1 and -1, got ", number[i], " at ", i);
  }
  return rotation;
}

// x [rows, k] rotated into out [rows, k].
inline void rotate_rows(const Tensor& x, const Rotation& rotation, const Tensor& out) {
  const int64_t k = x.size(-1);
  const RotateArgs args{x.const_data_ptr(),     dtype_of("x", x.scalar_type()),    k, rotation.args(),
                        out.mutable_data_ptr(), dtype_of("out", out.scalar_type())};
  const Kernels& kernels = active_kernels();
  for_rows(x.numel() / k, k, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(k);
    kernels.rotate(args, begin, end, scratch.data());
  });
}

}  // namespace
}  // namespace la_aciq::cpu

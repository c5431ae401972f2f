// Randomized block Hadamard transform of rows, in a float32 buffer that stays in the cache.
#pragma once

#include "common/hadamard.h"
#include "cpu/kernels/common.h"

namespace la_aciq::cpu {
namespace {

// log2(kRadix) stages, from the distance `half` on, of a block in one pass over it. first(i) gives the vector
// at i.
template <int kRadix, class First>
inline __attribute__((always_inline)) void hadamard_pass(float* x, int64_t block, int64_t half, First first) {
  for (int64_t start = 0; start < block; start += kRadix * half) {
    for (int64_t i = start; i < start + half; i += 16) {
      F32 v[kRadix];
#pragma GCC unroll 16
      for (int j = 0; j < kRadix; j++) v[j] = first(i + j * half);
#pragma GCC unroll 4
      for (int distance = 1; distance < kRadix; distance *= 2) {
#pragma GCC unroll 16
        for (int j = 0; j < kRadix; j++) {
          if (j & distance) continue;
          const F32 even = v[j], odd = v[j + distance];
          v[j] = add(even, odd);
          v[j + distance] = sub(even, odd);
        }
      }
#pragma GCC unroll 16
      for (int j = 0; j < kRadix; j++) store(x + i + j * half, v[j]);
    }
  }
}

// Stages from the distance `half` on, as many per pass as fit in registers, which is what keeps the traffic
// with the cache low.
inline void hadamard_from(float* x, int64_t block, int64_t half) {
  const auto stored = [&](int64_t i) { return load(x + i); };
  for (; kHadamardRadix * half <= block; half *= kHadamardRadix) {
    hadamard_pass<kHadamardRadix>(x, block, half, stored);
  }
  if (8 * half == block) return hadamard_pass<8>(x, block, half, stored);
  if (4 * half == block) return hadamard_pass<4>(x, block, half, stored);
  if (2 * half == block) hadamard_pass<2>(x, block, half, stored);
}

// out [k] = H_b (signs * x) / sqrt(b) in each block of b. Signs are a bit each, because a row, what it
// becomes and as many signs in float32 do not fit the first-level cache together.
template <class T>
inline void rotate_row(const T* x, int64_t k, const RotationArgs& rotation, float* out) {
  const int64_t block = rotation.block;
  const F32 scale = f32(rotation.scale);
  const auto signed_and_scaled = [&](int64_t i, F32 v) {
    return negated(rotation.signs[i / 16], mul(v, scale));
  };
  if (block < 16) {
    for_each_vector(x, k, [&](int64_t i, F32 v, int n) {
      if (n == 16) {
        store(out + i, signed_and_scaled(i, v));
      } else {
        store_partial(out + i, signed_and_scaled(i, v), n);
      }
    });
    for (int64_t start = 0; start < k; start += block) hadamard(out + start, block);
    return;
  }
  for (int64_t start = 0; start < k; start += block) {
    // The stages within a vector, as it is read.
    const auto signed_and_mixed = [&](int64_t i) {
      prefetch(x + start + i);
      const F32 v = signed_and_scaled(start + i, load(x + start + i));
      return butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v))));
    };
    if (kHadamardRadix * 16 <= block) {
      hadamard_pass<kHadamardRadix>(out + start, block, 16, signed_and_mixed);
      hadamard_from(out + start, block, kHadamardRadix * 16);
    } else {
      for (int64_t i = 0; i < block; i += 16) store(out + start + i, signed_and_mixed(i));
      hadamard_from(out + start, block, 16);
    }
  }
}

void rotate(const RotateArgs& args, int64_t begin, int64_t end, float* scratch) {
  with_type(args.dtype, args.x, [&](auto* x) {
    with_type(args.out_dtype, args.out, [&](auto* out) {
      for (int64_t row = begin; row < end; row++) {
        if constexpr (sizeof(*out) == sizeof(float)) {
          rotate_row(x + row * args.k, args.k, args.rotation, out + row * args.k);
          continue;
        }
        rotate_row(x + row * args.k, args.k, args.rotation, scratch);
        for_each_vector(scratch, args.k, [&](int64_t i, F32 v, int n) {
          if (n == 16) {
            store(out + row * args.k + i, v);
          } else {
            store_partial(out + row * args.k + i, v, n);
          }
        });
      }
    });
  });
}

}  // namespace
}  // namespace la_aciq::cpu

// Randomized block Hadamard transform of rows, in a float32 buffer that stays in the cache.
#pragma once

#include "common/hadamard.h"
#include "cpu/common_impl.h"

namespace la_aciq::cpu {
namespace {

// In place, block a power of two and at least 16. Stages go two at a time, which halves the traffic with the
// cache.
inline void hadamard_vectors(float* x, int64_t block) {
  for (int64_t i = 0; i < block; i += 16) {
    store(x + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + i))))));
  }
  int64_t half = 16;
  for (; 4 * half <= block; half *= 4) {
    for (int64_t start = 0; start < block; start += 4 * half) {
      for (int64_t i = start; i < start + half; i += 16) {
        const F32 a = load(x + i), b = load(x + i + half), c = load(x + i + 2 * half),
                  d = load(x + i + 3 * half);
        const F32 sum_ab = add(a, b), difference_ab = sub(a, b), sum_cd = add(c, d),
                  difference_cd = sub(c, d);
        store(x + i, add(sum_ab, sum_cd));
        store(x + i + half, add(difference_ab, difference_cd));
        store(x + i + 2 * half, sub(sum_ab, sum_cd));
        store(x + i + 3 * half, sub(difference_ab, difference_cd));
      }
    }
  }
  if (half < block) {
    for (int64_t i = 0; i < half; i += 16) {
      const F32 a = load(x + i), b = load(x + i + half);
      store(x + i, add(a, b));
      store(x + i + half, sub(a, b));
    }
  }
}

// out [k] = H_b (signs * x) per block, where signs hold +-1 / sqrt(block).
template <class T>
inline void rotate_row(const T* x, int64_t k, const float* signs, int64_t block, float* out) {
  for_each_vector(x, k, [&](int64_t i, F32 v, int n) {
    if (n == 16) {
      store(out + i, mul(v, load(signs + i)));
    } else {
      store_partial(out + i, mul(v, load_partial(signs + i, n)), n);
    }
  });
  for (int64_t start = 0; start < k; start += block) {
    if (block >= 16) {
      hadamard_vectors(out + start, block);
    } else {
      hadamard(out + start, block);
    }
  }
}

void rotate(const RotateArgs& args, int64_t begin, int64_t end, float* scratch) {
  with_type(args.dtype, args.x, [&](auto* x) {
    with_type(args.out_dtype, args.out, [&](auto* out) {
      for (int64_t row = begin; row < end; row++) {
        rotate_row(x + row * args.k, args.k, args.signs, args.block, scratch);
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

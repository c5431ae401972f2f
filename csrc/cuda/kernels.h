// The CUDA kernels as their callers see them: device pointers and a stream, no PyTorch. Every function queues
// its work on the stream, never waits for it, allocates nothing, and returns what the launch returned. No row
// or no element: no launch.
//
// Rows are `stride` elements apart. Vector paths are taken where pointers, strides and group sizes allow
// 16-byte accesses, and elementwise ones elsewhere; the result is the same.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "common/codebook.h"
#include "common/moments.h"
#include "common/types.h"

namespace la_aciq::cuda {

struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t k;
  int64_t stride;
};

// Clips per group of `size` elements along K: an entry of table [num_entries, groups] by language, or table
// [rows, groups].
struct Clips {
  const float* table;
  int64_t groups;
  int64_t size;
  bool per_row;
  LanguageIds language_ids;
};

// Rows sorted by entry: rows [order[i] * span, (order[i] + 1) * span) read entry sorted[i] of the table,
// which never decreases. order and sorted have `count` elements; both are null where every row reads entry 0.
struct SortedRows {
  const int64_t* order;
  const int32_t* sorted;
  int64_t count;
  int64_t span;
  int64_t num_entries;
};

// --- quantize.cu: elementwise, clips given ---

// codes [rows, ceil(k / 2)] of x.
cudaError_t quantize(const Matrix& x, const Clips& clips, Codebook codebook, uint8_t* codes,
                     cudaStream_t stream);

// x rounded to the codebook of 4 or 8 bits, in its dtype, [rows, k].
cudaError_t round_to_codebook(const Matrix& x, const Clips& clips, Codebook codebook, int bits, void* values,
                              cudaStream_t stream);

// codes as above, and tail [num_entries, groups, 4] summed in an order fixed by the shape and the ids.
// partials is scratch of tail_partials_size bytes.
cudaError_t quantize_tails(const Matrix& x, const Clips& clips, const SortedRows& sorted, Codebook codebook,
                           uint8_t* codes, double* tail, void* partials, cudaStream_t stream);
int64_t tail_partials_size(const Matrix& x, const Clips& clips, const SortedRows& sorted);

// --- dequantize.cu ---

// out [rows, k] of dtype from codes [rows, ceil(k / 2)].
cudaError_t dequantize(const uint8_t* codes, int64_t rows, int64_t k, const Clips& clips, Codebook codebook,
                       void* out, DType dtype, cudaStream_t stream);

// --- rows.cu: a row stays on chip; rotation by blocks of `block`, then clips, then codes ---

struct Rotation {
  const void* signs;  // [k], +-1 as float or int8; null: no rotation
  bool int8;
  int64_t block;
};

// Whether quantize_rows takes rows like those of x: a segment has to fit on a multiprocessor of the current
// device.
bool row_fits(const Matrix& x, const Rotation& rotation, const Clips& clips, Clip clip);

// Blocks of a rotation that `rotate` can do.
bool block_fits(int64_t block);

// out [rows, k] of out_dtype.
cudaError_t rotate(const Matrix& x, const Rotation& rotation, void* out, DType out_dtype,
                   cudaStream_t stream);

// codes [rows, ceil(k / 2)]; for Clip::kRms and kAbsmax the table holds factors, and the clips go to
// row_clips [rows, groups].
cudaError_t quantize_rows(const Matrix& x, const Rotation& rotation, const Clips& clips, Clip clip,
                          Codebook codebook, uint8_t* codes, float* row_clips, cudaStream_t stream);

// The clips alone, row_clips [rows, groups], for rows of any length.
cudaError_t measure_clips(const Matrix& x, const Clips& clips, Clip clip, float* row_clips,
                          cudaStream_t stream);

// --- moments.cu ---

// states [num_entries]; histogram int64 [num_entries, 258, 2] or null. partials is scratch for
// moment_partials(x, sorted) states.
cudaError_t moments(const Matrix& x, const SortedRows& sorted, MomentState* states, int64_t* histogram,
                    MomentState* partials, cudaStream_t stream);
int64_t moment_partials(const Matrix& x, const SortedRows& sorted);

// --- linear.cu: up to 16 rows of 16-bit activations times INT4 weights, on tensor cores ---

struct Weights {
  const uint8_t* codes;  // [n, k / 2]
  const float* clips;    // [n, groups]
  int64_t n;
  int64_t groups;
  int64_t group_size;
  Codebook codebook;
};

constexpr int64_t kLinearRows = 16;

// Whether `linear` takes these; 16-byte alignment and groups of whole steps along K.
bool linear_fits(const Matrix& x, const Weights& weights);

// out [rows, n] in the dtype of x; bias [n] in float or null; partials is scratch for linear_partials floats.
cudaError_t linear(const Matrix& x, const Weights& weights, const float* bias, void* out, float* partials,
                   cudaStream_t stream);
int64_t linear_partials(const Matrix& x, const Weights& weights);

}  // namespace la_aciq::cuda

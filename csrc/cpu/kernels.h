// The CPU kernels as their callers see them: raw pointers, no PyTorch, no threads. Each works on a range of
// rows or elements and the caller decides how ranges go to threads. kernels_<isa>.cpp compiles the same
// sources for one instruction set each.
#pragma once

#include <stdint.h>

#include "common/codebook.h"
#include "common/moments.h"
#include "common/types.h"

namespace la_aciq::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// x holds contiguous elements.
struct MomentsArgs {
  const void* x;
  DType dtype;
  Languages languages;
};

// x [rows, k] of dtype -> codes [rows, ceil(k / 2)] or, where values is given, the values of the codes in
// float32 [rows, k].
struct QuantizeArgs {
  const void* x;
  DType dtype;
  int64_t k;
  int64_t group_size;
  int64_t groups;
  const float*
      table;  // [languages, groups]: the clip, or for Clip::kRms and kAbsmax the factor on the statistic
  Languages languages;
  Clip clip;
  Codebook codebook;
  int bits;            // 4, or 8 with values
  const float* signs;  // [k], +-1 / sqrt(block); null: no rotation
  int64_t block;
  uint8_t* codes;
  float* values;
  float* scales;  // [rows, groups] the clips used; may be null
};

struct DequantizeArgs {
  const uint8_t* codes;
  int64_t k;
  int64_t group_size;
  int64_t groups;
  const float* table;  // [languages, groups], or [rows, groups] with per_row
  bool per_row;
  Languages languages;
  Codebook codebook;
  void* out;  // [rows, k]
  DType dtype;
};

struct RotateArgs {
  const void* x;  // [rows, k]
  DType dtype;
  int64_t k;
  const float* signs;  // [k], +-1 / sqrt(block)
  int64_t block;
  void* out;  // [rows, k] of out_dtype
  DType out_dtype;
};

// out [rows, n] = x [rows, k] times the transpose of INT4 weights [n, k], for a few rows.
struct MatvecArgs {
  const float* x;  // as arrange_activations leaves it
  int64_t rows;
  int64_t k;
  int64_t n;
  int64_t group_size;
  int64_t groups;
  const uint8_t* weight;  // [n, ceil(k / 2)]
  const float* clips;     // [n, groups]
  const float* bias;      // [n] or null
  Codebook codebook;
  float* out;
};

// The kernel decodes 32 weights from 16 bytes into those of even and those of odd index; activations are kept
// in that order, each group padded with zeros to a multiple of 32.
constexpr int64_t kMatvecChunk = 32;
inline int64_t arranged_group(int64_t group_size) {
  return (group_size + kMatvecChunk - 1) / kMatvecChunk * kMatvecChunk;
}

struct Kernels {
  const char* isa;
  // Elements [begin, end) merged into states [languages] and counted in histogram [languages, 258, 2] (may be
  // null).
  void (*moments)(const MomentsArgs&, int64_t begin, int64_t end, MomentState* states, int64_t* histogram);
  // Rows [begin, end). scratch: k floats. tail (may be null): [languages, groups, 4], added to.
  void (*quantize)(const QuantizeArgs&, int64_t begin, int64_t end, float* scratch, double* tail);
  void (*dequantize)(const DequantizeArgs&, int64_t begin, int64_t end);
  void (*rotate)(const RotateArgs&, int64_t begin, int64_t end, float* scratch);
  // x [rows, k] -> out [rows, groups * arranged_group(group_size)].
  void (*arrange_activations)(const float* x, int64_t rows, int64_t k, int64_t group_size, int64_t groups,
                              float* out);
  // Outputs [begin, end) of every row.
  void (*matvec)(const MatvecArgs&, int64_t begin, int64_t end);
};

// The best kernels this CPU runs, unless activate_kernels has chosen others (false: this CPU cannot run
// them).
const Kernels& active_kernels();
bool activate_kernels(const char* isa);

struct KernelList {
  const Kernels* const* first;
  const Kernels* const* last;
  const Kernels* const* begin() const { return first; }
  const Kernels* const* end() const { return last; }
};
KernelList available_kernels();

}  // namespace la_aciq::cpu

// The CPU kernels as their callers see them: raw pointers, no PyTorch, no threads. Each works on a range of
// rows or elements and the caller decides how ranges go to threads. isa/<isa>.cpp compiles the same
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
  LanguageIds language_ids;
};

// The randomized Hadamard transform in blocks of k: signs [ceil(k / 16)] has a bit for each member, set where
// its sign is -1 (null: no rotation), scale is 1 / sqrt(block).
struct RotationArgs {
  const uint16_t* signs;
  int64_t block;
  float scale;
};

// x [rows, k] of dtype -> codes [rows, ceil(k / 2)] or, where bytes is given, codes [rows, k] of one byte
// each.
struct QuantizeArgs {
  const void* x;
  DType dtype;
  int64_t k;
  int64_t group_size;
  int64_t groups;
  const float* table;  // [num_entries, groups]: clips, or for Clip::kRms and kAbsmax factors on the statistic
  LanguageIds language_ids;
  Clip clip;
  Codebook codebook;
  int bits;  // 4, or 8 with bytes
  RotationArgs rotation;
  uint8_t* codes;
  uint8_t* bytes;
  float* row_clips;  // [rows, groups] the clips used; may be null
};

struct DequantizeArgs {
  const uint8_t* codes;
  int64_t k;
  int64_t group_size;
  int64_t groups;
  const float* table;  // [num_entries, groups], or [rows, groups] with per_row
  bool per_row;
  LanguageIds language_ids;
  Codebook codebook;
  void* out;  // [rows, k]
  DType dtype;
};

struct RotateArgs {
  const void* x;  // [rows, k]
  DType dtype;
  int64_t k;
  RotationArgs rotation;
  void* out;  // [rows, k] of out_dtype
  DType out_dtype;
};

// Weights [n, k] of dtype -> codes [n, ceil(k / 2)] and clips [n, groups], rounded with error feedback.
constexpr int64_t kRoundBlock =
    128;  // columns whose errors are weighed together when a group's clip is chosen
struct RoundArgs {
  const void* weight;
  DType dtype;
  int64_t k;
  int64_t group_size;
  int64_t groups;
  const float* second_moments;  // [k, k], symmetric
  const float* factor;          // [k, k], upper triangular: its transpose times it inverts second_moments
  // [k, kRoundBlock]: the inverses of the factor's blocks on the diagonal, those of each group from its first
  // column on; row j is that of column j in its block.
  const float* inverses;
  Codebook codebook;
  uint8_t* codes;
  float* clips;
};

// Members [start, start + length) of K, all in one group of the activations and one of the weights. start is
// even. Segments that are decoded together make a tile.
struct Segment {
  int64_t start, length;
  int64_t activation_group, weight_group;
  int64_t offset;  // of the padded lengths of the segments before
  bool last_of_tile;
  bool last_of_group;  // the last in the tile of its group of activations: their clip is applied after it
  int64_t padded() const { return (length + 7) / 8 * 8; }
};

// x [rows, k] -> out: segment by segment [packed_rows, padded length], zeros where there is no member. x
// holds codes, one per byte, or floats; codes have another row, of ones.
struct PackArgs {
  const void* x;
  DType dtype;
  int64_t rows;
  int64_t k;
  const Segment* segments;
  int64_t segment_count;
  int64_t packed_rows;
  void* out;
};

// out [rows, n] = packed rows times the transpose of INT4 weights [n, k].
struct ProductArgs {
  const void* x;
  int64_t rows;
  int64_t k;
  int64_t n;
  const Segment* segments;
  int64_t segment_count;
  int64_t packed_rows;
  int64_t width;           // of all segments, padded
  const float* row_clips;  // [rows, activation_groups]: of integer activations, null for floats
  int64_t activation_groups;
  int zero;               // twice the position of zero among the codes of the activations
  const uint8_t* weight;  // [n, ceil(k / 2)], or lanes [ceil(n / 16), width / 8, 64]
  bool repacked;          // into lanes, where segments begin at multiples of 8
  const float* clips;     // [n, weight_groups]
  int64_t weight_groups;
  int steps;          // of the activations in their clip; 1 for floats
  const float* bias;  // [n] or null
  Codebook codebook;
  void* out;
  DType dtype;
  int64_t row_blocks, block_rows;  // a task is a panel of outputs of a block of rows, blocks taking turns
};

constexpr int64_t kFewPanels = 8;  // whose weights a few rows read side by side

// Of one thread: the lanes of a panel of weights that are not repacked [panel / 16, width / 8, 64], a tile of
// weights [tile_members, panel], what the sums of its segments start with, and of a panel the clips
// [weight_groups, panel] and the totals [block_rows, panel].
struct ProductScratch {
  uint8_t* lanes;
  void* tile;
  int32_t* starts;  // [tile_members / 8, panel]; of integers alone
  float* clips;
  float* totals;
};

struct Product {
  // Rows [begin, end) of x.
  void (*pack)(const PackArgs&, int64_t begin, int64_t end);
  // A few rows: panels [begin, end) of 16 outputs, of every row. lanes, for weights that are not repacked:
  // [kFewPanels, width / 8, 64].
  void (*multiply_few)(const ProductArgs&, int64_t begin, int64_t end, uint8_t* lanes);
  // Many rows: tasks [begin, end).
  void (*multiply)(const ProductArgs&, int64_t begin, int64_t end, const ProductScratch& scratch);
  int64_t element_size;  // of packed activations and of a tile
  int64_t tile_members;  // of K, no segment is longer
  int64_t panel;         // outputs of a task
};

// An entry's counts on their way into its histogram. Elements side by side take turns with eight tables, so
// that none waits for the one before it where both are in the same bin, and one addition counts an element
// (from bit 44 on) and adds up what bin_and_place gives, for which there is room until kMaxCounted elements
// are counted.
constexpr int kHistogramLanes = 8;
constexpr int kCountShift = 44;
constexpr int64_t kMaxCounted = kHistogramLanes << 15;
struct HistogramLanes {
  int64_t counted = 0;
  uint64_t entries[kHistogramLanes][kHistogramBins] = {};
};

struct Kernels {
  const char* isa;
  // Elements [begin, end) merged into states [num_entries] and counted in histograms [num_entries, 258, 2]
  // (may be null), through lanes [num_entries] where they are given.
  void (*moments)(const MomentsArgs&, int64_t begin, int64_t end, MomentState* states, HistogramLanes* lanes,
                  int64_t* histograms);
  // Adds what an entry's lanes still hold to its histogram [258, 2].
  void (*unpack_histogram)(HistogramLanes& lanes, int64_t* histogram);
  // Rows [begin, end). scratch: k floats. tail (may be null): [num_entries, groups, 4], added to.
  void (*quantize)(const QuantizeArgs&, int64_t begin, int64_t end, float* scratch, double* tail);
  void (*dequantize)(const DequantizeArgs&, int64_t begin, int64_t end);
  void (*rotate)(const RotateArgs&, int64_t begin, int64_t end, float* scratch);
  // Rows [begin, end); scratch: as many floats as round_scratch says for so many rows.
  int64_t (*round_scratch)(const RoundArgs&, int64_t rows);
  void (*round_weights)(const RoundArgs&, int64_t begin, int64_t end, float* scratch);
  Product float_product;     // of float32, bfloat16 or float16
  Product bfloat16_product;  // of bfloat16: the one above, or one that multiplies without widening
  Product integer_product;   // of codes
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

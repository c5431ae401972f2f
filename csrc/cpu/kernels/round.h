// INT4 weights rounded with error feedback. python/la_aciq/nn/weights.py says what is computed,
// python/la_aciq/ops/rounding.py column by column; this is the same with every sum taken when its result is
// needed ("left-looking"), so that a column is read and written once for all the columns before it.
//
// Rows of the weight are lanes: a strip is 16 rows, [k, 16]. What is summed over columns is summed for
// kRoundColumns of them at once, in registers, and in the order of the members: a row's result depends on
// nothing but the row.
#pragma once

#include "cpu/kernels/common.h"

namespace la_aciq::cpu {
namespace {

constexpr int64_t kMembersAtOnce = 256;  // of a sum: a strip's share of them stays in the first-level cache
constexpr int64_t kPackedColumns = (kRoundBlock + kRoundColumns - 1) / kRoundColumns * kRoundColumns;

// Clips tried for a group, as shares of its largest magnitude, and then around the best.
constexpr int kShares = 15;
inline float share_of(int i) { return static_cast<float>(0.44 + 0.04 * i); }
constexpr float kAround = 0.02f;
// A clip's least squares are a refinement: one far from the clip searched for comes of rounding errors.
constexpr float kLeastRatio = 0.7f, kLargestRatio = 1.4f;
constexpr float kSmallestStep = 1.17549435e-38f;

struct Span {
  int64_t first, last;
  int64_t size() const { return last - first; }
};

// Of `strips` strips. Columns of a panel have room after them, since they are worked on kRoundColumns at a
// time.
struct RoundBuffers {
  int64_t strips, panel, panel_stride;  // of elements, as every stride here
  float* x;                             // [strips, k, 16]: what is multiplied with the factor or the moments
  float* sums;                          // [strips, panel, 16]: the columns' sums
  float* changes;                       // [strips, panel, 16]: levels, and then what codes changed
  float* products;                      // [strips, panel, 16]: second moments times levels
  float* steps;                         // [strips, groups, 16]
  float* shares;   // [strips, 2 + kShares, 16]: best share, its error, errors of all shares
  float* errors;   // [kRoundBlock, 16]
  float* packed;   // [kPackedColumns / kRoundColumns, kMembersAtOnce, kRoundColumns]
  uint8_t* codes;  // [strips, k, 16]
};

// The columns that are brought up to date together: whole groups, about as many as a block has.
inline int64_t panel_of(const RoundArgs& args) {
  return args.group_size >= kRoundBlock ? args.group_size : kRoundBlock / args.group_size * args.group_size;
}

constexpr int kShareRows = 2 + kShares;

int64_t round_scratch(const RoundArgs& args, int64_t rows) {
  const int64_t strips = (rows + 15) / 16, panel = panel_of(args) + kRoundColumns;
  const int64_t strip = 16 * (args.k + 3 * panel + args.groups + kShareRows) + 4 * args.k;
  return strips * strip + 16 * kRoundBlock + kPackedColumns * kMembersAtOnce;
}

inline RoundBuffers buffers_of(const RoundArgs& args, int64_t rows, float* scratch) {
  RoundBuffers buffers{};
  const int64_t strips = (rows + 15) / 16, panel = panel_of(args), stride = 16 * (panel + kRoundColumns);
  buffers.strips = strips;
  buffers.panel = panel;
  buffers.panel_stride = stride;
  int64_t taken = 0;
  const auto take = [&](int64_t count) {
    taken += count;
    return scratch + taken - count;
  };
  buffers.packed = take(kPackedColumns * kMembersAtOnce);
  buffers.errors = take(16 * kRoundBlock);
  buffers.x = take(strips * args.k * 16);
  buffers.sums = take(strips * stride);
  buffers.changes = take(strips * stride);
  buffers.products = take(strips * stride);
  buffers.steps = take(strips * args.groups * 16);
  buffers.shares = take(strips * kShareRows * 16);
  buffers.codes = reinterpret_cast<uint8_t*>(take(strips * args.k * 4));
  return buffers;
}

// --- Sums of products ---

// Rows `members` and columns `columns`, at most kRoundBlock, of a matrix of `width` columns: packed [columns
// / kRoundColumns, members, kRoundColumns], with zeros for columns that do not exist.
inline void pack_block(const float* matrix, int64_t width, Span members, Span columns, float* packed) {
  const int64_t depth = members.size();
  for (int64_t j = 0; j < depth; j++) {
    const float* row = matrix + (members.first + j) * width + columns.first;
    float* out = packed + j * kRoundColumns;
    int64_t c = 0;
    for (; c + kRoundColumns <= columns.size(); c += kRoundColumns, out += depth * kRoundColumns) {
      __builtin_memcpy(out, row + c, sizeof(float) * kRoundColumns);
    }
    if (c == columns.size()) continue;
    __builtin_memset(out, 0, sizeof(float) * kRoundColumns);
    __builtin_memcpy(out, row + c, sizeof(float) * static_cast<size_t>(columns.size() - c));
  }
}

// sums [kRoundColumns] += packed [depth, kRoundColumns] transposed times x [depth, 16].
inline __attribute__((always_inline)) void add_products(const float* packed, const float* x, int64_t depth,
                                                        F32 (&sums)[kRoundColumns]) {
  for (int64_t j = 0; j < depth; j++) {
    const F32 v = load(x + 16 * j);
#pragma GCC unroll 16
    for (int t = 0; t < kRoundColumns; t++) {
      sums[t] = muladd(f32(packed[j * kRoundColumns + t]), v, sums[t]);
    }
  }
}

inline __attribute__((always_inline)) void load_columns_at(const float* p, F32 (&sums)[kRoundColumns]) {
#pragma GCC unroll 16
  for (int t = 0; t < kRoundColumns; t++) sums[t] = load(p + 16 * t);
}

// out [columns, 16] += matrix [members, columns] transposed times x [members, 16], in every strip. x and out
// begin with the first member and column.
inline void add_matrix(const RoundBuffers& buffers, const float* matrix, int64_t width, Span members,
                       Span columns, const float* x, int64_t x_stride, float* out) {
  for (int64_t a = columns.first; a < columns.last; a += kRoundBlock) {
    const Span block{a, smaller(a + kRoundBlock, columns.last)};
    for (int64_t j = members.first; j < members.last; j += kMembersAtOnce) {
      const Span some{j, smaller(j + kMembersAtOnce, members.last)};
      pack_block(matrix, width, some, block, buffers.packed);
      for (int64_t strip = 0; strip < buffers.strips; strip++) {
        const float* strip_x = x + strip * x_stride + 16 * (j - members.first);
        float* strip_out = out + strip * buffers.panel_stride + 16 * (a - columns.first);
        const float* packed = buffers.packed;
        for (int64_t c = 0; c < block.size(); c += kRoundColumns, packed += some.size() * kRoundColumns) {
          F32 sums[kRoundColumns];
          load_columns_at(strip_out + 16 * c, sums);
          add_products(packed, strip_x, some.size(), sums);
#pragma GCC unroll 16
          for (int t = 0; t < kRoundColumns; t++) store(strip_out + 16 * (c + t), sums[t]);
        }
      }
    }
  }
}

// --- The codebook ---

// The codebook's values are (code - zero) times the step; `bias` takes a value in steps to the code whose
// nearest integer it has.
struct Rounding {
  F32 zero, bias;

  explicit Rounding(Codebook codebook)
      : zero(f32(codebook == Codebook::kMidrise ? 7.5f : 8.0f)),
        bias(f32(codebook == Codebook::kMidrise ? 0.5f : 0.0f)) {}

  // The code of the value nearest x, where `inverse` is one over the step; 8 for NaN.
  I32 nearest(F32 x, F32 inverse) const {
    return add(bounded_nearest(sub(mul(x, inverse), bias), f32(-8.0f), f32(7.0f)), 8);
  }
  F32 level(I32 code) const { return sub(to_float(code), zero); }
};

inline I32 load_codes(const uint8_t* p) {
  I32 codes, unused;
  load_nibble_planes(p, codes, unused);
  return codes;
}

// One over steps: of a step of 0, which has the value 0 alone, a number that does not matter.
inline F32 inverse_steps(F32 steps) {
  float lane[16];
  store(lane, max(steps, f32(kSmallestStep)));
  for (float& step : lane) step = 1.0f / step;
  return load(lane);
}

// --- Weights ---

// Columns [columns] of rows of the weight: out [strips, columns, 16], rows that do not exist being zeros.
template <class T>
inline void load_weights(const T* weight, int64_t k, int64_t begin, int64_t end, Span columns, float* out,
                         int64_t stride) {
  for (int64_t row = begin; row < end; row += 16, out += stride) {
    for (int64_t c = columns.first; c < columns.last; c += 16) {
      const int64_t width = smaller(columns.last - c, 16);
      float block[16][16];
      for (int64_t r = 0; r < 16; r++) {
        if (row + r >= end) {
          store(block[r], f32(0));
        } else {
          const T* p = weight + (row + r) * k + c;
          store(block[r], width == 16 ? load(p) : load_partial(p, width));
        }
      }
      float* at = out + 16 * (c - columns.first);
      for (int64_t i = 0; i < width; i++) {
        for (int64_t r = 0; r < 16; r++) at[16 * i + r] = block[r][i];
      }
    }
  }
}

inline void load_weights(const RoundArgs& args, int64_t begin, int64_t end, Span columns, float* out,
                         int64_t stride) {
  with_type(args.dtype, args.weight,
            [&](auto* weight) { load_weights(weight, args.k, begin, end, columns, out, stride); });
}

// --- The clip of a group ---

// The squared error [16] of columns [size, 16] rounded to nearest with the given steps, weighed by `packed`,
// upper triangular.
inline F32 weighed_error(const float* columns, int64_t size, const float* packed, F32 steps,
                         const Rounding& rounding, float* errors) {
  const F32 inverse = inverse_steps(steps);
  for (int64_t j = 0; j < size; j++) {
    const F32 x = load(columns + 16 * j);
    store(errors + 16 * j, sub(x, mul(rounding.level(rounding.nearest(x, inverse)), steps)));
  }
  F32 total = f32(0);
  for (int64_t c = 0; c < size; c += kRoundColumns, packed += size * kRoundColumns) {
    F32 sums[kRoundColumns];
#pragma GCC unroll 16
    for (int t = 0; t < kRoundColumns; t++) sums[t] = f32(0);
    add_products(packed, errors, smaller(c + kRoundColumns, size), sums);
#pragma GCC unroll 16
    for (int t = 0; t < kRoundColumns; t++) total = muladd(sums[t], sums[t], total);
  }
  return total;
}

// The steps of a group whose columns `sums` are up to date.
inline void choose_steps(const RoundArgs& args, const RoundBuffers& buffers, Span group, const float* sums,
                         float* steps) {
  const Rounding rounding(args.codebook);
  const auto pack = [&](Span block) {
    pack_block(args.inverses, kRoundBlock, block, {0, block.size()}, buffers.packed);
  };
  for (int64_t strip = 0; strip < buffers.strips; strip++) {
    const float* columns = sums + strip * buffers.panel_stride;
    F32 magnitude = f32(0);
    for (int64_t j = 0; j < group.size(); j++) magnitude = max(magnitude, abs(load(columns + 16 * j)));
    store(steps + strip * args.groups * 16, mul(magnitude, f32(1.0f / 7.5f)));
  }
  // First every share of the list, then those on both sides of the best of them.
  for (int round = 0; round < 2; round++) {
    const int count = round == 0 ? kShares : 2;
    const auto tried = [&](int i, F32 best) {
      return round == 0 ? f32(share_of(i)) : add(best, f32(i == 0 ? -kAround : kAround));
    };
    for (int64_t a = group.first; a < group.last; a += kRoundBlock) {
      const Span block{a, smaller(a + kRoundBlock, group.last)};
      if (round == 0 || group.size() > kRoundBlock) pack(block);
      for (int64_t strip = 0; strip < buffers.strips; strip++) {
        const float* columns = sums + strip * buffers.panel_stride + 16 * (a - group.first);
        float* shares = buffers.shares + strip * kShareRows * 16;
        const F32 largest = load(steps + strip * args.groups * 16);
        for (int i = 0; i < count; i++) {
          const F32 error = weighed_error(columns, block.size(), buffers.packed,
                                          mul(tried(i, load(shares)), largest), rounding, buffers.errors);
          float* total = shares + 16 * (2 + i);
          store(total, a == group.first ? error : add(load(total), error));
        }
      }
    }
    for (int64_t strip = 0; strip < buffers.strips; strip++) {
      float* shares = buffers.shares + strip * kShareRows * 16;
      const F32 before = load(shares);  // of no meaning in the first round
      F32 best = round == 0 ? f32(1) : before, least = round == 0 ? f32(3.402823466e+38f) : load(shares + 16);
      for (int i = 0; i < count; i++) {
        const F32 error = load(shares + 16 * (2 + i));
        const Mask better = greater(least, error);
        best = where(better, tried(i, before), best);
        least = where(better, error, least);
      }
      store(shares, best);
      store(shares + 16, least);
    }
  }
  for (int64_t strip = 0; strip < buffers.strips; strip++) {
    float* step = steps + strip * args.groups * 16;
    store(step, mul(load(buffers.shares + strip * kShareRows * 16), load(step)));
  }
}

// --- Columns in turn ---

// The columns of a block in turn: column(j, sum) gives what column j adds to the sums of those after it,
// [16], to be multiplied with the matrix and kept in x [k, 16]. sums: [columns, 16] of one strip.
template <class Column>
inline void in_turn(const float* packed, Span block, const float* sums, float* x, Column column) {
  const int64_t size = block.size();
  for (int64_t c = 0; c < size; c += kRoundColumns, packed += size * kRoundColumns) {
    F32 columns[kRoundColumns];
    load_columns_at(sums + 16 * c, columns);
    add_products(packed, x, c, columns);
    const int64_t count = smaller(size - c, kRoundColumns);
#pragma GCC unroll 16
    for (int t = 0; t < kRoundColumns; t++) {
      if (t >= count) break;
      const F32 change = column(block.first + c + t, columns[t]);
      store(x + 16 * (c + t), change);
      const float* row = packed + (c + t) * kRoundColumns;
#pragma GCC unroll 16
      for (int later = t + 1; later < kRoundColumns; later++) {
        columns[later] = muladd(f32(row[later]), change, columns[later]);
      }
    }
  }
}

// Codes, steps and, in x, minus the errors of columns over the factor's diagonal.
inline void round_columns(const RoundArgs& args, const RoundBuffers& buffers, int64_t begin, int64_t end) {
  const Rounding rounding(args.codebook);
  const int64_t k = args.k, x_stride = 16 * k;
  for (int64_t first = 0; first < k; first += buffers.panel) {
    const Span panel{first, smaller(first + buffers.panel, k)};
    load_weights(args, begin, end, panel, buffers.sums, buffers.panel_stride);
    add_matrix(buffers, args.factor, k, {0, first}, panel, buffers.x, x_stride, buffers.sums);
    for (int64_t g = first / args.group_size; g * args.group_size < panel.last; g++) {
      const Span group{g * args.group_size, smaller((g + 1) * args.group_size, panel.last)};
      float* sums = buffers.sums + 16 * (group.first - first);
      add_matrix(buffers, args.factor, k, {first, group.first}, group, buffers.x + 16 * first, x_stride,
                 sums);
      choose_steps(args, buffers, group, sums, buffers.steps + 16 * g);
      for (int64_t a = group.first; a < group.last; a += kRoundBlock) {
        const Span block{a, smaller(a + kRoundBlock, group.last)};
        sums = buffers.sums + 16 * (a - first);
        add_matrix(buffers, args.factor, k, {group.first, a}, block, buffers.x + 16 * group.first, x_stride,
                   sums);
        pack_block(args.factor, k, block, block, buffers.packed);
        for (int64_t strip = 0; strip < buffers.strips; strip++) {
          const F32 step = load(buffers.steps + (strip * args.groups + g) * 16),
                    inverse = inverse_steps(step);
          uint8_t* codes = buffers.codes + strip * 16 * k;
          in_turn(buffers.packed, block, sums + strip * buffers.panel_stride,
                  buffers.x + strip * x_stride + 16 * a, [&](int64_t j, F32 w) {
                    const I32 code = rounding.nearest(w, inverse);
                    store_bytes(codes + 16 * j, code);
                    return mul(sub(mul(rounding.level(code), step), w), f32(1.0f / args.factor[j * k + j]));
                  });
        }
      }
    }
  }
}

// Steps [16] refined by the least squares of a group: `pull` [size, 16] is minus half the gradient of the
// error, `levels` [size, 16] are those of the codes, `products` [size, 16] the second moments times them.
inline F32 refined(F32 step, const float* pull, const float* levels, const float* products, int64_t size) {
  F32 along = f32(0), curvature = f32(0);
  for (int64_t j = 0; j < size; j++) {
    const F32 level = load(levels + 16 * j);
    along = muladd(level, load(pull + 16 * j), along);
    curvature = muladd(level, load(products + 16 * j), curvature);
  }
  float steps[16], numerators[16], denominators[16];
  store(steps, step);
  store(numerators, along);
  store(denominators, max(mul(curvature, step), f32(kSmallestStep)));
  for (int lane = 0; lane < 16; lane++) {
    const float ratio = 1.0f + numerators[lane] / denominators[lane];
    if (ratio > kLeastRatio && ratio < kLargestRatio) steps[lane] *= ratio;
  }
  return load(steps);
}

// A sweep of coordinate descent over codes and steps. x becomes the errors of the weights.
inline void descend(const RoundArgs& args, const RoundBuffers& buffers, int64_t begin, int64_t end) {
  const Rounding rounding(args.codebook);
  const int64_t k = args.k, x_stride = 16 * k, stride = buffers.panel_stride;
  load_weights(args, begin, end, {0, k}, buffers.x, x_stride);
  for (int64_t strip = 0; strip < buffers.strips; strip++) {
    for (int64_t j = 0; j < k; j++) {
      const F32 step = load(buffers.steps + (strip * args.groups + j / args.group_size) * 16);
      const F32 level = rounding.level(load_codes(buffers.codes + (strip * k + j) * 16));
      float* x = buffers.x + (strip * k + j) * 16;
      store(x, sub(load(x), mul(level, step)));
    }
  }
  for (int64_t first = 0; first < k; first += buffers.panel) {
    const Span panel{first, smaller(first + buffers.panel, k)};
    __builtin_memset(buffers.sums, 0, sizeof(float) * static_cast<size_t>(buffers.strips * stride));
    // What is outside of the panel does not change while its groups do.
    add_matrix(buffers, args.second_moments, k, {0, first}, panel, buffers.x, x_stride, buffers.sums);
    add_matrix(buffers, args.second_moments, k, {panel.last, k}, panel, buffers.x + 16 * panel.last, x_stride,
               buffers.sums);
    for (int64_t g = first / args.group_size; g * args.group_size < panel.last; g++) {
      const Span group{g * args.group_size, smaller((g + 1) * args.group_size, panel.last)};
      const int64_t offset = 16 * (group.first - first), size = group.size();
      add_matrix(buffers, args.second_moments, k, panel, group, buffers.x + 16 * first, x_stride,
                 buffers.sums + offset);
      for (int64_t strip = 0; strip < buffers.strips; strip++) {
        const uint8_t* codes = buffers.codes + (strip * k + group.first) * 16;
        float* levels = buffers.changes + strip * stride + offset;
        for (int64_t j = 0; j < size; j++) {
          store(levels + 16 * j, rounding.level(load_codes(codes + 16 * j)));
        }
        __builtin_memset(buffers.products + strip * stride + offset, 0,
                         sizeof(float) * static_cast<size_t>(16 * size));
      }
      add_matrix(buffers, args.second_moments, k, group, group, buffers.changes + offset, stride,
                 buffers.products + offset);
      for (int64_t strip = 0; strip < buffers.strips; strip++) {
        float* sums = buffers.sums + strip * stride + offset;
        float* x = buffers.x + (strip * k + group.first) * 16;
        const float *levels = buffers.changes + strip * stride + offset,
                    *products = buffers.products + strip * stride + offset;
        float* at = buffers.steps + (strip * args.groups + g) * 16;
        const F32 before = load(at), step = refined(before, sums, levels, products, size);
        const F32 change = sub(before, step);
        store(at, step);
        for (int64_t j = 0; j < size; j++) {
          store(sums + 16 * j, muladd(change, load(products + 16 * j), load(sums + 16 * j)));
          store(x + 16 * j, muladd(change, load(levels + 16 * j), load(x + 16 * j)));
        }
      }
      for (int64_t a = group.first; a < group.last; a += kRoundBlock) {
        const Span block{a, smaller(a + kRoundBlock, group.last)};
        float *sums = buffers.sums + 16 * (a - first), *changes = buffers.changes + 16 * (a - first);
        add_matrix(buffers, args.second_moments, k, {group.first, a}, block, buffers.changes + offset, stride,
                   sums);
        pack_block(args.second_moments, k, block, block, buffers.packed);
        for (int64_t strip = 0; strip < buffers.strips; strip++) {
          const F32 step = load(buffers.steps + (strip * args.groups + g) * 16),
                    inverse = inverse_steps(step);
          uint8_t* codes = buffers.codes + strip * 16 * k;
          float* x = buffers.x + strip * x_stride;
          in_turn(buffers.packed, block, sums + strip * stride, changes + strip * stride,
                  [&](int64_t j, F32 pull) {
                    const F32 before = mul(rounding.level(load_codes(codes + 16 * j)), step);
                    const float curvature = args.second_moments[j * k + j];
                    const I32 code = rounding.nearest(muladd(pull, f32(1.0f / curvature), before), inverse);
                    store_bytes(codes + 16 * j, code);
                    const F32 change = sub(before, mul(rounding.level(code), step));
                    store(x + 16 * j, add(load(x + 16 * j), change));
                    return change;
                  });
        }
      }
    }
  }
}

inline void store_rounded(const RoundArgs& args, const RoundBuffers& buffers, int64_t begin, int64_t end) {
  const int64_t k = args.k, bytes = (k + 1) / 2;
  for (int64_t row = begin; row < end; row++) {
    const int64_t strip = (row - begin) / 16, lane = (row - begin) % 16;
    const uint8_t* codes = buffers.codes + strip * 16 * k + lane;
    const float* steps = buffers.steps + strip * 16 * args.groups + lane;
    const auto code_of = [&](int64_t j) {
      // A group whose clip is 0 has the value 0, whatever its codes: that nearest zero.
      return j >= k ? 0 : steps[16 * (j / args.group_size)] > 0 ? codes[16 * j] : 8;
    };
    for (int64_t i = 0; i < bytes; i++) {
      args.codes[row * bytes + i] = static_cast<uint8_t>(code_of(2 * i) | code_of(2 * i + 1) << 4);
    }
    for (int64_t g = 0; g < args.groups; g++) args.clips[row * args.groups + g] = 7.5f * steps[16 * g];
  }
}

void round_weights(const RoundArgs& args, int64_t begin, int64_t end, float* scratch) {
  const RoundBuffers buffers = buffers_of(args, end - begin, scratch);
  // The room after the columns of a panel is added to, and not read.
  __builtin_memset(buffers.sums, 0,
                   sizeof(float) * static_cast<size_t>(3 * buffers.strips * buffers.panel_stride));
  round_columns(args, buffers, begin, end);
  descend(args, buffers, begin, end);
  store_rounded(args, buffers, begin, end);
}

}  // namespace
}  // namespace la_aciq::cpu

// Random calls of the kernels in csrc/cpu/kernels.h: every instruction set of this CPU against plain float64
// arithmetic, and against each other bit by bit where they promise the same. ../test_fuzz.py builds this with
// AddressSanitizer and UndefinedBehaviorSanitizer; buffers are exactly as large as the interface says and
// start at any element, so an access beside one is found.
//
//   fuzz_kernels SEED CASES     case i draws from SEED + i alone: `fuzz_kernels SEED+i 1` repeats it
//   fuzz_kernels fault KIND     makes a mistake that has to be found: short, undefined or wrong
#include <float.h>
#include <math.h>
#include <sanitizer/common_interface_defs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/segments.h"

using namespace la_aciq;
using namespace la_aciq::cpu;

namespace {

// --- Memory and values ---

struct Random {
  std::mt19937_64 engine;

  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine() % static_cast<uint64_t>(high - low + 1));
  }
  bool once_in(int64_t n) { return between(1, n) == 1; }
  // Mostly small numbers, now and then a large one.
  int64_t size(int64_t small, int64_t large) { return between(1, once_in(8) ? large : small); }
  double uniform() { return static_cast<double>(engine() >> 11) * 0x1p-53; }
  double normal() { return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()); }
};

constexpr uint8_t kUnwritten = 0xA5;

// n elements with nothing after them, at any multiple of their size; the bytes are kUnwritten at first.
class Memory {
 public:
  Memory(Random& random, int64_t n, int64_t width)
      : bytes_(n * width), offset_(random.once_in(2) ? 0 : width * random.between(1, 64 / width)) {
    storage_.reset(new uint8_t[static_cast<size_t>(offset_ + bytes_)]);
    memset(storage_.get(), kUnwritten, static_cast<size_t>(offset_ + bytes_));
  }
  uint8_t* data() { return storage_.get() + offset_; }
  int64_t bytes() const { return bytes_; }
  bool operator==(Memory& other) {
    return bytes_ == other.bytes_ && memcmp(data(), other.data(), static_cast<size_t>(bytes_)) == 0;
  }
  bool unwritten(int64_t begin, int64_t end) {
    return std::all_of(data() + begin, data() + end, [](uint8_t byte) { return byte == kUnwritten; });
  }

 private:
  int64_t bytes_, offset_;
  std::unique_ptr<uint8_t[]> storage_;
};

template <class T>
struct Array : Memory {
  Array(Random& random, int64_t n) : Memory(random, n, sizeof(T)) {}
  T* data() { return reinterpret_cast<T*>(Memory::data()); }
  T& operator[](int64_t i) { return data()[i]; }
};

int64_t width_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Elements of a type known at run time, read and written as float64.
struct Elements : Memory {
  DType dtype;

  Elements(Random& random, DType type, int64_t n) : Memory(random, n, width_of(type)), dtype(type) {}

  template <class T>
  T& as(int64_t i) {
    return reinterpret_cast<T*>(data())[i];
  }
  double get(int64_t i) {
    const uint32_t high = dtype == DType::kBFloat16 ? static_cast<uint32_t>(as<uint16_t>(i)) << 16 : 0;
    float single;
    memcpy(&single, &high, sizeof(single));
    return dtype == DType::kFloat64   ? as<double>(i)
           : dtype == DType::kFloat32 ? as<float>(i)
           : dtype == DType::kFloat16 ? static_cast<double>(as<_Float16>(i))
                                      : static_cast<double>(single);
  }
  // Beyond the range of the type: an infinity. bfloat16 is cut off, not rounded.
  void set(int64_t i, double x) {
    const float single =
        fabs(x) > FLT_MAX ? copysignf(INFINITY, static_cast<float>(copysign(1, x))) : static_cast<float>(x);
    const float number = x == x ? single : NAN;
    uint32_t bits;
    memcpy(&bits, &number, sizeof(bits));
    if (dtype == DType::kFloat64) as<double>(i) = x;
    if (dtype == DType::kFloat32) as<float>(i) = number;
    if (dtype == DType::kFloat16) as<_Float16>(i) = static_cast<_Float16>(number);
    if (dtype == DType::kBFloat16) as<uint16_t>(i) = static_cast<uint16_t>(bits >> 16);
  }
  // Half a unit in the last place of a value, relative; and the smallest step.
  double epsilon() const {
    return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  }
  double smallest() const { return dtype == DType::kFloat16 ? 0x1p-24 : 0x1p-126; }
  double largest() const { return dtype == DType::kFloat16 ? 65504 : FLT_MAX; }

  void fill(Random& random) {
    const int64_t kind = random.between(0, 9), n = bytes() / width_of(dtype);
    const double scale = exp2(static_cast<double>(random.between(-12, 12)));
    const double shift = random.once_in(3) ? 100 * scale * random.normal() : 0;
    for (int64_t i = 0; i < n; i++) {
      double x = shift + scale * random.normal();
      if (kind == 0) x = 0;
      if (kind == 1) x = shift;                                                        // all the same
      if (kind == 2) x = static_cast<double>(random.between(-40, 40)) / 4;             // decision boundaries
      if (kind == 3) x = random.normal() * (dtype == DType::kFloat16 ? 2e-6 : 2e-39);  // denormals
      if (kind == 4) x = random.normal() * largest() / 3;
      if (kind == 5) x = exp2(200 * random.uniform() - 100) * (random.once_in(2) ? 1 : -1);
      if (kind >= 6 && kind <= 7 && random.once_in(kind == 6 ? 4 : 50)) {
        const double special[] = {NAN, INFINITY, -INFINITY, -0.0, FLT_MAX, -FLT_MAX};
        x = special[random.between(0, 5)];
      }
      set(i, x);
    }
  }
};

DType any_dtype(Random& random) {
  const DType types[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  return types[random.between(0, 2)];
}

Codebook any_codebook(Random& random) {
  return random.once_in(2) ? Codebook::kMidrise : Codebook::kMidtread;
}

// Clips: mostly positive, some of no use.
void fill_clips(Random& random, Array<float>& clips) {
  const bool strange = random.once_in(3);
  const double scale = random.once_in(3) ? 1 : exp2(static_cast<double>(random.between(-12, 12)));
  const float special[] = {0, -1, NAN, INFINITY, FLT_MAX, FLT_MIN, 1e-44f, 7.5f};
  for (int64_t i = 0; i < clips.bytes() / 4; i++) {
    clips[i] = static_cast<float>(scale * (0.5 + 3 * random.uniform()));
    if (strange && random.once_in(4)) clips[i] = special[random.between(0, 7)];
  }
}

// Ids of rows, or none; some are out of range.
struct RandomIds {
  int32_t count;
  int64_t span;
  std::unique_ptr<Array<int32_t>> ids;

  RandomIds(Random& random, int64_t rows)
      : count(static_cast<int32_t>(random.size(4, 40))), span(random.once_in(2) ? 1 : random.size(3, 3000)) {
    if (random.once_in(4)) return;
    ids = std::make_unique<Array<int32_t>>(random, (rows + span - 1) / span);
    for (int64_t i = 0; i < ids->bytes() / 4; i++) {
      const int32_t outside[] = {-1, count, INT32_MIN, INT32_MAX};
      (*ids)[i] = random.once_in(6) ? outside[random.between(0, 3)]
                                    : static_cast<int32_t>(random.between(0, count - 1));
    }
  }
  LanguageIds get() { return {ids ? ids->data() : nullptr, span, count}; }
  int64_t of(int64_t row) {
    const int32_t id = ids ? (*ids)[row / span] : 0;
    return id < 0 || id >= count ? 0 : id;
  }
};

struct Shape {
  int64_t rows, k, group_size, groups, begin, end;

  explicit Shape(Random& random) : rows(random.size(4, 40)), k(random.size(200, 2500)) {
    if (random.once_in(2)) k = (k + 15) / 16 * 16;
    const int64_t sizes[] = {k, 2 * random.between(1, 40), 32, 64, 128};
    const int64_t wanted = sizes[random.between(0, 4)];
    group_size = wanted == k ? k : std::min(wanted, k + k % 2);
    groups = (k + group_size - 1) / group_size;
    begin = random.once_in(2) ? 0 : random.between(0, rows);
    end = random.once_in(2) ? rows : random.between(begin, rows);
  }
  int64_t row_bytes() const { return (k + 1) / 2; }
};

struct {
  const char* name = "";
  uint64_t seed = 0;
} current;

[[noreturn]] void fail(const char* isa, const std::string& what) {
  printf("case %llu, %s: %s\n", static_cast<unsigned long long>(current.seed), isa, what.c_str());
  exit(1);
}

std::string at(int64_t row, int64_t i, double got, double expected) {
  char text[200];
  snprintf(text, sizeof(text), "row %lld, element %lld: got %.9g, expected %.9g", static_cast<long long>(row),
           static_cast<long long>(i), got, expected);
  return text;
}

// --- The definitions, in float64 ---

bool same(double a, double b) {
  return a == b || (a != a && b != b);
}

bool usable(double clip) {
  return clip > 0 && clip <= FLT_MAX;
}

double exact_level(int code, int bits, Codebook codebook) {
  const int levels = 1 << bits;
  return (2.0 * code - (codebook == Codebook::kMidrise ? levels - 1 : levels)) / (levels - 1);
}

// Whether `code` is that of a value within `slack` of x, which is itself known to `error`.
bool right_code(int code, double x, double error, double clip, int bits, Codebook codebook) {
  const int half = 1 << (bits - 1);
  if (!usable(clip) || x != x) return code == half;
  if (fabs(x) > DBL_MAX) return code == (x > 0 ? 2 * half - 1 : 0);
  const double scaled = x / (2 * clip / ((1 << bits) - 1));
  const double slack = 0x1p-21 * std::max(1.0, fabs(scaled)) + error / (2 * clip / ((1 << bits) - 1));
  const auto code_of = [&](double t) {
    const double rounded = codebook == Codebook::kMidrise ? floor(t) : nearbyint(t);
    return static_cast<int>(std::clamp(rounded, -static_cast<double>(half), half - 1.0)) + half;
  };
  // Below 2^-124 the float32 reciprocal of a step overflows: every code but the middle one is that of an end.
  if (clip < 0x1p-120 && (code == 0 || code == 2 * half - 1 || code == half)) return true;
  return code >= code_of(scaled - slack) && code <= code_of(scaled + slack);
}

struct Rotated {
  std::vector<double> values, errors;  // an error that is not finite: nothing is known of the element
};

// A sign per member, and what it is multiplied with in all.
struct Rotation {
  int64_t block;
  float scale;
  Array<uint16_t> signs;
  Array<float> factors;

  Rotation(Random& random, int64_t k, int64_t block_size)
      : block(block_size),
        scale(static_cast<float>(1 / sqrt(static_cast<double>(block)))),
        signs(random, (k + 15) / 16),
        factors(random, k) {
    for (int64_t i = 0; i < k; i++) {
      const bool negative = signs[i / 16] >> i % 16 & 1;
      factors[i] = negative ? -scale : scale;
    }
  }
  RotationArgs args() { return {signs.bytes() ? signs.data() : nullptr, block, scale}; }
};

// The row with signs applied and each block transformed, by the definition: entry (i, j) is (-1)^popcount(i &
// j).
Rotated rotate_row(Elements& x, int64_t row, int64_t k, Rotation* rotation) {
  Rotated out{std::vector<double>(static_cast<size_t>(k)), std::vector<double>(static_cast<size_t>(k), 0.0)};
  for (int64_t i = 0; i < k; i++) {
    if (rotation == nullptr) {
      out.values[i] = x.get(row * k + i);
      continue;
    }
    const int64_t block = rotation->block, start = i / block * block;
    double sum = 0, magnitude = 0;
    for (int64_t j = 0; j < block; j++) {
      const double term = x.get(row * k + start + j) * rotation->factors[start + j];
      sum += __builtin_popcountll(static_cast<uint64_t>((i - start) & j)) % 2 ? -term : term;
      magnitude += fabs(term);
    }
    out.values[i] = sum;
    out.errors[i] =
        magnitude < 1e37 ? 0x1p-23 * (2 + log2(static_cast<double>(block))) * magnitude + 1e-37 : NAN;
  }
  return out;
}

int64_t any_block(Random& random, int64_t k) {
  int64_t block = k & -k;
  while (block > 1 && (block > 512 || random.once_in(3))) block /= 2;
  return block;
}

// --- One function per kernel: draws a case, runs every instruction set, compares ---

void check_quantize(Random& random) {
  const Shape shape(random);
  Elements x(random, any_dtype(random), shape.rows * shape.k);
  x.fill(random);
  RandomIds ids(random, shape.rows);
  Array<float> table(random, ids.count * shape.groups);
  fill_clips(random, table);
  const Codebook codebook = any_codebook(random);
  const Clip clips[] = {Clip::kStatic, Clip::kRms, Clip::kAbsmax};
  const Clip clip = clips[random.between(0, 2)];
  const bool bytes = random.once_in(3), tail_sums = !bytes && clip == Clip::kStatic && random.once_in(2);
  const bool row_clips = clip != Clip::kStatic || random.once_in(2);
  const int bits = bytes && random.once_in(2) ? 8 : 4;
  const bool rotated = random.once_in(3);
  Rotation rotation(random, rotated ? shape.k : 0, rotated ? any_block(random, shape.k) : 0);

  struct Output {
    Array<uint8_t> codes;
    Array<float> row_clips;
    Array<double> tail;
  };
  const int64_t row_bytes = bytes ? shape.k : shape.row_bytes();
  std::vector<std::unique_ptr<Output>> outputs;
  for (const Kernels* kernels : available_kernels()) {
    outputs.push_back(
        std::make_unique<Output>(Output{{random, shape.rows * row_bytes},
                                        {random, row_clips ? shape.rows * shape.groups : 0},
                                        {random, tail_sums ? ids.count * shape.groups * 4 : 0}}));
    Output& out = *outputs.back();
    std::fill_n(out.tail.data(), out.tail.bytes() / 8, 1.0);  // sums are added to what is there
    const QuantizeArgs args{
        .x = x.data(),
        .dtype = x.dtype,
        .k = shape.k,
        .group_size = shape.group_size,
        .groups = shape.groups,
        .table = table.data(),
        .language_ids = ids.get(),
        .clip = clip,
        .codebook = codebook,
        .bits = bits,
        .rotation = rotation.args(),
        .codes = bytes ? nullptr : out.codes.data(),
        .bytes = bytes ? out.codes.data() : nullptr,
        .row_clips = row_clips ? out.row_clips.data() : nullptr,
    };
    Array<float> scratch(random, rotated ? shape.k : 0);
    kernels->quantize(args, shape.begin, shape.end, scratch.data(), tail_sums ? out.tail.data() : nullptr);

    std::vector<double> tail(static_cast<size_t>(out.tail.bytes() / 8), 1.0);
    bool tail_is_known = true;
    for (int64_t row = shape.begin; row < shape.end; row++) {
      const int64_t entry = ids.of(row);
      const Rotated exact = rotate_row(x, row, shape.k, rotated ? &rotation : nullptr);
      for (int64_t group = 0; group < shape.groups; group++) {
        const int64_t start = group * shape.group_size, end = std::min(start + shape.group_size, shape.k);
        double used = table[entry * shape.groups + group], count = 0, squares = 0, largest = 0, error = 0;
        double* sums = tail_sums ? &tail[4 * (entry * shape.groups + group)] : nullptr;
        for (int64_t i = start; i < end; i++) {
          const double v = exact.values[i], magnitude = fabs(v);
          if (!(exact.errors[i] < INFINITY)) error = NAN;
          error = std::max(error, exact.errors[i]) + (error != error ? NAN : 0);
          const bool finite = magnitude <= FLT_MAX;
          if (finite) {
            count++;
            squares += v * v;
            largest = std::max(largest, magnitude);
          }
          if (sums) {
            sums[finite ? 0 : 3]++;
            if (finite && magnitude > used) {
              sums[1]++;
              sums[2] += magnitude;
            }
            tail_is_known &= exact.errors[i] == 0;
          }
        }
        if (error != error) continue;
        if (clip == Clip::kStatic && row_clips && !same(out.row_clips[row * shape.groups + group], used)) {
          fail(kernels->isa,
               "quantize, clip of " + at(row, group, out.row_clips[row * shape.groups + group], used));
        }
        if (clip != Clip::kStatic) {
          const double statistic = clip == Clip::kAbsmax ? largest : count > 0 ? sqrt(squares / count) : 0;
          const double expected = used * statistic, got = out.row_clips[row * shape.groups + group];
          const double slack = 0x1p-21 * fabs(expected) + fabs(used) * error + 0x1p-140;
          if (fabs(expected) < 0.9999 * FLT_MAX && fabs(used) <= FLT_MAX &&
              !(fabs(got - expected) <= slack)) {
            fail(kernels->isa, "quantize, clip of " + at(row, group, got, expected));
          }
          used = got;
        }
        for (int64_t i = start; i < end; i++) {
          const double v = exact.values[i];
          const int byte = out.codes[row * row_bytes + (bytes ? i : i / 2)];
          const int code = bytes ? byte : i % 2 ? byte >> 4 : byte & 15;
          if (!right_code(code, v, exact.errors[i], used, bits, codebook)) {
            fail(kernels->isa, "quantize, code of " + at(row, i, code, v));
          }
        }
      }
      if (!bytes && shape.k % 2 && out.codes[(row + 1) * shape.row_bytes() - 1] > 15) {
        fail(kernels->isa, "quantize: the unused half of the last byte of a row is not zero");
      }
    }
    for (size_t i = 0; tail_is_known && i < tail.size(); i++) {
      const double got = out.tail[static_cast<int64_t>(i)];
      const bool known =
          i % 4 != 2 ? got == tail[i] : fabs(got - tail[i]) <= 1e-6 * tail[i] || tail[i] > FLT_MAX;
      if (!known) fail(kernels->isa, "quantize, tail sums: " + at(0, static_cast<int64_t>(i), got, tail[i]));
    }
    const auto untouched = [&](Memory& memory) {
      const int64_t row = memory.bytes() / shape.rows;
      return memory.unwritten(0, shape.begin * row) && memory.unwritten(shape.end * row, memory.bytes());
    };
    if (!untouched(out.codes) || !untouched(out.row_clips)) {
      fail(kernels->isa, "quantize wrote rows it was not asked for");
    }
    Output& first = *outputs.front();
    if (!(out.codes == first.codes) || !(out.row_clips == first.row_clips)) {
      fail(kernels->isa, "quantize differs from baseline");
    }
  }
}

void check_dequantize(Random& random) {
  const Shape shape(random);
  const bool per_row = random.once_in(2);
  RandomIds ids(random, shape.rows);
  Array<uint8_t> codes(random, shape.rows * shape.row_bytes());
  for (int64_t i = 0; i < codes.bytes(); i++) codes[i] = static_cast<uint8_t>(random.between(0, 255));
  Array<float> table(random, (per_row ? shape.rows : ids.count) * shape.groups);
  fill_clips(random, table);
  const Codebook codebook = any_codebook(random);
  const DType dtype = any_dtype(random);
  std::unique_ptr<Elements> first;
  for (const Kernels* kernels : available_kernels()) {
    auto out = std::make_unique<Elements>(random, dtype, shape.rows * shape.k);
    const DequantizeArgs args{
        .codes = codes.data(),
        .k = shape.k,
        .group_size = shape.group_size,
        .groups = shape.groups,
        .table = table.data(),
        .per_row = per_row,
        .language_ids = ids.get(),
        .codebook = codebook,
        .out = out->data(),
        .dtype = dtype,
    };
    kernels->dequantize(args, shape.begin, shape.end);
    for (int64_t row = shape.begin; row < shape.end; row++) {
      for (int64_t i = 0; i < shape.k; i++) {
        const double clip = table[(per_row ? row : ids.of(row)) * shape.groups + i / shape.group_size];
        const int byte = codes[row * shape.row_bytes() + i / 2], code = i % 2 ? byte >> 4 : byte & 15;
        const double expected = usable(clip) ? exact_level(code, 4, codebook) * clip : 0;
        const double got = out->get(row * shape.k + i);
        const double slack = (out->epsilon() + 0x1p-22) * fabs(expected) + out->smallest();
        const bool overflow = fabs(expected) > out->largest() * 0.999 && fabs(got) >= out->largest() * 0.99;
        if (!(fabs(got - expected) <= slack || overflow)) {
          fail(kernels->isa, "dequantize, " + at(row, i, got, expected));
        }
      }
    }
    const int64_t row = shape.k * width_of(dtype);
    if (!out->unwritten(0, shape.begin * row) || !out->unwritten(shape.end * row, out->bytes())) {
      fail(kernels->isa, "dequantize wrote rows it was not asked for");
    }
    if (!first)
      first = std::move(out);
    else if (!(*out == *first))
      fail(kernels->isa, "dequantize differs from baseline");
  }
}

void check_rotate(Random& random) {
  const Shape shape(random);
  Elements x(random, any_dtype(random), shape.rows * shape.k);
  x.fill(random);
  Rotation rotation(random, shape.k, any_block(random, shape.k));
  const DType dtype = random.once_in(2) ? x.dtype : DType::kFloat32;
  for (const Kernels* kernels : available_kernels()) {
    Elements out(random, dtype, shape.rows * shape.k);
    Array<float> scratch(random, shape.k);
    const RotateArgs args{
        .x = x.data(),
        .dtype = x.dtype,
        .k = shape.k,
        .rotation = rotation.args(),
        .out = out.data(),
        .out_dtype = dtype,
    };
    kernels->rotate(args, shape.begin, shape.end, scratch.data());
    for (int64_t row = shape.begin; row < shape.end; row++) {
      const Rotated exact = rotate_row(x, row, shape.k, &rotation);
      for (int64_t i = 0; i < shape.k; i++) {
        const double expected = exact.values[i], got = out.get(row * shape.k + i);
        const double slack = exact.errors[i] + out.epsilon() * fabs(expected) + out.smallest();
        if (slack == slack && fabs(expected) < 0.99 * out.largest() && !(fabs(got - expected) <= slack)) {
          fail(kernels->isa, "rotate, " + at(row, i, got, expected));
        }
      }
    }
    const int64_t row = shape.k * width_of(dtype);
    if (!out.unwritten(0, shape.begin * row) || !out.unwritten(shape.end * row, out.bytes())) {
      fail(kernels->isa, "rotate wrote rows it was not asked for");
    }
  }
}

void check_moments(Random& random) {
  const int64_t n = random.size(3000, 40000);
  Elements x(random, random.once_in(4) ? DType::kFloat64 : any_dtype(random), n);
  x.fill(random);
  RandomIds ids(random, n);
  const bool histogram = random.once_in(2), in_lanes = histogram && random.once_in(2);
  const int64_t begin = random.once_in(2) ? 0 : random.between(0, n);
  const int64_t end = random.once_in(2) ? n : random.between(begin, n);

  struct Exact {
    std::vector<double> values;
    double nonfinite = 0;
    std::vector<int64_t> bins = std::vector<int64_t>(2 * kHistogramBins, 0);
  };
  std::vector<Exact> exact(static_cast<size_t>(ids.count));
  for (int64_t i = begin; i < end; i++) {
    Exact& own = exact[ids.of(i)];
    const double v = x.get(i);
    if (!(fabs(v) <= DBL_MAX)) {
      own.nonfinite++;
      continue;
    }
    own.values.push_back(v);
    const float magnitude = static_cast<float>(std::min(fabs(v), static_cast<double>(FLT_MAX)));
    uint32_t bits;
    memcpy(&bits, &magnitude, sizeof(bits));
    const double octaves = magnitude > 0 ? floor(log2(static_cast<double>(magnitude))) : -1000;
    const double part = magnitude > 0 ? floor((magnitude / exp2(octaves) - 1) * 8) : 0;
    const int64_t bin = octaves < -16   ? 0
                        : octaves >= 16 ? 257
                                        : static_cast<int64_t>((octaves + 16) * 8 + part) + 1;
    own.bins[2 * bin]++;
    if (bin > 0 && bin < 257) own.bins[2 * bin + 1] += bits & 0xFFFFF;
  }

  for (const Kernels* kernels : available_kernels()) {
    Array<MomentState> states(random, ids.count);
    std::fill_n(states.data(), ids.count, empty_moments());
    Array<int64_t> bins(random, histogram ? ids.count * kHistogramBins * 2 : 0);
    memset(bins.data(), 0, static_cast<size_t>(bins.bytes()));
    const MomentsArgs args{.x = x.data(), .dtype = x.dtype, .language_ids = ids.get()};
    std::vector<HistogramLanes> lanes(in_lanes ? static_cast<size_t>(ids.count) : 0);
    kernels->moments(args, begin, end, states.data(), in_lanes ? lanes.data() : nullptr,
                     histogram ? bins.data() : nullptr);
    for (int64_t entry = 0; in_lanes && entry < ids.count; entry++) {
      kernels->unpack_histogram(lanes[entry], bins.data() + entry * 2 * kHistogramBins);
    }
    for (int64_t entry = 0; entry < ids.count; entry++) {
      const Exact& own = exact[entry];
      const MomentState& got = states[entry];
      const double count = static_cast<double>(own.values.size());
      if (got.count != count || got.nonfinite != own.nonfinite) {
        fail(kernels->isa, "moments, count of " + at(entry, 0, got.count, count));
      }
      for (int64_t i = 0; histogram && i < 2 * kHistogramBins; i++) {
        if (bins[entry * 2 * kHistogramBins + i] != own.bins[i]) {
          fail(kernels->isa, "moments, histogram of " +
                                 at(entry, i, static_cast<double>(bins[entry * 2 * kHistogramBins + i]),
                                    static_cast<double>(own.bins[i])));
        }
      }
      if (count == 0) continue;
      long double sum = 0;
      for (double v : own.values) sum += v;
      const long double mean = sum / count;
      long double power[5] = {}, magnitude[5] = {};
      for (double v : own.values) {
        const long double d = v - mean;
        for (int p = 2; p <= 4; p++) {
          power[p] += powl(d, p);
          magnitude[p] += powl(fabsl(d), p);
        }
      }
      const double low = *std::min_element(own.values.begin(), own.values.end());
      const double high = *std::max_element(own.values.begin(), own.values.end());
      const double largest = std::max(fabs(low), fabs(high));
      if (got.min != low || got.max != high)
        fail(kernels->isa, "moments, range of " + at(entry, 0, got.min, low));
      if (largest > 1e70) continue;  // the fourth power overflows
      if (!(fabsl(got.mean - mean) <= 1e-12 * largest)) {
        fail(kernels->isa, "moments, mean of " + at(entry, 0, got.mean, static_cast<double>(mean)));
      }
      const double sums[] = {got.m2, got.m3, got.m4};
      for (int p = 2; p <= 4; p++) {
        const long double slack = 1e-6L * magnitude[p] + count * powl(1e-11L * largest, p) + 1e-300L;
        if (!(fabsl(sums[p - 2] - power[p]) <= slack)) {
          fail(kernels->isa,
               "moments, power sum of " + at(entry, p, sums[p - 2], static_cast<double>(power[p])));
        }
      }
    }
  }
}

void check_product(Random& random) {
  const Shape shape(random), activation(random);
  const int64_t k = shape.k, rows = random.size(12, 70), n = random.size(20, 150);
  const bool codes = random.once_in(2);
  const int bits = random.once_in(2) ? 4 : 8;
  const int64_t size = codes ? std::min(activation.group_size + activation.group_size % 2, k + k % 2) : k;
  const int64_t groups = (k + size - 1) / size;
  const Codebook codebook = any_codebook(random), activation_codebook = any_codebook(random);
  Elements x(random, any_dtype(random), codes ? 0 : rows * k);
  for (int64_t i = 0; !codes && i < rows * k; i++) x.set(i, random.normal());
  Array<uint8_t> bytes(random, codes ? rows * k : 0), weight(random, n * shape.row_bytes());
  const bool extreme = random.once_in(4);  // the largest sums
  const int64_t most = (1 << bits) - 1;
  for (int64_t i = 0; i < bytes.bytes(); i++)
    bytes[i] = static_cast<uint8_t>(random.between(extreme ? most : 0, most));
  for (int64_t i = 0; i < weight.bytes(); i++) {
    weight[i] = static_cast<uint8_t>(extreme ? (random.once_in(9) ? 0xFF : 0) : random.between(0, 255));
  }
  Array<float> clips(random, n * shape.groups), bias(random, n), row_clips(random, codes ? rows * groups : 0);
  for (int64_t i = 0; i < n * shape.groups; i++) {
    clips[i] = random.once_in(20) ? -1 : static_cast<float>(random.uniform());
  }
  for (int64_t i = 0; i < row_clips.bytes() / 4; i++) row_clips[i] = static_cast<float>(random.uniform());
  for (int64_t i = 0; i < n; i++) bias[i] = static_cast<float>(random.normal());
  const bool with_bias = random.once_in(2);
  const DType dtype = any_dtype(random);
  std::vector<double> weights(static_cast<size_t>(n * k)), activations(static_cast<size_t>(rows * k));
  for (int64_t i = 0; i < n * k; i++) {
    const int64_t output = i / k, member = i % k;
    const int byte = weight[output * shape.row_bytes() + member / 2];
    const double clip = clips[output * shape.groups + member / shape.group_size];
    weights[i] = usable(clip) ? exact_level(member % 2 ? byte >> 4 : byte & 15, 4, codebook) * clip : 0;
  }
  for (int64_t i = 0; i < rows * k; i++) {
    activations[i] = codes ? exact_level(bytes[i], bits, activation_codebook) *
                                 static_cast<double>(row_clips[i / k * groups + i % k / size])
                           : x.get(i);
  }

  // Weights are repacked only where every 8 members from a multiple of 8 on are in one group.
  const bool repacked =
      (groups == 1 || size % 8 == 0) && (shape.groups == 1 || shape.group_size % 8 == 0) && random.once_in(2);
  const bool few = rows <= 20 && random.once_in(2);
  const int64_t panels = (n + 15) / 16, eights = (k + 7) / 8;
  Array<uint8_t> lanes(random, repacked ? panels * eights * 64 : 0);
  for (int64_t i = 0; i < lanes.bytes(); i++) {
    const int64_t output = i / (eights * 64) * 16 + i % 64 / 4, byte = i / 64 % eights * 4 + i % 4;
    lanes[i] = output < n && byte < shape.row_bytes() ? weight[output * shape.row_bytes() + byte] : 0;
  }
  const int levels = 1 << bits, zero = activation_codebook == Codebook::kMidrise ? levels - 1 : levels;
  const void* input = codes ? static_cast<void*>(bytes.data()) : x.data();
  const DType input_dtype = codes ? DType::kFloat32 : x.dtype;

  for (const Kernels* kernels : available_kernels()) {
    const Product& product = codes                         ? kernels->integer_product
                             : x.dtype == DType::kBFloat16 ? kernels->bfloat16_product
                                                           : kernels->float_product;
    Elements out(random, dtype, rows * n);
    const std::vector<Segment> segments = segments_of(k, size, shape.group_size, product.tile_members);
    const int64_t width = segments.back().offset + segments.back().padded(), packed_rows = rows + codes;
    Memory packed(random, packed_rows * width, product.element_size);
    const PackArgs pack{
        .x = input,
        .dtype = input_dtype,
        .rows = rows,
        .k = k,
        .segments = segments.data(),
        .segment_count = static_cast<int64_t>(segments.size()),
        .packed_rows = packed_rows,
        .out = packed.data(),
    };
    product.pack(pack, 0, packed_rows);
    const int64_t blocks = random.between(1, 3), block_rows = (rows + blocks - 1) / blocks;
    ProductArgs args{
        .x = packed.data(),
        .rows = rows,
        .k = k,
        .n = n,
        .segments = segments.data(),
        .segment_count = static_cast<int64_t>(segments.size()),
        .packed_rows = packed_rows,
        .width = width,
        .row_clips = codes ? row_clips.data() : nullptr,
        .activation_groups = groups,
        .zero = zero,
        .weight = repacked ? lanes.data() : weight.data(),
        .repacked = repacked,
        .clips = clips.data(),
        .weight_groups = shape.groups,
        .steps = codes ? levels - 1 : 1,
        .bias = with_bias ? bias.data() : nullptr,
        .codebook = codebook,
        .out = out.data(),
        .dtype = dtype,
        .row_blocks = (rows + block_rows - 1) / block_rows,
        .block_rows = block_rows,
    };
    const int64_t tasks = (n + product.panel - 1) / product.panel * args.row_blocks;
    for (int64_t task = 0; task < tasks; task++) {
      Array<uint8_t> scratch(random, repacked ? 0 : product.panel / 16 * width * 8);
      Memory tile(random, product.tile_members * product.panel, product.element_size);
      Array<int32_t> starts(random, product.tile_members / 8 * product.panel);
      Array<float> factors(random, shape.groups * product.panel), totals(random, block_rows * product.panel);
      product.multiply(args, task, task + 1,
                       {scratch.data(), tile.data(), starts.data(), factors.data(), totals.data()});
    }
    if (few) {  // the same to the last bit
      Elements out_of_few(random, dtype, rows * n);
      args.out = out_of_few.data();
      const int64_t middle = random.between(0, panels);
      for (const auto& [begin, end] : {std::pair{int64_t{0}, middle}, std::pair{middle, panels}}) {
        Array<uint8_t> scratch(random, repacked ? 0 : std::min(end - begin, kFewPanels) * width * 8);
        product.multiply_few(args, begin, end, scratch.data());
      }
      if (!(out_of_few == out)) fail(kernels->isa, "product, a few rows: other bits than many");
    }
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t output = 0; output < n; output++) {
        double expected = with_bias ? bias[output] : 0, magnitude = fabs(expected);
        for (int64_t i = 0; i < k; i++) {
          const double term = weights[output * k + i] * activations[row * k + i];
          expected += term;
          magnitude += fabs(term);
        }
        const double got = out.get(row * n + output);
        if (!(fabs(got - expected) <= 1e-6 * magnitude + out.epsilon() * fabs(expected) + out.smallest())) {
          fail(kernels->isa,
               std::string(codes ? "integer" : "float") + " product, " + at(row, output, got, expected));
        }
      }
    }
  }
}

// Weights rounded under second moments that are made from their factor: U is drawn, H is U^-1 U^-T.
void check_round_weights(Random& random) {
  Shape shape(random);
  shape.k = random.size(60, 330);
  shape.group_size = random.once_in(4) ? shape.k : std::min(2 * random.between(1, 90), shape.k + shape.k % 2);
  shape.groups = (shape.k + shape.group_size - 1) / shape.group_size;
  const int64_t k = shape.k, middle = random.between(shape.begin, shape.end);
  Elements weight(random, any_dtype(random), shape.rows * k);
  weight.fill(random);
  Array<float> factor(random, k * k), second_moments(random, k * k), inverses(random, k * kRoundBlock);
  std::vector<double> inverse(static_cast<size_t>(k * k), 0.0);
  for (int64_t i = k - 1; i >= 0; i--) {
    for (int64_t j = 0; j < k; j++) {
      const double drawn = j == i ? 0.5 + random.uniform() : random.normal() / static_cast<double>(k);
      factor[i * k + j] = j < i ? NAN : static_cast<float>(drawn);  // what is below the diagonal is not read
    }
    inverse[i * k + i] = 1;
    for (int64_t m = i + 1; m < k; m++) {
      for (int64_t j = m; j < k; j++) inverse[i * k + j] -= factor[i * k + m] * inverse[m * k + j];
    }
    for (int64_t j = i; j < k; j++) inverse[i * k + j] /= factor[i * k + i];
  }
  for (int64_t i = 0; i < k; i++) {
    for (int64_t j = 0; j < k; j++) {
      double sum = 0;
      for (int64_t m = std::max(i, j); m < k; m++) sum += inverse[i * k + m] * inverse[j * k + m];
      second_moments[i * k + j] = static_cast<float>(sum);
    }
    const int64_t group = i / shape.group_size * shape.group_size,
                  first = group + (i - group) / kRoundBlock * kRoundBlock,
                  last = std::min({first + kRoundBlock, group + shape.group_size, k});
    std::fill_n(inverses.data() + i * kRoundBlock, kRoundBlock, NAN);
    for (int64_t j = first; j < last; j++) {
      inverses[i * kRoundBlock + j - first] = static_cast<float>(inverse[i * k + j]);
    }
  }
  const Codebook codebook = any_codebook(random);
  const auto ordinary = [&](int64_t row) {
    double largest = 0;
    for (int64_t i = 0; i < k; i++) {
      const double v = weight.get(row * k + i);
      if (!(fabs(v) < 1e12) || (v != 0 && fabs(v) < 1e-12)) return false;
      largest = std::max(largest, fabs(v));
    }
    return largest > 0;
  };

  struct Output {
    Array<uint8_t> codes;
    Array<float> clips;
  };
  std::unique_ptr<Output> fused;  // of the first instruction set that fuses multiply-adds
  for (const Kernels* kernels : available_kernels()) {
    auto output = std::make_unique<Output>(
        Output{{random, shape.rows * shape.row_bytes()}, {random, shape.rows * shape.groups}});
    Output& out = *output;
    RoundArgs args{
        .weight = weight.data(),
        .dtype = weight.dtype,
        .k = k,
        .group_size = shape.group_size,
        .groups = shape.groups,
        .second_moments = second_moments.data(),
        .factor = factor.data(),
        .inverses = inverses.data(),
        .codebook = codebook,
        .codes = out.codes.data(),
        .clips = out.clips.data(),
    };
    const auto run = [&](int64_t begin, int64_t end) {
      if (begin == end) return;
      Array<float> scratch(random, kernels->round_scratch(args, end - begin));
      kernels->round_weights(args, begin, end, scratch.data());
    };
    run(shape.begin, shape.end);
    const auto untouched = [&](Memory& memory) {
      const int64_t row = memory.bytes() / shape.rows;
      return memory.unwritten(0, shape.begin * row) && memory.unwritten(shape.end * row, memory.bytes());
    };
    if (!untouched(out.codes) || !untouched(out.clips)) {
      fail(kernels->isa, "round_weights wrote rows it was not asked for");
    }
    Output parts{{random, out.codes.bytes()}, {random, shape.rows * shape.groups}};
    args.codes = parts.codes.data();
    args.clips = parts.clips.data();
    run(shape.begin, middle);
    run(middle, shape.end);
    for (int64_t row = shape.begin; row < shape.end; row++) {
      const int64_t row_bytes = shape.row_bytes();
      if (memcmp(parts.codes.data() + row * row_bytes, out.codes.data() + row * row_bytes,
                 static_cast<size_t>(row_bytes)) != 0) {
        fail(kernels->isa, "round_weights: codes depend on the rows beside them");
      }
      if (k % 2 && out.codes[(row + 1) * row_bytes - 1] > 15) {
        fail(kernels->isa, "round_weights: the unused half of the last byte of a row is not zero");
      }
      if (!ordinary(row)) continue;
      std::vector<double> left(static_cast<size_t>(k)), plain(static_cast<size_t>(k));
      for (int64_t i = 0; i < k; i++) {
        const double w = weight.get(row * k + i), clip = out.clips[row * shape.groups + i / shape.group_size];
        const int code = out.codes[row * row_bytes + i / 2] >> i % 2 * 4 & 15;
        if (!(clip >= 0 && clip <= FLT_MAX))
          fail(kernels->isa, "round_weights, clip of " + at(row, i, clip, 1));
        left[i] = w - exact_level(code, 4, codebook) * clip;
        double nearest = fabs(w);
        for (int other = 0; other < 16; other++) {
          const double value = exact_level(other, 4, codebook) * clip;
          if (other == 0 || fabs(w - value) < fabs(nearest)) nearest = w - value;
        }
        plain[i] = nearest;
      }
      double error = 0, plain_error = 0, last_gradient = 0, magnitude = 0;
      for (int64_t i = 0; i < k; i++) {
        for (int64_t j = 0; j < k; j++) {
          const double h = second_moments[i * k + j];
          error += left[i] * h * left[j];
          plain_error += plain[i] * h * plain[j];
          magnitude += fabs(weight.get(row * k + i) * h * weight.get(row * k + j));
        }
        last_gradient += second_moments[(k - 1) * k + i] * left[i];
      }
      if (!(error <= 1.5 * plain_error + 1e-9 * magnitude)) {
        fail(kernels->isa, "round_weights, error of the output: " + at(row, 0, error, plain_error));
      }
      // The last column's code is the best, given all others.
      const double clip = out.clips[(row + 1) * shape.groups - 1], step = clip * 2 / 15,
                   curvature = second_moments[k * k - 1];
      const double best = weight.get((row + 1) * k - 1) - left[k - 1] + last_gradient / curvature;
      const int code = out.codes[(row + 1) * row_bytes - 1] >> (k - 1) % 2 * 4 & 15;
      const double slack = 1e-3 * step + 1e-5 * sqrt(magnitude / curvature);
      if (!right_code(code, best, slack, clip, 4, codebook)) {
        fail(kernels->isa, "round_weights, code of " + at(row, k - 1, code, best / step));
      }
      if (fused && memcmp(fused->codes.data() + row * row_bytes, out.codes.data() + row * row_bytes,
                          static_cast<size_t>(row_bytes)) != 0) {
        fail(kernels->isa, "round_weights: codes differ between instruction sets with fused multiply-adds");
      }
    }
    if (kernels != *available_kernels().begin() && !fused) fused = std::move(output);
  }
}

using Check = void (*)(Random&);
constexpr struct {
  const char* name;
  Check check;
} kChecks[] = {{"quantize", check_quantize}, {"dequantize", check_dequantize},
               {"rotate", check_rotate},     {"moments", check_moments},
               {"product", check_product},   {"round_weights", check_round_weights}};

// Mistakes that the sanitizers and the comparisons have to find.
int make_fault(const std::string& kind) {
  Random random{std::mt19937_64(1)};
  const int64_t k = kind == "short" ? 63 : 64;
  Array<float> x(random, k), table(random, 1);
  std::fill_n(x.data(), k, 1.0f);
  table[0] = 1;
  if (kind == "undefined") {
    volatile int largest = INT32_MAX;
    printf("%d\n", largest + static_cast<int>(x[0]));
  }
  for (const Kernels* kernels : available_kernels()) {
    Array<uint8_t> codes(random, 32);
    const QuantizeArgs args{.x = x.data(),
                            .dtype = DType::kFloat32,
                            .k = 64,
                            .group_size = 64,
                            .groups = 1,
                            .table = table.data(),
                            .language_ids = {nullptr, 1, 1},
                            .clip = Clip::kStatic,
                            .codebook = Codebook::kMidrise,
                            .bits = 4,
                            .rotation = {nullptr, 0, 1},
                            .codes = codes.data(),
                            .bytes = nullptr,
                            .row_clips = nullptr};
    kernels->quantize(args, 0, 1, nullptr, nullptr);
    const int code = codes[0] & 15;
    if (kind == "wrong" && !right_code(code, 0.5, 0, 1, 4, Codebook::kMidrise)) {
      fail(kernels->isa, "quantize, code of " + at(0, 0, code, 0.5));
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: fuzz_kernels SEED CASES | fuzz_kernels fault KIND\n");
    return 2;
  }
  // A sanitizer ends the process: say which case it was.
  __sanitizer_set_death_callback([] {
    fprintf(stderr, "case %llu, %s\n", static_cast<unsigned long long>(current.seed), current.name);
  });
  if (std::string(argv[1]) == "fault") return make_fault(argv[2]);
  const uint64_t seed = strtoull(argv[1], nullptr, 10), cases = strtoull(argv[2], nullptr, 10);
  for (uint64_t i = 0; i < cases; i++) {
    Random random{std::mt19937_64(seed + i)};
    const auto& [name, check] = kChecks[random.between(0, std::size(kChecks) - 1)];
    current = {name, seed + i};
    check(random);
  }
  printf("%llu cases on", static_cast<unsigned long long>(cases));
  for (const Kernels* kernels : available_kernels()) printf(" %s", kernels->isa);
  printf("\n");
  return 0;
}

// What this machine can do at most, as loops with nothing else in them: reading, writing and copying memory
// in use, and multiplying in registers. Compiled for this CPU by roofline.py.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <omp.h>

namespace {

typedef int64_t Line __attribute__((vector_size(64), aligned(1), may_alias));

constexpr size_t kStreams = 4;  // per thread, which keeps more of the hardware's prefetchers busy than one
constexpr size_t kStep = 256;   // bytes of a stream at a time
constexpr size_t kPrefetch = 1024;  // bytes ahead

volatile int64_t sink;

void read(const char* p, size_t n) {
  const size_t part = n / kStreams / kStep * kStep;
  Line sum[4] = {};
  for (size_t i = 0; i < part; i += kStep) {
    for (size_t stream = 0; stream < kStreams; stream++) {
      const char* q = p + stream * part + i;
      for (size_t line = 0; line < 4; line++) {
        __builtin_prefetch(q + kPrefetch + 64 * line);
        sum[line] ^= *reinterpret_cast<const Line*>(q + 64 * line);
      }
    }
  }
  for (size_t i = kStreams * part; i + 64 <= n; i += 64) sum[0] ^= *reinterpret_cast<const Line*>(p + i);
  const Line total = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  for (int lane = 0; lane < 8; lane++) sink = total[lane];
}

// Past the cache, which saves reading what is overwritten.
inline void stream_line(char* p, Line x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#elif defined(__SSE2__)
  __m128i part[4];
  memcpy(part, &x, sizeof(part));
  for (int i = 0; i < 4; i++) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, part[i]);
#else
  memcpy(p, &x, sizeof(x));
#endif
}

void write(char* p, size_t n) {
  for (size_t i = 0; i < n; i += 64) stream_line(p + i, Line{1, 1, 1, 1, 1, 1, 1, 1});
}

void copy(const char* from, char* to, size_t n) {
  for (size_t i = 0; i < n; i += 64) {
    __builtin_prefetch(from + kPrefetch + i);
    stream_line(to + i, *reinterpret_cast<const Line*>(from + i));
  }
}

constexpr size_t kOneThread = 1 << 20;  // bytes, up to which starting another costs more than it brings

// body(first byte, number of bytes) on each thread, in whole lines.
template <class Body>
void on_threads(size_t n, int threads, Body body) {
  if (threads == 1 || n <= kOneThread) return body(size_t{0}, n);
#pragma omp parallel num_threads(threads)
  {
    const size_t count = static_cast<size_t>(omp_get_num_threads()),
                 index = static_cast<size_t>(omp_get_thread_num());
    const size_t begin = n / 64 * index / count * 64,
                 end = index + 1 == count ? n : n / 64 * (index + 1) / count * 64;
    body(begin, end - begin);
  }
}

// Twelve independent chains keep the units busy while each waits for its last result.
template <class Vector, class Step>
void chains(int64_t steps, Vector start, Step step) {
  Vector sums[12];
#pragma GCC unroll 12
  for (int chain = 0; chain < 12; chain++) sums[chain] = start;
  for (int64_t i = 0; i < steps; i++) {
#pragma GCC unroll 12
    for (int chain = 0; chain < 12; chain++) {
      sums[chain] = step(sums[chain]);
      asm("" : "+v"(sums[chain]));
    }
  }
  Vector total = sums[0];
#pragma GCC unroll 12
  for (int chain = 1; chain < 12; chain++) total += sums[chain];
  int64_t lane;
  memcpy(&lane, &total, sizeof(lane));
  sink = lane;
}

}  // namespace

// p, from and to begin at multiples of 64 bytes, and n is one.
extern "C" void roofline_read(const char* p, size_t n, int threads) {
  on_threads(n, threads, [&](size_t begin, size_t size) { read(p + begin, size); });
}
extern "C" void roofline_write(char* p, size_t n, int threads) {
  on_threads(n, threads, [&](size_t begin, size_t size) { write(p + begin, size); });
}
extern "C" void roofline_copy(const char* from, char* to, size_t n, int threads) {
  on_threads(n, threads, [&](size_t begin, size_t size) { copy(from + begin, to + begin, size); });
}

// Multiply-adds that a thread does for `steps`, 0 where this CPU has no such instruction.
extern "C" int64_t roofline_float32(int64_t steps, int threads) {
#if defined(__AVX512F__)
  using Vector = __m512;
  const Vector one = _mm512_set1_ps(1);
  const auto step = [=](Vector sum) { return _mm512_fmadd_ps(one, one, sum); };
#elif defined(__FMA__)
  using Vector = __m256;
  const Vector one = _mm256_set1_ps(1);
  const auto step = [=](Vector sum) { return _mm256_fmadd_ps(one, one, sum); };
#else
  return 0;
#endif
#if defined(__AVX512F__) || defined(__FMA__)
#pragma omp parallel num_threads(threads)
  chains(steps, one, step);
  return steps * 12 * static_cast<int64_t>(sizeof(Vector) / 4);
#endif
}

extern "C" int64_t roofline_bfloat16(int64_t steps, int threads) {
#if defined(__AVX512BF16__)
  const __m512bh one = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3F80));
#pragma omp parallel num_threads(threads)
  chains(steps, _mm512_set1_ps(1), [=](__m512 sum) { return _mm512_dpbf16_ps(sum, one, one); });
  return steps * 12 * 32;
#else
  (void)steps, (void)threads;
  return 0;
#endif
}

extern "C" int64_t roofline_int8(int64_t steps, int threads) {
#if defined(__AVX512VNNI__)
  using Vector = __m512i;
  const Vector one = _mm512_set1_epi8(1);
  const auto step = [=](Vector sum) { return _mm512_dpbusd_epi32(sum, one, one); };
#elif defined(__AVXVNNI__)
  using Vector = __m256i;
  const Vector one = _mm256_set1_epi8(1);
  const auto step = [=](Vector sum) { return _mm256_dpbusd_avx_epi32(sum, one, one); };
#else
  (void)steps, (void)threads;
  return 0;
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#pragma omp parallel num_threads(threads)
  chains(steps, one, step);
  return steps * 12 * static_cast<int64_t>(sizeof(Vector));
#endif
}

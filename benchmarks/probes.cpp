// What the memory and the multipliers of this machine can do: loops with nothing else in them.
// Compiled by probes.py for the machine that runs them. Sizes are in bytes, whole cache lines;
// memory starts on one.
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

typedef float Line __attribute__((vector_size(64), may_alias));

constexpr int64_t kLine = 64, kPage = 4096, kAhead = 2048;

inline void stream(Line* to, Line value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)value);
#elif defined(__SSE2__)
  __m128 quarters[4];
  memcpy(quarters, &value, sizeof value);
  for (int i = 0; i < 4; ++i) _mm_stream_ps(reinterpret_cast<float*>(to) + 4 * i, quarters[i]);
#else
  *to = value;
#endif
}

inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Walks through a thread's share, `pages` pages side by side: act(offset) for every line.
template <class Act>
void walk(int64_t bytes, int pages, int threads, Act act) {
  const int64_t group = pages * kPage, groups = (bytes + group - 1) / group;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t start = g * group, end = start + group;
    if (end > bytes) {
      for (int64_t at = start; at < bytes; at += kLine) act(at);
    } else {
      for (int64_t line = 0; line < kPage; line += kLine)
        for (int p = 0; p < pages; ++p) act(start + p * kPage + line);
    }
  }
}

}  // namespace

extern "C" {

// The sum keeps the compiler from dropping the loads.
float probe_read(const char* x, int64_t bytes, int pages, int threads) {
  Line sums[64] = {};
#pragma omp parallel num_threads(threads)
  {
    Line sum[4] = {};
    const int64_t share = bytes / threads / kPage * kPage, first = omp_get_thread_num() * share;
    const int64_t end = omp_get_thread_num() + 1 == threads ? bytes : first + share;
    const int64_t part = (end - first) / pages / kLine * kLine;
    for (int64_t at = first; at < first + part; at += kLine)
      for (int p = 0; p < pages; ++p) {
        const char* from = x + at + p * part;
        __builtin_prefetch(from + kAhead);
        sum[p & 3] += *reinterpret_cast<const Line*>(from);
      }
    for (int64_t at = first + pages * part; at < end; at += kLine)
      sum[0] += *reinterpret_cast<const Line*>(x + at);
    sums[omp_get_thread_num() & 63] = sum[0] + sum[1] + sum[2] + sum[3];
  }
  float total = 0;
  for (const Line& sum : sums) total += sum[0];
  return total;
}

void probe_copy(const char* x, char* y, int64_t bytes, int pages, int threads) {
  walk(bytes, pages, threads, [=](int64_t at) {
    stream(reinterpret_cast<Line*>(y + at), *reinterpret_cast<const Line*>(x + at));
  });
  fence();
}

void probe_write(char* y, int64_t bytes, int pages, int threads) {
  const Line value = Line{} + float(threads);
  walk(bytes, pages, threads, [=](int64_t at) { stream(reinterpret_cast<Line*>(y + at), value); });
  fence();
}

// By a factor that the compiler does not know: it would leave out a product with 1.
void probe_modify(char* x, int64_t bytes, int pages, float factor, int threads) {
  walk(bytes, pages, threads, [=](int64_t at) {
    __builtin_prefetch(x + at + kAhead, 1);
    *reinterpret_cast<Line*>(x + at) *= factor;
  });
}

// Operations of one round of each peak, all threads together; 0 where the processor has no such.
// Twelve sums are in flight, more than the latency of any unit needs.
int64_t probe_float32(int64_t rounds, int threads) {
#if defined(__FMA__)
#if defined(__AVX512F__)
  typedef __m512 Vector;
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#else
  typedef __m256 Vector;
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#endif
#pragma omp parallel num_threads(threads)
  {
    Vector sum[12] = {}, a = Vector{} + 1.0f;
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) sum[j] = FMA(a, a, sum[j]);
      __asm__ volatile("" : "+v"(a));
    }
    for (int j = 0; j < 12; ++j) __asm__ volatile("" ::"v"(sum[j]));
  }
  return rounds * threads * 12 * 2 * int64_t(sizeof(Vector) / 4);
#else
  (void)rounds, (void)threads;
  return 0;
#endif
}

int64_t probe_bfloat16(int64_t rounds, int threads) {
#if defined(__AVX512BF16__)
#pragma omp parallel num_threads(threads)
  {
    __m512 sum[12] = {};
    __m512i a = _mm512_set1_epi16(0x3f80);
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) sum[j] = _mm512_dpbf16_ps(sum[j], (__m512bh)a, (__m512bh)a);
      __asm__ volatile("" : "+v"(a));
    }
    for (int j = 0; j < 12; ++j) __asm__ volatile("" ::"v"(sum[j]));
  }
  return rounds * threads * 12 * 64;
#else
  (void)rounds, (void)threads;
  return 0;
#endif
}

int64_t probe_amx(int64_t rounds, int threads) {
#if defined(__AMX_BF16__)
  const long request_permission = 0x1023, tile_data = 18;
  if (syscall(SYS_arch_prctl, request_permission, tile_data)) return 0;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) uint8_t config[64] = {1};  // eight tiles of 16 rows of 64 bytes
    for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;
    // GCC 12 takes the configuration for 8 bytes and would drop the other stores.
    __asm__ volatile("" ::"r"(config) : "memory");
    _tile_loadconfig(config);
    _tile_zero(0), _tile_zero(1), _tile_zero(2), _tile_zero(3);
    _tile_zero(4), _tile_zero(5), _tile_zero(6), _tile_zero(7);
    for (int64_t i = 0; i < rounds; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
  }
  return rounds * threads * 4 * 16 * 16 * 32 * 2;
#else
  (void)rounds, (void)threads;
  return 0;
#endif
}

}  // extern "C"

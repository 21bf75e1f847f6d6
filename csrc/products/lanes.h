// Sixteen float32 lanes, in as many registers as the instruction set needs. Anonymous: every
// instruction set compiles its own.
#pragma once

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)

struct Lanes {
  __m512 v;
  static Lanes zero() { return {_mm512_setzero_ps()}; }
  static Lanes all(float x) { return {_mm512_set1_ps(x)}; }
  static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void add_product(const Lanes& a, const Lanes& b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
};

#elif defined(__AVX2__) && defined(__FMA__)

struct Lanes {
  __m256 v[2];
  static Lanes zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static Lanes all(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  static Lanes load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, v[0]);
    _mm256_storeu_ps(p + 8, v[1]);
  }
  void add_product(const Lanes& a, const Lanes& b) {
    v[0] = _mm256_fmadd_ps(a.v[0], b.v[0], v[0]);
    v[1] = _mm256_fmadd_ps(a.v[1], b.v[1], v[1]);
  }
};

#else

// Left to the compiler; products are rounded before they are added.
struct Lanes {
  typedef float Vector __attribute__((vector_size(64), aligned(4)));
  Vector v;
  static Lanes zero() { return {Vector{}}; }
  static Lanes all(float x) { return {Vector{} + x}; }
  static Lanes load(const float* p) { return {*reinterpret_cast<const Vector*>(p)}; }
  void store(float* p) const { *reinterpret_cast<Vector*>(p) = v; }
  void add_product(const Lanes& a, const Lanes& b) { v += a.v * b.v; }
};

#endif

// HEIGHT rows of `DEPTH` weights by WIDTH times 16 columns of x, laid out [WIDTH][DEPTH][16].
template <int HEIGHT, int WIDTH, int DEPTH>
inline void float_tile(const float* w, const float* x, float* sums, long width) {
  Lanes sum[HEIGHT][WIDTH];
  for (int r = 0; r < HEIGHT; ++r)
    for (int p = 0; p < WIDTH; ++p) sum[r][p] = Lanes::load(sums + r * width + p * 16);
  for (int k = 0; k < DEPTH; ++k) {
    Lanes part[WIDTH];
    for (int p = 0; p < WIDTH; ++p) part[p] = Lanes::load(x + (p * DEPTH + k) * 16);
#pragma GCC unroll 12
    for (int r = 0; r < HEIGHT; ++r) {
      const Lanes weight = Lanes::all(w[r * DEPTH + k]);
      for (int p = 0; p < WIDTH; ++p) sum[r][p].add_product(weight, part[p]);
    }
  }
  for (int r = 0; r < HEIGHT; ++r)
    for (int p = 0; p < WIDTH; ++p) sum[r][p].store(sums + r * width + p * 16);
}

inline float sum_of(const Lanes& x) {
  float lanes[16];
  x.store(lanes);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace

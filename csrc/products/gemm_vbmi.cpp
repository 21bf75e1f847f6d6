// GEMM with AVX-512: bfloat16 by vdpbf16ps, float32 by fused multiply-adds. Decoding by VBMI.
#include "bfloat16.h"
#include "extent.h"
#include "gemm_decode.h"
#include "gemm_vbmi.h"
#include "lanes.h"

namespace {

struct BFloat16 : BFloat16Order {
  using State = NoState;
  static constexpr int64_t HEIGHT = 12;
  static constexpr int WIDTH = 2;

  template <int WIDTH>
  static void tile(const uint16_t* w, const uint16_t* x, float* sums, int64_t width) {
    __m512 sum[HEIGHT][WIDTH];
    for (int r = 0; r < HEIGHT; ++r)
      for (int p = 0; p < WIDTH; ++p) sum[r][p] = _mm512_loadu_ps(sums + r * width + p * 16);
    for (int64_t k = 0; k < DEPTH; k += 2) {
      __m512bh part[WIDTH];
      for (int p = 0; p < WIDTH; ++p)
        part[p] = __m512bh(_mm512_load_si512(x + (p * DEPTH + k) * COLUMNS));
#pragma GCC unroll 12
      for (int r = 0; r < HEIGHT; ++r) {
        int32_t pair;
        std::memcpy(&pair, w + r * DEPTH + k, 4);
        const __m512bh weight = __m512bh(_mm512_set1_epi32(pair));
        for (int p = 0; p < WIDTH; ++p)
          sum[r][p] = _mm512_dpbf16_ps(sum[r][p], weight, part[p]);
      }
    }
    for (int r = 0; r < HEIGHT; ++r)
      for (int p = 0; p < WIDTH; ++p) _mm512_storeu_ps(sums + r * width + p * 16, sum[r][p]);
  }
};

template <Look LOOK>
struct Float32 {
  using Element = float;
  using Rows = DecodedRows<Float32, LOOK>;
  using State = NoState;
  static constexpr int64_t DEPTH = 128, HEIGHT = 12;
  static constexpr int WIDTH = 2;
  static constexpr bool FACTORED = false;

  // Rounded as `dequantize` does: element times scale, then times the tensor's.
  static void scale_and_store(const Halves& h, __m512 scale, float tensor_scale, float* to) {
    const __m512 outer = _mm512_set1_ps(tensor_scale);
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27);
    const __m512i high = _mm512_setr_epi32(4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31);
    const __m512i halves[2] = {h.first, h.second};
    // Of each half: even and odd values interleaved again, 0-7 and 16-23, 32-39 and 48-55.
    for (int i = 0; i < 2; ++i) {
      const __m512 even = _mm512_mul_ps(_mm512_mul_ps(even_values(halves[i]), scale), outer);
      const __m512 odd = _mm512_mul_ps(_mm512_mul_ps(odd_values(halves[i]), scale), outer);
      const __m512 a = _mm512_permutex2var_ps(even, low, odd);
      const __m512 b = _mm512_permutex2var_ps(even, high, odd);
      _mm256_store_ps(to + 8 * i, _mm512_castps512_ps256(a));
      _mm256_store_ps(to + 8 * i + 32, _mm512_extractf32x8_ps(a, 1));
      _mm256_store_ps(to + 8 * i + 16, _mm512_castps512_ps256(b));
      _mm256_store_ps(to + 8 * i + 48, _mm512_extractf32x8_ps(b, 1));
    }
  }

  static void turn_x(const float* x, int64_t stride, int64_t count, int64_t length, float* to) {
    turn_rows(x, stride * 4, count, length * 4, to, DEPTH);
  }

  static void join_x(const float*, int64_t, int64_t, int64_t, int64_t, float*) {}  // nobody asks for it

  static void turn_sums(const float* sums, int64_t width, float (&to)[16][16]) {
    turn_floats(sums, width, to);
  }

  template <int WIDTH>
  static void tile(const float* w, const float* x, float* sums, int64_t width) {
    float_tile<HEIGHT, WIDTH, DEPTH>(w, x, sums, width);
  }
};

template <Look LOOK>
using Decoded = Decoding<BFloat16, LOOK>;

}  // namespace

int gemm_bfloat16_vbmi(const GemmCall& call) { return by_look<Decoded>(call); }
int gemm_dense_vbmi(const GemmCall& call) { return Gemm<Dense<BFloat16>>(call).run(); }
int gemm_float32_vbmi(const GemmCall& call) { return by_look<Float32>(call); }
void extent_vbmi(const void* x, int32_t type, int64_t n, int threads, float* two) {
  extent(x, type, n, threads, two);
}

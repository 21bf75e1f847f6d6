// GEMM with AVX-512: bfloat16 by vdpbf16ps, float32 by fused multiply-adds. Decoding by VBMI.
#include "gemm.h"
#include "gemm_vbmi.h"
#include "lanes.h"
#include "turn.h"
#include "vbmi.h"

namespace {

// Decodes DEPTH values of a row, scaled, and asks for the codes of the next pass.
template <class Kernel, Look LOOK>
class DecodeRow {
  const ms_packed& w_;
  ScaleReader scales_;
  ScaleSpread spread_;
  Decoder<LOOK> values_;
  bool scaled_;  // else the scale, one for a row, is a factor of the sums

  public:
  explicit DecodeRow(const ms_packed& w)
    : w_(w), scales_(w), spread_(w.block), values_(w.values, w.bits),
          scaled_(w.block != 0 || !Kernel::FACTORED) {}

  void operator()(int64_t row, int64_t k, typename Kernel::Element* to) const {
    alignas(64) float scales[Kernel::DEPTH / 16 + 64];
    if (scaled_) scales_.part(row, k, Kernel::DEPTH, scales);
    else std::fill_n(scales, 16, 1.0f);
    if constexpr (LOOK != Look::SIX) chunks<8>(row, k, scales, to);
    else if (w_.bits == 4) chunks<4>(row, k, scales, to);
    else chunks<6>(row, k, scales, to);
  }

  private:
  template <int BITS>
  void chunks(int64_t row, int64_t k, const float* scales, typename Kernel::Element* to) const {
    const uint8_t* codes = w_.codes + row * w_.row_bytes;
    const int64_t first = k / CHUNK, base = spread_.offset(first);
    constexpr int64_t PASS = Kernel::DEPTH / 8 * BITS;
    for (int64_t at = 0; at < PASS; at += 64)
      _mm_prefetch(codes + (k / 8 * BITS + PASS + at), _MM_HINT_T1);
    for (int64_t c = 0; c < Kernel::DEPTH / CHUNK; ++c, to += CHUNK) {
      const int64_t left = w_.length - (first + c) * CHUNK;
      const __mmask64 bytes = low_bits((left * BITS + 7) / 8);
      const __m512i loaded = load_codes<BITS>(chunk_at<BITS>(codes, first + c), bytes);
      const Halves h = values_(loaded, low_bits(left));
      Kernel::scale_and_store(h, spread_(scales + spread_.offset(first + c) - base),
                  w_.tensor_scale, to);
    }
  }
};

template <Look LOOK>
struct BFloat16 {
  using Element = uint16_t;
  using Decode = DecodeRow<BFloat16, LOOK>;
  using State = NoState;
  static constexpr int64_t DEPTH = 256, HEIGHT = 12;
  static constexpr int WIDTH = 2;
  static constexpr bool FACTORED = true;

  // Element times scale is exact in bfloat16 here, so cutting off the lower half loses nothing.
  static __m512i scaled(__m512i pairs, __m512 scale) {
    const __m512i even = _mm512_castps_si512(_mm512_mul_ps(even_values(pairs), scale));
    const __m512i odd = _mm512_castps_si512(_mm512_mul_ps(odd_values(pairs), scale));
    return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
  }

  static void scale_and_store(const Halves& h, __m512 scale, float, uint16_t* to) {
    const Halves out = in_order({scaled(h.first, scale), scaled(h.second, scale)});
    _mm512_store_si512(to, out.first);
    _mm512_store_si512(to + 32, out.second);
  }

  static void turn_x(const uint16_t* x, int64_t stride, int64_t count, int64_t length,
                       uint16_t* to) {
    turn_rows(x, stride * 2, count, length * 2, to, DEPTH / 2);
  }

  static void turn_sums(const float* sums, int64_t width, float (&to)[16][16]) {
    turn_floats(sums, width, to);
  }

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
  using Decode = DecodeRow<Float32, LOOK>;
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

  static void turn_sums(const float* sums, int64_t width, float (&to)[16][16]) {
    turn_floats(sums, width, to);
  }

  template <int WIDTH>
  static void tile(const float* w, const float* x, float* sums, int64_t width) {
    float_tile<HEIGHT, WIDTH, DEPTH>(w, x, sums, width);
  }
};

template <template <Look> class Kernel>
int by_look(const GemmCall& call) {
  switch (look_of(*call.w)) {
    case Look::SIX: return Gemm<Kernel<Look::SIX>>(call).run();
    case Look::SIGNED: return Gemm<Kernel<Look::SIGNED>>(call).run();
    default: return Gemm<Kernel<Look::EIGHT>>(call).run();
  }
}

}  // namespace

int gemm_bfloat16_vbmi(const GemmCall& call) { return by_look<BFloat16>(call); }
int gemm_float32_vbmi(const GemmCall& call) { return by_look<Float32>(call); }

// Products that any processor can do, compiled for several instruction sets: weights decoded to
// float32 as `dequantize` gives them, a stretch of a row at a time, and multiplied from the first
// cache. So every number is served, and these are what the faster kernels fall back on.
//
// Decoding: AVX2 makes a half of every code of a float format (its exponent and mantissa fit; a
// power of two makes up for the bias) and widens it; integers are converted; anything else, and
// the baseline, looks values up. MS_PRODUCTS is the name of the table of this file's kernels.
#include "gemm.h"
#include "kernels.h"
#include "lanes.h"
#if defined(__AVX512F__)
#include "turn.h"
#endif

namespace {

constexpr int64_t DEPTH = 128;

// ---------------------------------------------------------------- decoding

inline void unpack_codes(const uint8_t* row, int bits, int64_t k, int64_t n, uint8_t* codes) {
  if (bits == 8) {
    std::memcpy(codes, row + k, size_t(n));
  } else if (bits == 4) {
    const uint8_t* p = row + k / 2;
    for (int64_t i = 0; i < n / 2; ++i) {
      codes[2 * i] = p[i] & 15;
      codes[2 * i + 1] = p[i] >> 4;
    }
    if (n % 2) codes[n - 1] = p[n / 2] & 15;
  } else {
    const uint8_t* p = row + k / 4 * 3;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4, p += 3) {
      codes[i] = p[0] & 63;
      codes[i + 1] = (p[0] >> 6 | p[1] << 2) & 63;
      codes[i + 2] = (p[1] >> 4 | p[2] << 4) & 63;
      codes[i + 3] = p[2] >> 2;
    }
    for (int64_t j = 0; i < n; ++i, ++j) {
      const int bit = int(6 * j);
      int word = p[bit >> 3] >> (bit & 7);
      if ((bit & 7) > 2) word |= p[(bit >> 3) + 1] << (8 - (bit & 7));
      codes[i] = word & 63;
    }
  }
}

#if defined(__AVX2__)

// How codes become values without a table.
struct Rule {
  enum Kind { TABLE, HALF, INTEGER } kind = TABLE;
  int shift = 0;         // HALF: from the code's magnitude to that of a half
  int nan = 1 << 16;     // HALF: the magnitude, shifted, that is NaN
  float factor = 1;      // of the half or integer

  explicit Rule(const ms_packed& w) {
    if (is_integer(w)) return;
    for (shift = 6; shift < 10; ++shift)
      if (is_half(w)) return;
    kind = TABLE;
  }

  private:
  bool is_integer(const ms_packed& w) {
    factor = w.values[1];
    const int half = 1 << (w.bits - 1);
    for (int c = 0; c < 2 * half; ++c)
      if (w.values[c] != float(c < half ? c : c - 2 * half) * factor) return false;
    kind = INTEGER;
    return true;
  }

  bool is_half(const ms_packed& w) {
    const int half = 1 << (w.bits - 1);
    factor = w.values[1] / _cvtsh_ss(uint16_t(1 << shift));
    nan = 1 << 16;
    for (int c = 1; c < half; ++c) {
      const float v = w.values[c];
      const float h = (c << shift) < 0x8000 ? _cvtsh_ss(uint16_t(c << shift)) : NAN;
      if (v != h * factor && !(std::isnan(v) && std::isnan(h))) {
        // One magnitude may be NaN that is a number as a half.
        if (!std::isnan(v) || nan < 1 << 16) return false;
        nan = c << shift;
      }
      const float minus = w.values[c + half];
      if (minus != -v && !(std::isnan(v) && std::isnan(minus))) return false;
    }
    kind = HALF;
    return w.values[0] == 0 && bits_of(w.values[half]) == 0x80000000u;
  }
};

inline void values_of(const ms_packed& w, const Rule& rule, const uint8_t* codes, float* to) {
  const __m256 factor = _mm256_set1_ps(rule.factor);
  if (rule.kind == Rule::TABLE) {
    for (int64_t i = 0; i < DEPTH; i += 8) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
      const __m256i index = _mm256_cvtepu8_epi32(eight);
      _mm256_store_ps(to + i, _mm256_i32gather_ps(w.values, index, 4));
    }
  } else if (rule.kind == Rule::INTEGER) {
    const __m128i up = _mm_cvtsi32_si128(32 - w.bits);
    for (int64_t i = 0; i < DEPTH; i += 8) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
      __m256i number = _mm256_cvtepu8_epi32(eight);
      number = _mm256_sra_epi32(_mm256_sll_epi32(number, up), up);
      _mm256_store_ps(to + i, _mm256_mul_ps(_mm256_cvtepi32_ps(number), factor));
    }
  } else {
    const __m256i magnitude = _mm256_set1_epi16(int16_t((1 << (w.bits - 1)) - 1));
    const __m128i shift = _mm_cvtsi32_si128(rule.shift), to_sign = _mm_cvtsi32_si128(16 - w.bits);
    const __m256i sign = _mm256_set1_epi16(-32768), nan = _mm256_set1_epi16(int16_t(rule.nan));
    const bool has_nan = rule.nan < 1 << 16;
    for (int64_t i = 0; i < DEPTH; i += 16) {
      const __m256i code = _mm256_cvtepu8_epi16(
        _mm_load_si128(reinterpret_cast<const __m128i*>(codes + i)));
      __m256i half = _mm256_sll_epi16(_mm256_and_si256(code, magnitude), shift);
      if (has_nan)
        half = _mm256_or_si256(half, _mm256_and_si256(_mm256_cmpeq_epi16(half, nan),
                                                              _mm256_set1_epi16(0x7e00)));
      half = _mm256_or_si256(half, _mm256_and_si256(_mm256_sll_epi16(code, to_sign), sign));
      const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
      const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
      _mm256_store_ps(to + i, _mm256_mul_ps(low, factor));
      _mm256_store_ps(to + i + 8, _mm256_mul_ps(high, factor));
    }
  }
}

#else

struct Rule {
  explicit Rule(const ms_packed&) {}
};

inline void values_of(const ms_packed& w, const Rule&, const uint8_t* codes, float* to) {
  for (int64_t i = 0; i < DEPTH; ++i) to[i] = w.values[codes[i]];
}

#endif

// Rows decoded to float32.
class DecodeRow {
  const ms_packed& w_;
  Rule rule_;

  public:
  explicit DecodeRow(const ms_packed& w) : w_(w), rule_(w) {}

  // DEPTH values from k, a multiple of DEPTH, with zeros behind the row's end.
  void operator()(int64_t row, int64_t k, float* to) const {
    const int64_t n = std::min(DEPTH, w_.length - k);
    alignas(64) uint8_t codes[DEPTH];
    if (n < DEPTH) std::memset(codes, 0, sizeof codes);
    unpack_codes(w_.codes + row * w_.row_bytes, w_.bits, k, n, codes);
    values_of(w_, rule_, codes, to);
    scale(row, k, n, to);
    if (w_.tensor_scale != 1)
      for (int64_t i = 0; i < n; ++i) to[i] *= w_.tensor_scale;
    for (int64_t i = n; i < DEPTH; ++i) to[i] = 0;
  }

  private:
  void scale(int64_t row, int64_t k, int64_t n, float* to) const {
    const int64_t block = w_.block ? w_.block : w_.length;
    for (int64_t i = 0; i < n;) {
      const int64_t at = (k + i) / block;
      const int64_t end = std::min(n, (at + 1) * block - k);
      const float s = scale_at(w_, row, at);
      for (; i < end; ++i) to[i] *= s;
    }
  }
};

// ---------------------------------------------------------------- few rows of x

// Rows of x in float32 with zeros up to a multiple of DEPTH.
Buffer<float> widened(const ms_dense& x, int64_t length, int64_t room) {
  Buffer<float> out = allocate<float>(x.rows * room);
  if (!out) return out;
  for (int64_t m = 0; m < x.rows; ++m) {
    for (int64_t k = 0; k < length; ++k) out[m * room + k] = load(x.data, x.type, m * x.stride + k);
    std::fill(out.get() + m * room + length, out.get() + (m + 1) * room, 0.0f);
  }
  return out;
}

void row_products(const GemvCall& call, const DecodeRow& decode, int64_t row, const float* x,
                  int64_t room) {
  constexpr int SUMS = 4;
  alignas(64) float weights[DEPTH];
  float sums[GEMV_BATCH][SUMS][16] = {};
  for (int64_t k = 0; k < call.w->length; k += DEPTH) {
    decode(row, k, weights);
    for (int64_t m = 0; m < call.batch; ++m) {
      Lanes sum[SUMS];
      for (int i = 0; i < SUMS; ++i) sum[i] = Lanes::load(sums[m][i]);
      const float* part = x + m * room + k;
      for (int64_t j = 0; j < DEPTH; j += SUMS * 16)
        for (int i = 0; i < SUMS; ++i)
          sum[i].add_product(Lanes::load(weights + j + 16 * i),
                                       Lanes::load(part + j + 16 * i));
      for (int i = 0; i < SUMS; ++i) sum[i].store(sums[m][i]);
    }
  }
  const float bias = call.bias ? call.bias[row] : 0.0f;
  for (int64_t m = 0; m < call.batch; ++m) {
    float total = 0;
    for (const auto& part : sums[m]) total += sum_of(Lanes::load(part));
    store(const_cast<void*>(call.out->data), call.out->type, m * call.out->stride + row,
              total + bias);
  }
}

int gemv_careful(const GemvCall& call, const ms_dense& x) {
  const int64_t room = ceil_div(call.w->length, DEPTH) * DEPTH;
  const Buffer<float> wide = widened(x, call.w->length, room);
  if (!wide) return MS_NO_MEMORY;
  const DecodeRow decode(*call.w);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t row = 0; row < call.w->rows; ++row)
    if (!call.bad || call.bad[row]) row_products(call, decode, row, wide.get(), room);
  return MS_OK;
}

// ---------------------------------------------------------------- many rows of x

struct DecodedRows {
  DecodeRow decode;

  explicit DecodedRows(const GemmCall& call) : decode(*call.w) {}

  void operator()(int64_t row, int64_t rows, int64_t k, float* to) const {
    for (int64_t r = 0; r < rows; ++r) decode(row + r, k, to + r * DEPTH);
  }
};

struct Float32 {
  using Element = float;
  using Rows = DecodedRows;
  using State = NoState;
  static constexpr int64_t DEPTH = ::DEPTH;
#if defined(__AVX512F__)
  static constexpr int64_t HEIGHT = 12;
  static constexpr int WIDTH = 2;
#elif defined(__AVX2__)
  static constexpr int64_t HEIGHT = 6;
  static constexpr int WIDTH = 1;
#else
  static constexpr int64_t HEIGHT = 3;
  static constexpr int WIDTH = 1;
#endif

  static void turn_x(const float* x, int64_t stride, int64_t count, int64_t length, float* to) {
#if defined(__AVX512F__)
    turn_rows(x, stride * 4, count, length * 4, to, DEPTH);
#else
    if (count < COLUMNS || length < DEPTH) std::fill_n(to, DEPTH * COLUMNS, 0.0f);
    for (int64_t m = 0; m < count; ++m)
      for (int64_t k = 0; k < length; ++k) to[k * COLUMNS + m] = x[m * stride + k];
#endif
  }

  static void join_x(const float*, int64_t, int64_t, int64_t, int64_t, float*) {}  // nobody asks for it

  static void turn_sums(const float* sums, int64_t width, float (&to)[16][16]) {
#if defined(__AVX512F__)
    turn_floats(sums, width, to);
#else
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) to[j][i] = sums[i * width + j];
#endif
  }

  template <int WIDTH>
  static void tile(const float* w, const float* x, float* sums, int64_t width) {
    float_tile<HEIGHT, WIDTH, DEPTH>(w, x, sums, width);
  }
};

int gemm_float32(const GemmCall& call) { return Gemm<Float32>(call).run(); }

}  // namespace

const ProductKernels MS_PRODUCTS = {nullptr,      nullptr, nullptr, gemv_careful,
                                    gemm_float32, nullptr, nullptr, nullptr};

// bfloat16 as it stands in memory, brought into the order of tiles: of either factor, rows may lie
// behind each other or side by side. What the kernels of AVX-512 and AMX share.
#pragma once

#include "gemm.h"
#include "turn.h"

namespace {

// Values 2 k and 2 k + 1 of 16 neighbouring rows, side by side: 16 pairs.
inline __m512i joined(const uint16_t* even, const uint16_t* odd, __mmask16 kept, bool has_odd) {
  const __m256i a = _mm256_maskz_loadu_epi16(kept, even);
  const __m256i b = _mm256_maskz_loadu_epi16(has_odd ? kept : 0, odd);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : __mmask16((1u << n) - 1); }

// What kernels in bfloat16 share: how x gets its order, and sums lose theirs.
struct BFloat16Order {
  using Element = uint16_t;
  static constexpr int64_t DEPTH = 256;

  static void turn_x(const uint16_t* x, int64_t stride, int64_t count, int64_t length,
                     uint16_t* to) {
    turn_rows(x, stride * 2, count, length * 2, to, DEPTH / 2);
  }

  // Rows side by side, `step` between the values of each: `depth` values of them, to panels of 16.
  static void join_x(const uint16_t* x, int64_t step, int64_t rows, int64_t length, int64_t depth,
                     uint16_t* to) {
    for (int64_t k = 0; k < depth; k += 2, to += 2 * COLUMNS) {
      const uint16_t* even = x + k * step;
      for (int64_t m = 0; m < rows; m += COLUMNS)
        _mm512_store_si512(to + m * DEPTH,
                           k < length ? joined(even + m, even + m + step, first(rows - m), k + 1 < length)
                                      : _mm512_setzero_si512());
    }
  }

  static void turn_sums(const float* sums, int64_t width, float (&to)[16][16]) {
    turn_floats(sums, width, to);
  }
};

// Rows of a matrix that is not packed.
class DenseRows {
  static constexpr int64_t DEPTH = BFloat16Order::DEPTH;
  const ms_dense& w_;
  int64_t length_;

  public:
  explicit DenseRows(const GemmCall& call) : w_(*call.rows), length_(call.length) {}

  void operator()(int64_t row, int64_t rows, int64_t k, uint16_t* to) const {
    const uint16_t* from = static_cast<const uint16_t*>(w_.data) + row * w_.stride + k * w_.step;
    const int64_t length = std::min(DEPTH, length_ - k);
    if (w_.step == 1) copy(from, rows, length, to);
    else turn(from, rows, length, to);
  }

  private:
  void copy(const uint16_t* from, int64_t rows, int64_t length, uint16_t* to) const {
    for (int64_t r = 0; r < rows; ++r, from += w_.stride, to += DEPTH) {
      std::memcpy(to, from, size_t(length) * sizeof *to);
      if (length < DEPTH) std::memset(to + length, 0, size_t(DEPTH - length) * sizeof *to);
    }
  }

  // Squares of 16 rows and 16 pairs.
  void turn(const uint16_t* from, int64_t rows, int64_t length, uint16_t* to) const {
    for (int64_t k = 0; k < DEPTH; k += STRIP) {
      for (int64_t r = 0; r < rows; r += 16) {
        const __mmask16 kept = first(rows - r);
        __m512i square[16];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t at = k + 2 * i;
          const uint16_t* even = from + r + at * w_.step;
          square[i] = at < length ? joined(even, even + w_.step, kept, at + 1 < length)
                                  : _mm512_setzero_si512();
        }
        turn16(square);
        const int64_t n = std::min<int64_t>(16, rows - r);
        for (int64_t i = 0; i < n; ++i) _mm512_store_si512(to + (r + i) * DEPTH + k, square[i]);
      }
    }
  }
};

// A kernel for such rows.
template <class Tiles>
struct Dense : Tiles {
  using Rows = DenseRows;
};

}  // namespace

// Rows decoded by VBMI for GEMM, and what its kernels in bfloat16 share.
#pragma once

#include "gemm.h"
#include "turn.h"
#include "vbmi.h"

namespace {

// Decodes DEPTH values of rows, scaled, and asks for the codes of the next pass.
template <class Kernel, Look LOOK>
class DecodedRows {
  const ms_packed& w_;
  ScaleReader scales_;
  ScaleSpread spread_;
  Decoder<LOOK> values_;
  bool scaled_;  // else the scale, one for a row, is a factor of the sums

  public:
  explicit DecodedRows(const GemmCall& call)
    : w_(*call.w), scales_(w_), spread_(w_.block), values_(w_.values, w_.bits),
          scaled_(w_.block != 0 || !Kernel::FACTORED) {}

  void operator()(int64_t row, int64_t rows, int64_t k, typename Kernel::Element* to) const {
    for (int64_t r = 0; r < rows; ++r) decode(row + r, k, to + r * Kernel::DEPTH);
  }

  private:
  void decode(int64_t row, int64_t k, typename Kernel::Element* to) const {
    alignas(64) float scales[Kernel::DEPTH / 16 + 64];
    if (scaled_) scales_.part(row, k, Kernel::DEPTH, scales);
    else std::fill_n(scales, 16, 1.0f);
    if constexpr (LOOK != Look::SIX) chunks<8>(row, k, scales, to);
    else if (w_.bits == 4) chunks<4>(row, k, scales, to);
    else chunks<6>(row, k, scales, to);
  }

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
      // An infinite scale makes NaN of the zeros behind a row.
      if (left < CHUNK) std::fill(to + std::max<int64_t>(left, 0), to + CHUNK, 0);
    }
  }
};

// Element times scale is exact in bfloat16 here, so cutting off the lower half loses nothing.
inline __m512i scaled_pairs(__m512i pairs, __m512 scale) {
  const __m512i even = _mm512_castps_si512(_mm512_mul_ps(even_values(pairs), scale));
  const __m512i odd = _mm512_castps_si512(_mm512_mul_ps(odd_values(pairs), scale));
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

// bfloat16, decoded, for a kernel that multiplies it.
template <class Tiles, Look LOOK>
struct Decoding : Tiles {
  using Rows = DecodedRows<Decoding, LOOK>;
  static constexpr bool FACTORED = true;

  static void scale_and_store(const Halves& h, __m512 scale, float, uint16_t* to) {
    const Halves out = in_order({scaled_pairs(h.first, scale), scaled_pairs(h.second, scale)});
    _mm512_store_si512(to, out.first);
    _mm512_store_si512(to + 32, out.second);
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

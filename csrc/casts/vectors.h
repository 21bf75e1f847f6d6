// Sixteen values at a time in AVX-512: loads, the grid in vectors, stores, packing. The steps are
// those of grid.h and runs.h.
#ifndef MICROSCALE_VECTORS_H
#define MICROSCALE_VECTORS_H

#include "grid.h"
#include "io.h"
#include "pack.h"
#if defined(__AVX512BW__)
#include <immintrin.h>

// Everything here belongs into the loop that calls it.
#define MS_INLINE inline __attribute__((always_inline))

namespace {

// ---------------------------------------------------------------- loads

struct Half {  // float16; uint16_t is bfloat16
  uint16_t bits;
};

MS_INLINE __m512i bits16(const float* x) { return _mm512_loadu_si512(x); }
MS_INLINE __m512i bits16(const uint16_t* x) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}

MS_INLINE __m512i bits16(const Half* x) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castps_si512(_mm512_cvtph_ps(h));
}

// Calls what(x + at) with the type of x.
template <class What>
MS_INLINE void with_type(const void* x, int type, int64_t at, const What& what) {
  if (type == MS_FLOAT32) return what(static_cast<const float*>(x) + at);
  if (type == MS_BFLOAT16) return what(static_cast<const uint16_t*>(x) + at);
  what(static_cast<const Half*>(x) + at);
}

// 64 values from element `at` on.
MS_INLINE void load64(const void* x, int type, int64_t at, __m512i* v) {
  with_type(x, type, at, [&](auto* from) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) v[k] = bits16(from + 16 * k);
  });
}
// The first n of 16 values, the others 0.
MS_INLINE __m512i load_some(const float* x, int n) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), x);
}
template <class T>
MS_INLINE __m512i load_some(const T* x, int n) {
  T some[16] = {};
  memcpy(some, x, static_cast<size_t>(n) * sizeof(T));
  return bits16(some);
}

// ---------------------------------------------------------------- largest

// The largest of each of two sets of blocks, side by side.
MS_INLINE __m512i merge_words(__m512i a, __m512i b) {
  return _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
MS_INLINE __m512i merge_pairs(__m512i a, __m512i b) {
  return _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// The largest of each of sixteen vectors.
MS_INLINE __m512i largest_of_sixteen(const __m512i* v) {
  __m512i four[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    four[k] = merge_pairs(merge_words(v[4 * k], v[4 * k + 1]),
                          merge_words(v[4 * k + 2], v[4 * k + 3]));
  }
  const __m512i low = _mm512_max_epi32(_mm512_shuffle_i32x4(four[0], four[1], 0x44),
                                       _mm512_shuffle_i32x4(four[0], four[1], 0xee));
  const __m512i high = _mm512_max_epi32(_mm512_shuffle_i32x4(four[2], four[3], 0x44),
                                        _mm512_shuffle_i32x4(four[2], four[3], 0xee));
  return _mm512_max_epi32(_mm512_shuffle_i32x4(low, high, 0x88),
                          _mm512_shuffle_i32x4(low, high, 0xdd));
}

// ---------------------------------------------------------------- grid

// A grid in vectors.
struct Lattice {
  __m512i mask, to_c, magnitude, sign, largest_code, high, code_mask;
  __m128i down, sign_down;

  explicit Lattice(const Grid& g)
      : mask(_mm512_set1_epi32(g.exponent_mask)),
        to_c(_mm512_set1_epi32(g.to_c)),
        magnitude(_mm512_set1_epi32(kMagnitude)),
        sign(_mm512_set1_epi32(INT32_MIN)),
        largest_code(_mm512_set1_epi32(g.largest_code)),
        high(_mm512_set1_epi32(g.high)),
        code_mask(_mm512_set1_epi32(g.mask)),
        down(_mm_cvtsi32_si128(23 - g.mantissa_bits)),
        sign_down(_mm_cvtsi32_si128(31 - g.sign_shift)) {}
};

// The binade of magnitudes a; those of quotients may lie beyond the grid.
template <bool Integer, bool Quotient>
MS_INLINE __m512i binade16(__m512i a, const Lattice& l, __m512i low) {
  if (Integer) return low;
  const __m512i e = _mm512_max_epi32(_mm512_and_epi32(a, l.mask), low);
  return Quotient ? _mm512_min_epi32(e, l.high) : e;
}

// Magnitudes a with the signs of x on the grid.
template <bool Integer, bool Quotient = false>
MS_INLINE __m512i value16(__m512i a, __m512i x, const Lattice& l, __m512i low, __m512 top) {
  const __m512i e = binade16<Integer, Quotient>(a, l, low);
  const __m512 c = _mm512_castsi512_ps(_mm512_add_epi32(e, l.to_c));
  const __m512 r = _mm512_sub_ps(_mm512_add_ps(_mm512_castsi512_ps(a), c), c);
  const __m512i value = _mm512_castps_si512(_mm512_min_ps(top, r));
  if (!Integer) return _mm512_ternarylogic_epi32(value, x, l.sign, 0xf8);  // value | (x & sign)
  const __mmask16 some = _mm512_test_epi32_mask(value, value);
  return _mm512_mask_or_epi32(value, some, value, _mm512_and_epi32(x, l.sign));
}

template <bool Integer, bool Quotient = false>
MS_INLINE __m512i code16(__m512i a, __m512i x, const Lattice& l, __m512i low) {
  const __m512i e = binade16<Integer, Quotient>(a, l, low);
  const __m512i c = _mm512_add_epi32(e, l.to_c);
  const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(c));
  __m512i code = _mm512_sub_epi32(_mm512_castps_si512(sum), c);
  if (!Integer) code = _mm512_add_epi32(code, _mm512_srl_epi32(_mm512_sub_epi32(e, low), l.down));
  code = _mm512_min_epi32(code, l.largest_code);
  if (Integer) {
    const __mmask16 negative = _mm512_movepi32_mask(x);
    code = _mm512_mask_sub_epi32(code, negative, _mm512_setzero_si512(), code);
    return _mm512_and_epi32(code, l.code_mask);
  }
  return _mm512_or_epi32(code, _mm512_srl_epi32(_mm512_and_epi32(x, l.sign), l.sign_down));
}

// ---------------------------------------------------------------- stores

template <bool Stream>
MS_INLINE void put32(__m512i a, __m512i b, float* y) {
  if (Stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(y), a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(y + 16), b);
  } else {
    _mm512_storeu_si512(y, a);
    _mm512_storeu_si512(y + 16, b);
  }
}

// The upper halves of two vectors, which are bfloat16 where the lower ones are zero.
MS_INLINE __m512i upper_halves(__m512i a, __m512i b) {
  alignas(64) static const uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                               23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                               45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(odd), b);
}

template <bool Stream>
MS_INLINE void put32(__m512i a, __m512i b, uint16_t* y) {
  const __m512i halves = upper_halves(a, b);
  if (Stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(y), halves);
  } else {
    _mm512_storeu_si512(y, halves);
  }
}

// bfloat16 in the upper halves, the lower ones cleared: to_bfloat16 of 16 values.
MS_INLINE __m512i round_upper(__m512i b) {
  const auto all = [](int32_t v) { return _mm512_set1_epi32(v); };
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(b, 16), all(1));
  const __m512i rounded = _mm512_add_epi32(b, _mm512_add_epi32(odd, all(0x7fff)));
  const __m512i magnitude = _mm512_and_epi32(b, all(kMagnitude));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmpgt_epi32_mask(magnitude, all(kExponent)),
                               all(kQuietNaN));
}

// 64 values to element `at` on, which lies on a line if they go past the caches.
MS_INLINE void store64(void* y, int type, int64_t at, const __m512i* v, bool stream) {
  if (type == MS_FLOAT32) {
    float* to = static_cast<float*>(y) + at;
#pragma GCC unroll 2
    for (int k = 0; k < 4; k += 2) {
      stream ? put32<true>(v[k], v[k + 1], to + 16 * k) : put32<false>(v[k], v[k + 1], to + 16 * k);
    }
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(y) + at;
#pragma GCC unroll 2
  for (int k = 0; k < 4; k += 2) {
    __m512i halves;
    if (type == MS_BFLOAT16) {
      halves = upper_halves(round_upper(v[k]), round_upper(v[k + 1]));
    } else {
      const auto half = [](__m512i b) {
        return _mm512_cvtps_ph(_mm512_castsi512_ps(b), _MM_FROUND_TO_NEAREST_INT);
      };
      halves = _mm512_inserti64x4(_mm512_castsi256_si512(half(v[k])), half(v[k + 1]), 1);
    }
    if (stream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 16 * k), halves);
    } else {
      _mm512_storeu_si512(to + 16 * k, halves);
    }
  }
}

// Codes of 32 bits to bytes, in order.
MS_INLINE __m512i to_bytes(const __m512i* v) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packs_epi32(v[0], v[1]), high = _mm512_packs_epi32(v[2], v[3]);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

// 64 codes of Bits bits in the first 8 Bits bytes.
template <int Bits>
MS_INLINE __m512i packed64(__m512i codes) {
  if (Bits == 4) {
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(1 | 16 << 8));
    return _mm512_castsi256_si512(_mm512_cvtepi16_epi8(pairs));
  }
  if (Bits == 8) return codes;
  const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(1 | 64 << 8));
  const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(1 | 4096 << 16));
  const __m512i three = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const __m512i order =
      _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
  return _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(fours, three));
}

template <int Bits>
MS_INLINE void put_codes(__m512i codes, uint8_t* to) {
  const __m512i packed = packed64<Bits>(codes);
  if (Bits == 8) return _mm512_storeu_si512(to, packed);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(packed));
  if (Bits == 6) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32), _mm512_extracti32x4_epi32(packed, 2));
  }
}

// The first 32 of them.
template <int Bits>
MS_INLINE void put_half_of_codes(__m512i codes, uint8_t* to) {
  _mm512_mask_storeu_epi8(to, ~0ull >> (64 - 4 * Bits), packed64<Bits>(codes));
}

}  // namespace

#endif
#endif

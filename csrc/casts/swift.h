// Blocks of 32 neighbours under scales that are powers of two, rounded to even, without any other
// option: the usual MX cast, 16 blocks at a time in AVX-512. The steps are those of grid.h, scale.h
// and runs.h. A group with a block at the ends of float32's range is left to the loops there.
#ifndef MICROSCALE_SWIFT_H
#define MICROSCALE_SWIFT_H

#include "decode.h"
#include "scale.h"
#include "vectors.h"

namespace {

constexpr int kGroup = 16;               // blocks of a group
constexpr int kAhead = 2 * 32 * kGroup;  // values between what is read and what is fetched

// Of elements: the magnitudes of floats with -0, or integers.
inline bool is_swift(const ms_format& f) {
  const ms_element& e = f.element;
  return f.power_of_two && f.block == 32 && f.scale_bits == 8 && f.scale_low == -127 &&
         !f.has_tensor_scale && e.mantissa_bits <= 7 && (e.is_integer || e.has_negative_zero) &&
         (e.bits == 4 || e.bits == 6 || e.bits == 8);
}

#if defined(__AVX512BW__)

template <bool Whole, class T>
inline __m512i amax_of_group(const T* x, int n) {
  const __m512i magnitude = _mm512_set1_epi32(kMagnitude);
  __m512i v[kGroup];
#pragma GCC unroll 16
  for (int k = 0; k < kGroup; ++k) {
    v[k] = _mm512_setzero_si512();
    if (Whole || k < n) {
      const T* from = x + 32 * k;
      _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
      if (sizeof(T) == 4) {
        _mm_prefetch(reinterpret_cast<const char*>(from + kAhead + 16), _MM_HINT_T0);
      }
      v[k] = _mm512_max_epi32(_mm512_and_epi32(bits16(from), magnitude),
                              _mm512_and_epi32(bits16(from + 16), magnitude));
    }
  }
  return largest_of_sixteen(v);
}

struct GroupScales {
  alignas(64) int32_t low[kGroup];
  alignas(64) float top[kGroup];
  __m128i codes;
};

// power_scales and set_power of 16 blocks; false if one of them is not direct.
inline bool scale_group(__m512i amax, const Rule& rule, GroupScales& s) {
  const ms_format& f = rule.plan->format;
  const ms_element& e = f.element;
  const auto all = [](int32_t v) { return _mm512_set1_epi32(v); };
  const __mmask16 zero = _mm512_testn_epi32_mask(amax, amax);
  const __m512i field = _mm512_srli_epi32(amax, 23);
  const __m512i fraction = _mm512_and_epi32(amax, all(kNormal - 1));
  __m512i exponent = _mm512_sub_epi32(field, all(127 + e.emax));
  const __mmask16 bumped = _mm512_cmpge_epi32_mask(fraction, all(rule.bump));
  exponent = _mm512_mask_add_epi32(exponent, bumped, exponent, all(1));
  exponent = _mm512_min_epi32(_mm512_max_epi32(exponent, all(f.scale_low)), all(f.scale_high));
  exponent = _mm512_mask_mov_epi32(exponent, zero, all(f.scale_low));
  const __mmask16 direct = _mm512_cmpgt_epi32_mask(exponent, all(e.mantissa_bits - e.emin - 127)) &
                           _mm512_cmple_epi32_mask(field, all(least(229 + e.mantissa_bits, 254))) &
                           _mm512_cmpge_epi32_mask(amax, all(kNormal));
  const __m512i shift = _mm512_maskz_slli_epi32(static_cast<__mmask16>(~zero), exponent, 23);
  _mm512_store_si512(s.low, _mm512_add_epi32(all(rule.grid.low), shift));
  _mm512_store_si512(s.top, _mm512_add_epi32(all(bits_of(rule.grid.largest)), shift));
  s.codes = _mm512_cvtepi32_epi8(_mm512_sub_epi32(exponent, all(f.scale_low)));
  return static_cast<__mmask16>(direct | zero) == 0xffff;
}

// n blocks in values; false, with nothing written, where the general loops must do them.
template <bool Integer, bool Whole, bool Stream, class From, class To>
inline bool cast_group(const From* x, To* y, int n, const Rule& rule) {
  GroupScales s;
  if (!scale_group(amax_of_group<Whole>(x, n), rule, s)) return false;
  const Lattice l(rule.grid);
#pragma GCC unroll 2
  for (int k = 0; k < (Whole ? kGroup : n); ++k) {
    const int at = 32 * k;
    const __m512i low = _mm512_set1_epi32(s.low[k]);
    const __m512 top = _mm512_set1_ps(s.top[k]);
    const __m512i a = bits16(x + at), b = bits16(x + at + 16);
    put32<Stream>(value16<Integer>(_mm512_and_epi32(a, l.magnitude), a, l, low, top),
                  value16<Integer>(_mm512_and_epi32(b, l.magnitude), b, l, low, top), y + at);
  }
  return true;
}

// n blocks behind each other in packed codes, and their scales; false as above.
template <bool Integer, int Bits, bool Whole, class From>
inline bool quantize_group(const From* x, uint8_t* y, uint8_t* scales, int n, const Rule& rule) {
  GroupScales s;
  if (!scale_group(amax_of_group<Whole>(x, n), rule, s)) return false;
  _mm_mask_storeu_epi8(scales, static_cast<__mmask16>((1u << n) - 1), s.codes);
  const Lattice l(rule.grid);
  for (int k = 0; k < n; k += 2) {
    const bool both = Whole || k + 1 < n;
    const From* from = x + 32 * k;
    const From* second = both ? from + 32 : from;
    const __m512i low = _mm512_set1_epi32(s.low[k]), next = _mm512_set1_epi32(s.low[k + both]);
    const auto code = [&](const From* at, __m512i of) {
      const __m512i v = bits16(at);
      return code16<Integer>(_mm512_and_epi32(v, l.magnitude), v, l, of);
    };
    const __m512i v[4] = {code(from, low), code(from + 16, low), code(second, next),
                          code(second + 16, next)};
    const __m512i codes = to_bytes(v);
    uint8_t* to = y + k * 4 * Bits;
    both ? put_codes<Bits>(codes, to) : put_half_of_codes<Bits>(codes, to);
  }
  return true;
}

#endif

}  // namespace

#endif

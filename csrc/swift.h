// Blocks of 32 neighbours under scales that are powers of two, rounded to even, without any other
// option: the usual MX cast, 16 blocks at a time in AVX-512. The steps are those of grid.h, scale.h
// and runs.h. A group with a block at the ends of float32's range is left to the loops there.
#ifndef MICROSCALE_SWIFT_H
#define MICROSCALE_SWIFT_H

#include "decode.h"
#include "io.h"
#include "scale.h"
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

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

// Where the blocks of a group lie: in pairs, `pair` values apart.
inline int64_t block_at(int k, int64_t pair) { return (k >> 1) * pair + (k & 1) * 32; }

inline __m512i bits16(const float* x) { return _mm512_loadu_si512(x); }
inline __m512i bits16(const uint16_t* x) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}

// The largest of each of two sets of blocks, side by side.
inline __m512i merge_words(__m512i a, __m512i b) {
  return _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
inline __m512i merge_pairs(__m512i a, __m512i b) {
  return _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

template <bool Whole, class T>
inline __m512i amax_of_group(const T* x, int n, int64_t pair, int64_t ahead) {
  const __m512i magnitude = _mm512_set1_epi32(kMagnitude);
  __m512i v[kGroup], four[4];
#pragma GCC unroll 16
  for (int k = 0; k < kGroup; ++k) {
    v[k] = _mm512_setzero_si512();
    if (Whole || k < n) {
      const T* from = x + block_at(k, pair);
      _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T0);
      if (sizeof(T) == 4) {
        _mm_prefetch(reinterpret_cast<const char*>(from + ahead + 16), _MM_HINT_T0);
      }
      v[k] = _mm512_max_epi32(_mm512_and_epi32(bits16(from), magnitude),
                              _mm512_and_epi32(bits16(from + 16), magnitude));
    }
  }
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

// A grid in vectors.
struct Lattice {
  __m512i mask, to_c, magnitude, sign, largest_code;
  __m128i down, sign_down;

  explicit Lattice(const Grid& g)
      : mask(_mm512_set1_epi32(g.exponent_mask)),
        to_c(_mm512_set1_epi32(g.to_c)),
        magnitude(_mm512_set1_epi32(kMagnitude)),
        sign(_mm512_set1_epi32(INT32_MIN)),
        largest_code(_mm512_set1_epi32(g.largest_code)),
        down(_mm_cvtsi32_si128(23 - g.mantissa_bits)),
        sign_down(_mm_cvtsi32_si128(31 - g.sign_shift)) {}
};

template <bool Integer>
inline __m512i value16(__m512i x, const Lattice& l, __m512i low, __m512 top) {
  const __m512i a = _mm512_and_epi32(x, l.magnitude);
  const __m512i e = Integer ? low : _mm512_max_epi32(_mm512_and_epi32(a, l.mask), low);
  const __m512 c = _mm512_castsi512_ps(_mm512_add_epi32(e, l.to_c));
  const __m512 r = _mm512_sub_ps(_mm512_add_ps(_mm512_castsi512_ps(a), c), c);
  const __m512i value = _mm512_castps_si512(_mm512_min_ps(top, r));
  if (!Integer) return _mm512_ternarylogic_epi32(value, x, l.sign, 0xf8);  // value | (x & sign)
  const __mmask16 some = _mm512_test_epi32_mask(value, value);
  return _mm512_mask_or_epi32(value, some, value, _mm512_and_epi32(x, l.sign));
}

template <bool Integer>
inline __m512i code16(__m512i x, const Lattice& l, __m512i low) {
  const __m512i a = _mm512_and_epi32(x, l.magnitude);
  const __m512i e = Integer ? low : _mm512_max_epi32(_mm512_and_epi32(a, l.mask), low);
  const __m512i c = _mm512_add_epi32(e, l.to_c);
  const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(c));
  __m512i code = _mm512_sub_epi32(_mm512_castps_si512(sum), c);
  if (!Integer) code = _mm512_add_epi32(code, _mm512_srl_epi32(_mm512_sub_epi32(e, low), l.down));
  code = _mm512_min_epi32(code, l.largest_code);
  if (Integer) {
    const __mmask16 negative = _mm512_movepi32_mask(x);
    return _mm512_mask_sub_epi32(code, negative, _mm512_setzero_si512(), code);
  }
  return _mm512_or_epi32(code, _mm512_srl_epi32(_mm512_and_epi32(x, l.sign), l.sign_down));
}

template <bool Stream>
inline void put32(__m512i a, __m512i b, float* y) {
  if (Stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(y), a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(y + 16), b);
  } else {
    _mm512_storeu_si512(y, a);
    _mm512_storeu_si512(y + 16, b);
  }
}

// The upper halves of two vectors, which are bfloat16 where the lower ones are zero.
inline __m512i upper_halves(__m512i a, __m512i b) {
  alignas(64) static const uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                               23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                               45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(odd), b);
}

template <bool Stream>
inline void put32(__m512i a, __m512i b, uint16_t* y) {
  const __m512i halves = upper_halves(a, b);
  if (Stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(y), halves);
  } else {
    _mm512_storeu_si512(y, halves);
  }
}

// n blocks in values; false, with nothing written, where the general loops must do them.
template <bool Integer, bool Whole, bool Stream, class From, class To>
inline bool cast_group(const From* x, To* y, int n, int64_t pair, int64_t ahead, const Rule& rule) {
  GroupScales s;
  if (!scale_group(amax_of_group<Whole>(x, n, pair, ahead), rule, s)) return false;
  const Lattice l(rule.grid);
#pragma GCC unroll 2
  for (int k = 0; k < (Whole ? kGroup : n); ++k) {
    const int64_t at = block_at(k, pair);
    const __m512i low = _mm512_set1_epi32(s.low[k]);
    const __m512 top = _mm512_set1_ps(s.top[k]);
    put32<Stream>(value16<Integer>(bits16(x + at), l, low, top),
                  value16<Integer>(bits16(x + at + 16), l, low, top), y + at);
  }
  return true;
}

// Codes of 32 bits to bytes, in order.
inline __m512i to_bytes(const __m512i* v) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packs_epi32(v[0], v[1]), high = _mm512_packs_epi32(v[2], v[3]);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

// 64 codes of Bits bits, the first `kept` of which exist, packed.
template <int Bits>
inline void put_codes(__m512i codes, int kept, uint8_t* to) {
  const uint64_t bytes = static_cast<uint64_t>(kept * Bits / 8);
  const __mmask64 there = ~0ull >> (64 - bytes);
  if (Bits == 4) {
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(1 | 16 << 8));
    const __m256i packed = _mm512_cvtepi16_epi8(pairs);
    _mm256_mask_storeu_epi8(to, static_cast<__mmask32>(there), packed);
  } else if (Bits == 6) {
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(1 | 64 << 8));
    const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(1 | 4096 << 16));
    const __m512i three = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m512i order =
        _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
    const __m512i packed = _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(fours, three));
    _mm512_mask_storeu_epi8(to, there, packed);
  } else {
    _mm512_mask_storeu_epi8(to, there, codes);
  }
}

// n blocks behind each other in packed codes, and their scales; false as above.
template <bool Integer, int Bits, bool Whole, class From>
inline bool quantize_group(const From* x, uint8_t* y, uint8_t* scales, int n, const Rule& rule) {
  GroupScales s;
  if (!scale_group(amax_of_group<Whole>(x, n, 64, kAhead), rule, s)) return false;
  _mm_mask_storeu_epi8(scales, static_cast<__mmask16>((1u << n) - 1), s.codes);
  const Lattice l(rule.grid);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(rule.grid.mask));
  for (int k = 0; k < n; k += 2) {
    const bool both = Whole || k + 1 < n;
    const From* from = x + 32 * k;
    const From* second = both ? from + 32 : from;
    const __m512i low = _mm512_set1_epi32(s.low[k]), next = _mm512_set1_epi32(s.low[k + both]);
    __m512i v[4] = {code16<Integer>(bits16(from), l, low),
                    code16<Integer>(bits16(from + 16), l, low),
                    code16<Integer>(bits16(second), l, next),
                    code16<Integer>(bits16(second + 16), l, next)};
    if (Integer) {
      const __m512i low_byte = _mm512_set1_epi32(255);
      for (__m512i& part : v) part = _mm512_and_epi32(part, low_byte);
    }
    __m512i codes = to_bytes(v);
    if (Integer && Bits < 8) codes = _mm512_and_si512(codes, mask);
    put_codes<Bits>(codes, both ? 64 : 32, y + k * 4 * Bits);
  }
  return true;
}

// ---------------------------------------------------------------- codes to values

// Codes to bfloat16 before scaling, by tables of halves; of 8 bits only subnormals have a table.
struct Halves {
  __m512i first, second;  // the values of codes 0 to 31 and 32 to 63
  __m512i offset, largest, subnormals;
  __m128i up;
  int32_t infinite;                     // the magnitude of infinity's code, or -1
  int32_t least_scale, greatest_scale;  // scale codes under which every value is normal

  explicit Halves(const ms_element& e) : infinite(e.inf_code) {
    const Decoding d = decoding_of(e);
    alignas(64) uint16_t values[64];
    for (int c = 0; c < 64; ++c) {
      values[c] = to_bfloat16(decode_code(c & ((1 << e.bits) - 1), d));
    }
    first = _mm512_load_si512(values);
    second = _mm512_load_si512(values + 32);
    offset = _mm512_set1_epi16(static_cast<int16_t>((e.emin + 126) << 7));
    largest = _mm512_set1_epi16(static_cast<int16_t>(e.largest_code));
    subnormals = _mm512_set1_epi16(static_cast<int16_t>(1 << e.mantissa_bits));
    up = _mm_cvtsi32_si128(7 - e.mantissa_bits);
    least_scale = 1 + e.mantissa_bits - e.emin;
    // The most negative code of an integer reaches the next binade.
    greatest_scale = least(254, 254 - e.emax - (e.is_integer ? 1 : 0));
  }
};

inline bool decodes_swiftly(const ms_format& f) {
  const ms_element& e = f.element;
  const bool special = e.largest_code < (1 << (e.bits - 1)) - 1;
  const bool narrow = e.bits < 8 && !special;
  const bool wide = e.bits == 8 && !e.is_integer && e.mantissa_bits <= 5;
  return is_swift(f) && (narrow || wide || (e.bits == 8 && e.is_integer && e.mantissa_bits == 6));
}

template <int Bits>
inline __m256i codes32(const uint8_t* from) {
  if (Bits == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if (Bits == 4) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i wide = _mm256_cvtepu8_epi16(bytes);
    const __m256i both = _mm256_or_si256(wide, _mm256_slli_epi16(wide, 4));
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
  }
  const __m256i bytes = _mm256_maskz_loadu_epi8(0xffffff, from);
  const __m256i halves =
      _mm256_permutexvar_epi32(_mm256_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5), bytes);
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
  const __m256i v = _mm256_shuffle_epi8(halves, order);
  const auto part = [&](int left) {
    return _mm256_and_si256(_mm256_slli_epi32(v, left), _mm256_set1_epi32(63 << (4 * left)));
  };
  return _mm256_or_si256(_mm256_or_si256(part(0), part(2)), _mm256_or_si256(part(4), part(6)));
}

// 32 values under the scale code `scale`, as bfloat16.
template <int Bits, bool Integer>
inline __m512i halves32(const uint8_t* from, const Halves& h, int scale) {
  const __m256i codes = codes32<Bits>(from);
  const __m512i by = _mm512_set1_epi16(static_cast<int16_t>((scale - 127) * 128));
  if (Bits == 8 && Integer) {
    const __m512 unit = _mm512_set1_ps(float_of((scale - 6) << 23));
    const auto sixteen = [&](__m128i c) {
      const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(c));
      return _mm512_castps_si512(_mm512_mul_ps(value, unit));
    };
    return upper_halves(sixteen(_mm256_castsi256_si128(codes)),
                        sixteen(_mm256_extracti128_si256(codes, 1)));
  }
  const __m512i wide = _mm512_cvtepu8_epi16(codes);
  if (Bits < 8) {
    const __m512i value = Bits == 4 ? _mm512_permutexvar_epi16(wide, h.first)
                                    : _mm512_permutex2var_epi16(h.first, wide, h.second);
    const __mmask32 some = _mm512_test_epi16_mask(value, _mm512_set1_epi16(0x7fff));
    return _mm512_mask_add_epi16(value, some, value, by);
  }
  const __m512i magnitude = _mm512_and_si512(wide, _mm512_set1_epi16(127));
  const __mmask32 low = _mm512_cmplt_epi16_mask(magnitude, h.subnormals);
  const __mmask32 special = _mm512_cmpgt_epi16_mask(magnitude, h.largest);
  __m512i value = _mm512_add_epi16(_mm512_sll_epi16(magnitude, h.up), h.offset);
  value = _mm512_mask_permutexvar_epi16(value, low, magnitude, h.first);
  const __mmask32 scaled = _mm512_test_epi16_mask(magnitude, magnitude);
  value = _mm512_mask_add_epi16(value, scaled, value, by);
  if (special) {
    alignas(64) uint16_t words[32], magnitudes[32];
    _mm512_store_si512(words, value);
    _mm512_store_si512(magnitudes, magnitude);
    for (int i = 0; i < 32; ++i) {
      if (special >> i & 1) words[i] = magnitudes[i] == h.infinite ? 0x7f80 : 0x7fc0;
    }
    value = _mm512_load_si512(words);
  }
  const __m512i sign = _mm512_slli_epi16(wide, 8);
  return _mm512_ternarylogic_epi32(value, sign, _mm512_set1_epi16(INT16_MIN), 0xf8);
}

template <bool Stream>
inline void put_halves(__m512i halves, uint16_t* y) {
  if (Stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(y), halves);
  } else {
    _mm512_storeu_si512(y, halves);
  }
}

template <bool Stream>
inline void put_halves(__m512i halves, float* y) {
  const auto wide = [](__m256i h) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); };
  put32<Stream>(wide(_mm512_castsi512_si256(halves)), wide(_mm512_extracti64x4_epi64(halves, 1)),
                y);
}

// n blocks behind each other; false, with nothing written, where the general loops must do them.
template <int Bits, bool Integer, bool Stream, class To>
inline bool decode_blocks(const uint8_t* from, const uint8_t* scales, int n, const Halves& h,
                          To* y) {
  int32_t out = 0;
  for (int k = 0; k < n; ++k) out |= scales[k] < h.least_scale || scales[k] > h.greatest_scale;
  if (out) return false;
  for (int k = 0; k < n; ++k) {
    const uint8_t* block = from + k * 4 * Bits;
    _mm_prefetch(reinterpret_cast<const char*>(block + 1024), _MM_HINT_T0);
    put_halves<Stream>(halves32<Bits, Integer>(block, h, scales[k]), y + 32 * k);
  }
  return true;
}

#endif

}  // namespace

#endif

// Codes to values by tables and arithmetic in vectors: 32 codes at a time in AVX-512.
#ifndef MICROSCALE_SWIFT_DECODE_H
#define MICROSCALE_SWIFT_DECODE_H

#include "decode.h"
#include "job.h"
#include "swift.h"

#if defined(__AVX512BW__)

namespace {

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

// Whether elements have tables: magnitudes with -0, or integers.
inline bool has_halves(const ms_element& e) {
  const bool special = e.largest_code < (1 << (e.bits - 1)) - 1;
  const bool narrow = (e.bits == 4 || e.bits == 6) && e.mantissa_bits <= 7 && !special;
  const bool wide = e.bits == 8 && !e.is_integer && e.mantissa_bits <= 5;
  return (e.is_integer || e.has_negative_zero) &&
         (narrow || wide || (e.bits == 8 && e.is_integer && e.mantissa_bits == 6));
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

// n values, a multiple of 64, of a row from element `at` on, under scales of every kind.
template <int Bits, bool Integer>
inline void decode_scaled(const Job& job, const Decoder& d, const Halves& h, const Place& p,
                          int64_t at, int n) {
  const uint8_t* from = static_cast<const uint8_t*>(job.x) + p.x + at * Bits / 8;
  const int64_t to = p.y + at, block = job.block ? job.block : job.geometry.length;
  const __m512 outer = _mm512_set1_ps(d.decoding.outer);
  const bool stream = job.streamed && is_on_line(job, to);
  const auto wide = [](__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  };
  for (int i = 0; i < n; i += 64) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k += 2) {
      const __m512i halves = halves32<Bits, Integer>(from + (i + 16 * k) * Bits / 8, h, 127);
      const __m512 parts[2] = {wide(_mm512_castsi512_si256(halves)),
                               wide(_mm512_extracti64x4_epi64(halves, 1))};
      for (int j = 0; j < 2; ++j) {
        const int64_t number = (at + i + 16 * (k + j)) / block;
        const float scale = scale_at(d, job.scales, p.scale + number * job.geometry.scale_axis);
        const __m512 value = _mm512_mul_ps(parts[j], _mm512_set1_ps(scale));
        v[k + j] = _mm512_castps_si512(_mm512_mul_ps(value, outer));
      }
    }
    store64(job.y, job.y_type, to + i, v, stream);
  }
  if (stream) _mm_sfence();
}

}  // namespace

#endif
#endif

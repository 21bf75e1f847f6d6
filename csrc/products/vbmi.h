// Decoding with AVX-512 VBMI: 64 codes at a time, every element format of 4, 6 or 8 bits by table.
//
// Codes become bytes in order (one multishift; 6-bit codes one byte permutation more). A bfloat16
// holds every element exactly, so two byte look-ups give its high and low byte, and two unpacks
// join them. Unpacks work within 128 bits, so the 64 values come out as
//     first:  0-7, 16-23, 32-39, 48-55      second: 8-15, 24-31, 40-47, 56-63
// and 32-bit lane l of either belongs to the values 16 (l / 4) ..: to one block of 16 or more. The
// other factor is brought into the same order once (`prepare`), or the values into the plain order.
// About 5 operations for 64 values of 8 bits, 6 for 4 bits; memory gives 64 bytes in the same time.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "tables.h"

namespace {

constexpr int CHUNK = 64;

// How codes select from tables: 6-bit look-up; 7 bits and a sign; all 8 bits.
enum class Look { SIX, SIGNED, EIGHT };

struct Halves {
  __m512i first, second;
};

inline __m512i table_of(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }

// 64 codes from packed memory. `bytes` limits what is read of a row's last chunk.
template <int BITS>
inline __m512i load_codes(const uint8_t* p, __mmask64 bytes) {
  if constexpr (BITS == 8) {
    return _mm512_maskz_loadu_epi8(bytes, p);
  } else if constexpr (BITS == 6) {
    const __m512i raw = _mm512_maskz_loadu_epi8(bytes & 0xffffffffffffull, p);
    const __m512i spread = _mm512_permutexvar_epi8(
      _mm512_set_epi8(47, 47, 47, 46, 45, 44, 43, 42, 41, 41, 41, 40, 39, 38, 37, 36, 35, 35,
              35, 34, 33, 32, 31, 30, 29, 29, 29, 28, 27, 26, 25, 24, 23, 23, 23, 22,
              21, 20, 19, 18, 17, 17, 17, 16, 15, 14, 13, 12, 11, 11, 11, 10, 9, 8, 7,
              6, 5, 5, 5, 4, 3, 2, 1, 0),
      raw);
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2a241e18120c0600), spread);
  } else {
    const __m256i raw = _mm256_maskz_loadu_epi8(__mmask32(bytes), p);
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x1c1814100c080400),
                      _mm512_cvtepu32_epi64(raw));
  }
}

template <int BITS>
inline const uint8_t* chunk_at(const uint8_t* row, int64_t chunk) {
  return row + chunk * (CHUNK / 8 * BITS);
}

// One byte of the result for every code. Garbage above a narrow code does not matter: its table
// repeats.
template <Look LOOK>
struct ByteTable {
  __m512i parts[LOOK == Look::EIGHT ? 4 : LOOK == Look::SIGNED ? 2 : 1];

  void fill(const uint8_t (&bytes)[256]) {
    int i = 0;
    for (__m512i& part : parts) part = table_of(bytes + 64 * i++);
  }

  __m512i operator()(__m512i codes) const {
    if constexpr (LOOK == Look::SIX) {
      return _mm512_permutexvar_epi8(codes, parts[0]);
    } else if constexpr (LOOK == Look::SIGNED) {
      return _mm512_permutex2var_epi8(parts[0], codes, parts[1]);
    } else {
      const __m512i low = _mm512_permutex2var_epi8(parts[0], codes, parts[1]);
      const __m512i high = _mm512_permutex2var_epi8(parts[2], codes, parts[3]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
    }
  }
};

// Codes to bfloat16.
template <Look LOOK>
struct Decoder {
  ByteTable<LOOK> high, low;

  Decoder(const float* values, int bits) {
    uint8_t bytes[2][256];
    for (int c = 0; c < 256; ++c) {
      const uint16_t value = to_bfloat16(values[c & ((1 << bits) - 1)]);
      bytes[0][c] = uint8_t(value);
      bytes[1][c] = uint8_t(value >> 8);
    }
    low.fill(bytes[0]);
    high.fill(bytes[1]);
  }

  // Codes outside `kept` become zeros: what lies behind a row's end.
  Halves operator()(__m512i codes, __mmask64 kept) const {
    __m512i upper = high(codes);
    if constexpr (LOOK == Look::SIGNED) {
      // upper | (codes & 0x80)
      upper = _mm512_ternarylogic_epi32(upper, codes, _mm512_set1_epi8(-128), 0xf8);
    }
    upper = _mm512_maskz_mov_epi8(kept, upper);
    const __m512i lower = _mm512_maskz_mov_epi8(kept, low(codes));
    return {_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
  }

  Halves operator()(__m512i codes) const {
    __m512i upper = high(codes);
    if constexpr (LOOK == Look::SIGNED) {
      upper = _mm512_ternarylogic_epi32(upper, codes, _mm512_set1_epi8(-128), 0xf8);
    }
    const __m512i lower = low(codes);
    return {_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
  }
};

// bfloat16 to float32: values 0, 2, 4 .. and 1, 3, 5 ..
inline __m512 even_values(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
inline __m512 odd_values(__m512i v) {
  return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))));
}

// Whether the value of code c | 0x80 is minus that of c, NaN being NaN.
inline bool is_sign_symmetric(const ms_packed& w) {
  for (int c = 0; c < 128; ++c) {
    const float a = w.values[c], b = w.values[c + 128];
    if (!(std::isnan(a) && std::isnan(b)) && bits_of(b) != (bits_of(a) ^ 0x80000000u))
      return false;
  }
  return true;
}

inline Look look_of(const ms_packed& w) {
  if (w.bits < 8) return Look::SIX;
  return is_sign_symmetric(w) ? Look::SIGNED : Look::EIGHT;
}

// Bytes of row chunk `chunk` that hold codes, and the codes among the 64 that exist.
inline __mmask64 low_bits(int64_t n) { return n >= 64 ? ~0ull : (1ull << (n < 0 ? 0 : n)) - 1; }

// The scales of a chunk, one for each 32-bit lane of `Halves`.
struct ScaleSpread {
  __m512i lanes;
  int64_t per_chunk;   // scales a chunk advances by, or 0
  int32_t chunks_per;  // chunks that share a scale

  explicit ScaleSpread(int64_t block) {
    const int per = block == 16 ? 4 : block == 32 ? 8 : 16;
    alignas(64) int32_t index[16];
    for (int l = 0; l < 16; ++l) index[l] = l / per;
    lanes = _mm512_load_si512(index);
    per_chunk = block == 16 ? 4 : block == 32 ? 2 : 0;
    chunks_per = block == 0 ? INT32_MAX : int32_t(block / CHUNK);
  }

  int64_t offset(int64_t chunk) const {
    return per_chunk ? chunk * per_chunk : int32_t(chunk) / chunks_per;  // 32 bits divide faster
  }

  // Reads 16 bytes.
  __m512 operator()(const float* scales) const {
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(scales));
    return _mm512_permutexvar_ps(lanes, four);
  }
};

// Room for a row's scales, with zeros behind them: a chunk may reach beyond the last.
inline int64_t scale_room(const ms_packed& w) { return blocks_of(w) / 32 * 32 + 64; }

// `Halves` in the order of the codes: the first and the last 32 of 64.
inline Halves in_order(const Halves& h) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  return {_mm512_permutex2var_epi64(h.first, low, h.second),
      _mm512_permutex2var_epi64(h.first, high, h.second)};
}

// Reads the scales of rows as float32.
class ScaleReader {
  public:
  explicit ScaleReader(const ms_packed& w, bool tiny_x = false)
    : w_(w), safe_(w, tiny_x), codes_(w.scale_kind == MS_SCALE_TABLE ? w.scale_values : zeros(),
                                          w.scale_kind == MS_SCALE_TABLE ? 8 : 1) {}

  // False if a scale is NaN or outside the safe range. Writes scale_room(w) values.
  bool operator()(int64_t row, float* out) const {
    const int64_t n = blocks_of(w_);
    fill(row, 0, n, scale_room(w_), out);
    const __m512 low = _mm512_set1_ps(safe_.low), high = _mm512_set1_ps(safe_.high);
    const __mmask16 zeros_fit = safe_.holds(0) ? 0xffff : 0;
    __mmask16 bad = 0;
    for (int64_t i = 0; i < n; i += 16) {
      const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(out + i));
      const __mmask16 fits = _mm512_cmp_ps_mask(size, low, _CMP_GE_OQ) &
                                   _mm512_cmp_ps_mask(size, high, _CMP_LE_OQ);
      bad |= ~(fits | (zeros_fit & _mm512_cmp_ps_mask(size, _mm512_setzero_ps(), _CMP_EQ_OQ)));
    }
    return bad == 0;
  }

  // The scales of `count` values from k, a multiple of 64; writes count / 16 + 64 at most.
  void part(int64_t row, int64_t k, int64_t count, float* out) const {
    const int64_t first = w_.block ? k / w_.block : 0;
    const int64_t wanted = w_.block ? ceil_blocks(count) : 1;
    const int64_t n = std::clamp<int64_t>(blocks_of(w_) - first, 0, wanted);
    fill(row, first, n, n / 32 * 32 + 32, out);
  }

  private:
  const ms_packed& w_;
  SafeScales safe_;
  Decoder<Look::EIGHT> codes_;

  static const float* zeros() {
    static const float two[2] = {};
    return two;
  }

  int64_t ceil_blocks(int64_t values) const { return values / w_.block + 1; }

  // n scales from `first`, then zeros up to `room`, a multiple of 32.
  void fill(int64_t row, int64_t first, int64_t n, int64_t room, float* out) const {
    const int64_t start = row * w_.scale_stride + first;
    const uint8_t* bytes = static_cast<const uint8_t*>(w_.scales) + start;
    if (w_.scale_kind == MS_SCALE_E8M0) {
      for (int64_t i = 0; i < room; i += 16) {
        const __mmask16 kept = __mmask16(low_bits(n - i));
        const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(kept, bytes + i));
        // 2^-127, code 0, is subnormal; 255 is NaN.
        __m512i s = _mm512_max_epi32(_mm512_slli_epi32(code, 23),
                                             _mm512_set1_epi32(0x00400000));
        s = _mm512_mask_mov_epi32(
          s, _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255)),
          _mm512_set1_epi32(0x7fc00000));
        _mm512_storeu_si512(out + i, _mm512_maskz_mov_epi32(kept, s));
      }
    } else if (w_.scale_kind == MS_SCALE_TABLE) {
      for (int64_t i = 0; i < room; i += 32) {
        const __mmask64 kept = low_bits(n - i) & 0xffffffffu;
        const Halves h = in_order(codes_(_mm512_maskz_loadu_epi8(kept, bytes + i), kept));
        const __m256i parts[2] = {_mm512_castsi512_si256(h.first),
                                          _mm512_extracti64x4_epi64(h.first, 1)};
        for (int j = 0; j < 2; ++j)
          _mm512_storeu_si512(out + i + 16 * j,
                    _mm512_slli_epi32(_mm512_cvtepu16_epi32(parts[j]), 16));
      }
    } else {
      for (int64_t i = 0; i < room; ++i) out[i] = i < n ? scale_at(w_, row, first + i) : 0.0f;
    }
  }
};

}  // namespace

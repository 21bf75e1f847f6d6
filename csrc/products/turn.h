// Turning 16 by 16 32-bit values with AVX-512.
#pragma once

#include <immintrin.h>

namespace {

inline void turn16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[j + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// 16 rows (`count` of them real) of `length` 32-bit values, turned: [length][16].
inline void turn_rows(const void* from, int64_t stride_bytes, int64_t count, int64_t length_bytes,
                      void* to, int64_t columns) {
  const char* p = static_cast<const char*>(from);
  for (int64_t k = 0; k < columns; k += 16) {
    const int64_t left = length_bytes - k * 4;
    const __mmask64 kept = left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1;
    __m512i r[16];
    for (int i = 0; i < 16; ++i)
      r[i] = _mm512_maskz_loadu_epi8(i < count ? kept : 0, p + i * stride_bytes + k * 4);
    turn16(r);
    for (int i = 0; i < 16; ++i)
      _mm512_store_si512(static_cast<char*>(to) + (k + i) * 64, r[i]);
  }
}

inline void turn_floats(const float* from, int64_t stride, float (&to)[16][16]) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
  turn16(r);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to[i], r[i]);
}

}  // namespace

// Values in and out of float32 buffers: three types, any stride.
#ifndef MICROSCALE_IO_H
#define MICROSCALE_IO_H

#include <string.h>

#include "bits.h"
#include "../format.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

inline int64_t size_of(int type) { return type == MS_FLOAT32 ? 4 : 2; }

inline float from_bfloat16(uint16_t h) {
  return float_of(static_cast<int32_t>(static_cast<uint32_t>(h) << 16));
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t b = static_cast<uint32_t>(bits_of(x));
  const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((b & kMagnitude) > static_cast<uint32_t>(kExponent)
                                   ? (b >> 16 & 0x8000) | 0x7fc0
                                   : rounded);
}

#if defined(__F16C__)

inline float from_float16(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t to_float16(float x) {
  return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
}

#else

inline float from_float16(uint16_t h) {
  const int32_t magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
  // Adding the exponent of 2^-14 and taking it away again makes subnormals normal.
  const float subnormal = float_of(magnitude + (113 << 23)) - float_of(113 << 23);
  const int32_t rebias = (h & 0x7c00) == 0x7c00 ? 224 << 23 : 112 << 23;
  const float normal = float_of(magnitude + rebias);
  const float value = (h & 0x7c00) == 0 ? subnormal : normal;
  return float_of(bits_of(value) | sign);
}

inline uint16_t to_float16(float x) {
  const int32_t sign = bits_of(x) & ~kMagnitude, a = bits_of(x) ^ sign;
  const int32_t half = static_cast<int32_t>(static_cast<uint32_t>(sign) >> 16);
  if (a > kExponent) return static_cast<uint16_t>(half | 0x7e00);
  if (a >= 0x47800000) return static_cast<uint16_t>(half | 0x7c00);  // 65536 and more
  // As in grid.h: adding C leaves the significand, rounded, in the last bits.
  const int32_t e = most(a & kExponent, 113 << 23), c = e + (13 << 23);
  const int32_t steps = bits_of(float_of(a) + float_of(c)) - c + ((e - (113 << 23)) >> 13);
  return static_cast<uint16_t>(half | steps);
}

#endif

template <class T, class Load>
inline void gather(const T* from, int64_t stride, int n, float* to, Load load) {
  if (stride == 1) {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) to[i] = load(from[i]);
  } else {
    for (int i = 0; i < n; ++i) to[i] = load(from[i * stride]);
  }
}

template <class T, class Store>
inline void scatter(const float* from, int n, T* to, int64_t stride, Store store) {
  if (stride == 1) {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) to[i] = store(from[i]);
  } else {
    for (int i = 0; i < n; ++i) to[i * stride] = store(from[i]);
  }
}

#if defined(__AVX512F__)

inline int half_to_float(const uint16_t* from, int n, float* to) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(h));
  }
  return i;
}

inline int float_to_half(const float* from, int n, uint16_t* to) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i h = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), h);
  }
  return i;
}

#elif defined(__F16C__)

inline int half_to_float(const uint16_t* from, int n, float* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(h));
  }
  return i;
}

inline int float_to_half(const float* from, int n, uint16_t* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), h);
  }
  return i;
}

#else

inline int half_to_float(const uint16_t*, int, float*) { return 0; }
inline int float_to_half(const float*, int, uint16_t*) { return 0; }

#endif

// n values of `type`, `stride` apart from element `at`, as float32: in place, or in `buffer`.
inline const float* load(const void* x, int type, int64_t at, int64_t stride, int n,
                         float* buffer) {
  if (type == MS_FLOAT32) {
    const float* from = static_cast<const float*>(x) + at;
    if (stride == 1) return from;
    gather(from, stride, n, buffer, [](float v) { return v; });
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x) + at;
    if (type == MS_BFLOAT16) {
      gather(from, stride, n, buffer, from_bfloat16);
    } else {
      const int done = stride == 1 ? half_to_float(from, n, buffer) : 0;
      gather(from + done * stride, stride, n - done, buffer + done, from_float16);
    }
  }
  return buffer;
}

// Where n values may be written at once: the output itself, or `buffer`, which `store` then takes.
inline float* room(void* y, int type, int64_t at, int64_t stride, float* buffer) {
  return type == MS_FLOAT32 && stride == 1 ? static_cast<float*>(y) + at : buffer;
}

inline void store(const float* values, void* y, int type, int64_t at, int64_t stride, int n) {
  if (type == MS_FLOAT32) {
    float* to = static_cast<float*>(y) + at;
    if (to != values) scatter(values, n, to, stride, [](float v) { return v; });
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(y) + at;
  if (type == MS_BFLOAT16) return scatter(values, n, to, stride, to_bfloat16);
  const int done = stride == 1 ? float_to_half(values, n, to) : 0;
  scatter(values + done, n - done, to + done * stride, stride, to_float16);
}

}  // namespace

#endif

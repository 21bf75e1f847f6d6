// What the kernels derive from a packed matrix's numbers. Anonymous: compiled per instruction set.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "packed.h"

namespace {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float from_bfloat16(uint16_t u) { return from_bits(uint32_t(u) << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

inline float load(const void* data, int32_t type, int64_t i) {
  if (type == MS_BFLOAT16) return from_bfloat16(static_cast<const uint16_t*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

inline void store(void* data, int32_t type, int64_t i, float value) {
  if (type == MS_BFLOAT16) static_cast<uint16_t*>(data)[i] = to_bfloat16(value);
  else static_cast<float*>(data)[i] = value;
}

// The closed range of scales with which every finite value of the element, scaled (also by the
// tensor's scale), is a normal number of float32, so that scaling may as well follow the sum.
//
// With x below 2^-100 its products with elements lose bits to underflow, at most 2^-150 each; a
// scale beyond 2^20 would bring that back into sight.
struct SafeScales {
  float low, high;

  explicit SafeScales(const ms_packed& w, bool tiny_x = false) {
    double least = FLT_MAX, most = FLT_MIN;
    for (int c = 0; c < 1 << w.bits; ++c) {
      const double v = std::fabs(double(w.values[c]));
      if (!(v > 0) || v > FLT_MAX) continue;
      least = std::fmin(least, v);
      most = std::fmax(most, v);
    }
    const double outer = std::fabs(double(w.tensor_scale));
    const bool usual = outer >= 0x1p-120 && outer <= 0x1p120;
    const double down = std::fmin(outer, 1), up = std::fmax(outer, 1);
    low = usual ? float(std::fmax(FLT_MIN / (least * down), double(FLT_MIN))) : HUGE_VALF;
    high = usual ? float(std::fmin(0x1.fep127 / (most * up), 0x1.fep127)) : 0;
    if (tiny_x) high = std::fmin(high, 0x1p20f);
  }

  bool holds(float scale) const {
    const float s = std::fabs(scale);
    return s == 0 ? low < HUGE_VALF : s >= low && s <= high;
  }
};

inline int64_t blocks_of(const ms_packed& w) {
  return w.block ? (w.length + w.block - 1) / w.block : 1;
}

// The value of an 8-bit scale.
inline float scale_of_code(const ms_packed& w, uint32_t code) {
  if (w.scale_kind == MS_SCALE_TABLE) return w.scale_values[code];
  if (code == 255) return NAN;
  return from_bits(code ? code << 23 : 0x00400000u);  // 2^-127 is subnormal
}

inline bool has_scale_codes(const ms_packed& w) {
  return w.scale_kind == MS_SCALE_E8M0 || w.scale_kind == MS_SCALE_TABLE;
}

inline float scale_at(const ms_packed& w, int64_t row, int64_t block) {
  const int64_t i = row * w.scale_stride + block;
  if (has_scale_codes(w)) return scale_of_code(w, static_cast<const uint8_t*>(w.scales)[i]);
  if (w.scale_kind == MS_SCALE_BF16)
    return from_bfloat16(static_cast<const uint16_t*>(w.scales)[i]);
  return static_cast<const float*>(w.scales)[i];
}

inline int code_at(const ms_packed& w, int64_t row, int64_t k) {
  const uint8_t* p = w.codes + row * w.row_bytes;
  if (w.bits == 8) return p[k];
  const int64_t bit = k * w.bits;
  const int shift = int(bit & 7);
  int word = p[bit >> 3] >> shift;
  if (shift + w.bits > 8) word |= p[(bit >> 3) + 1] << (8 - shift);
  return word & ((1 << w.bits) - 1);
}

// The decoded value, rounded as `dequantize` rounds it.
inline float value_at(const ms_packed& w, int64_t row, int64_t k) {
  const float scaled = w.values[code_at(w, row, k)] * scale_at(w, row, w.block ? k / w.block : 0);
  return scaled * w.tensor_scale;
}

}  // namespace

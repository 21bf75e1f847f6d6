// Codes to values.
#ifndef MICROSCALE_DECODE_H
#define MICROSCALE_DECODE_H

#include "grid.h"

namespace {

struct Decoding {
  Grid grid;
  float smallest_normal, step;  // step: the value of an integer's code 1
  int32_t nan_code;             // fnuz: the code of -0; else none
  bool has_outer;
  float outer;
};

struct Decoder {
  Decoding decoding;
  int scale_bits;
  float scales[256];  // the values of scale codes of 8 bits
};

// The value of one code. Subnormals are normals of the lowest binade without its first value.
inline float decode_code(int32_t code, const Decoding& d) {
  const Grid& g = d.grid;
  if (g.is_integer) {
    const int unused = 31 - g.sign_shift;
    const int32_t k = static_cast<int32_t>(static_cast<uint32_t>(code) << unused) >> unused;
    return static_cast<float>(k) * d.step;
  }
  const int32_t sign_bit = 1 << g.sign_shift, magnitude = code & (sign_bit - 1);
  const int32_t sign = static_cast<int32_t>(static_cast<uint32_t>(code & sign_bit)
                                           << (31 - g.sign_shift));
  const int32_t shifted = magnitude << (23 - g.mantissa_bits);
  const float subnormal = float_of(shifted + g.low) - d.smallest_normal;
  float value = shifted < kNormal ? subnormal : float_of(shifted + g.low - kNormal);
  const float special = float_of(magnitude == g.inf_code ? kExponent : kQuietNaN);
  value = magnitude > g.largest_code ? special : value;
  value = code == d.nan_code ? float_of(kQuietNaN) : value;
  return float_of(bits_of(value) | sign);
}

inline Decoding decoding_of(const ms_element& e) {
  Decoding d{};
  d.grid = grid_of(e);
  d.smallest_normal = float_of(d.grid.low);
  d.step = float_of((127 - e.mantissa_bits) << 23);
  d.nan_code = e.is_integer || e.has_negative_zero ? -1 : e.nan_code;
  d.outer = 1.0f;
  return d;
}

inline Decoder decoder_of(const ms_format& f, const float* tensor_scale) {
  Decoder d{};
  d.decoding = decoding_of(f.element);
  d.decoding.has_outer = f.has_tensor_scale;
  if (f.has_tensor_scale) d.decoding.outer = *tensor_scale;
  d.scale_bits = f.scale_bits;
  if (f.scale_bits != 8) return d;
  const Decoding grid = decoding_of(f.power_of_two ? f.element : f.grid);
  for (int code = 0; code < 256; ++code) {
    if (f.power_of_two) {
      const int32_t exponent = least(most(code + f.scale_low, -127), 127);
      d.scales[code] = code == 255 ? float_of(kQuietNaN) : power_of_two(exponent);
    } else {
      d.scales[code] = decode_code(code, grid);
    }
  }
  return d;
}

inline float scale_at(const Decoder& d, const void* scales, int64_t at) {
  if (d.scale_bits == 8) return d.scales[static_cast<const uint8_t*>(scales)[at]];
  if (d.scale_bits == 32) return static_cast<const float*>(scales)[at];
  const uint16_t half = static_cast<const uint16_t*>(scales)[at];
  return float_of(static_cast<int32_t>(static_cast<uint32_t>(half) << 16));
}

// n codes to values, with one scale or (Lanes) a scale for each.
template <bool Lanes>
inline void decode(const Decoder& from, const uint8_t* codes, int n, const float* scale,
                   float* out) {
  const Decoding d = from.decoding;
  const float one = scale[0];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const float value = decode_code(codes[i], d) * (Lanes ? scale[i] : one);
    out[i] = d.has_outer ? value * d.outer : value;
  }
}

}  // namespace

#endif

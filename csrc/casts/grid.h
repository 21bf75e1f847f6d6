// Rounding of magnitudes to an element's grid, in float32, exactly.
//
// A float whose last place is the grid's spacing is C = 2^(23-m) x 2^e, where e is the exponent of
// the magnitude, at least that of the smallest normal: (a + C) - C rounds a to nearest, ties to
// even. The other roundings correct this by one spacing. e, C and the bounds are held as bits.
// No division, no logarithm; subnormals, normals and carries take one path.
#ifndef MICROSCALE_GRID_H
#define MICROSCALE_GRID_H

#include "bits.h"
#include "../format.h"

namespace {

struct Grid {
  int32_t exponent_mask;  // 0 for integers, whose spacing is the same everywhere
  int32_t low, high;      // exponents of the smallest normal and of the largest, as bits
  int32_t to_c;           // (23 - m) << 23, from e to C
  int32_t mantissa_bits;
  float largest;
  int32_t largest_code, sign_shift, mask;  // of codes
  int32_t nan_code, inf_code;              // nan_code is 0 where NaN has none
  int32_t zero_sign;                       // all ones where -0 exists; else -0 becomes +0
  bool is_integer, has_inf, has_nan;
};

inline Grid grid_of(const ms_element& e) {
  Grid g{};
  g.exponent_mask = e.is_integer ? 0 : kExponent;
  g.low = (e.emin + 127) << 23;
  g.high = (e.is_integer ? e.emin : e.emax) + 127;
  g.high <<= 23;
  g.mantissa_bits = e.mantissa_bits;
  g.to_c = (23 - e.mantissa_bits) << 23;
  g.largest = static_cast<float>(e.largest);
  g.largest_code = e.largest_code;
  g.sign_shift = e.bits - 1;
  g.mask = (1 << e.bits) - 1;
  g.nan_code = e.nan_code < 0 ? 0 : e.nan_code;
  g.inf_code = e.inf_code;
  g.is_integer = e.is_integer;
  g.zero_sign = e.has_negative_zero ? -1 : 0;
  g.has_inf = e.inf_code >= 0;
  g.has_nan = e.nan_code >= 0;
  return g;
}

// Exponent bits of the binade that decides the spacing at magnitude bits a.
inline int32_t binade(int32_t a, int32_t low, const Grid& g) {
  return most(a & g.exponent_mask, low);
}

// The magnitude a rounded to the spacing of binade e; `word` are 32 random bits.
template <ms_rounding R>
inline float round_at(float a, int32_t e, const Grid& g, uint32_t word) {
  const float c = float_of(e + g.to_c);
  const float nearest = (a + c) - c;
  if (R == MS_EVEN) return nearest;
  const int32_t space = e - (g.mantissa_bits << 23);
  const float spacing = float_of(space);
  const float whole = nearest > a ? nearest - spacing : nearest;  // towards zero
  if (R == MS_ZERO) return whole;
  const float rest = a - whole;
  if (R == MS_AWAY) return rest >= 0.5f * spacing ? whole + spacing : whole;
  // The fraction is exact, so is its product with 2^32 but for the truncation, which is meant.
  const float fraction = rest * float_of((254 << 23) - space);
  const float inside = fraction < 1.0f ? fraction : 0.0f;  // NaN and infinity: nothing to draw
  const uint32_t chance = static_cast<uint32_t>(inside * 4294967296.0f);
  return word < chance ? whole + spacing : whole;
}

// The magnitude part of the code of r, which lies on the grid in binade e: grid steps from zero.
inline int32_t steps(float r, int32_t e, int32_t low, const Grid& g) {
  const float c = float_of(e + g.to_c);
  return (bits_of(r + c) - bits_of(c)) + ((e - low) >> (23 - g.mantissa_bits));
}

inline int32_t with_sign(int32_t code, int32_t sign, const Grid& g) {
  if (g.is_integer) return (sign < 0 ? -code : code) & g.mask;
  const int32_t bit = static_cast<int32_t>(static_cast<uint32_t>(sign) >> (31 - g.sign_shift));
  return code | (code == 0 ? bit & g.zero_sign : bit);
}

inline float signed_value(float r, int32_t sign, const Grid& g) {
  const int32_t kept = r == 0.0f ? sign & g.zero_sign : sign;
  return float_of(bits_of(r) | kept);
}

}  // namespace

#endif

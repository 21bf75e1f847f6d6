// Floats as bits, and the steps that every kernel shares. Compiled once for each instruction set:
// everything lies in an anonymous namespace, so that no two of them share a symbol.
#ifndef MICROSCALE_BITS_H
#define MICROSCALE_BITS_H

#include <stdint.h>

namespace {

constexpr int32_t kExponent = 0x7f800000;   // the exponent field of float32; infinity's bits
constexpr int32_t kMagnitude = 0x7fffffff;  // all but the sign
constexpr int32_t kNormal = 0x00800000;     // the bits of 2^-126
constexpr int32_t kQuietNaN = 0x7fc00000;

inline int32_t bits_of(float x) { return __builtin_bit_cast(int32_t, x); }
inline float float_of(int32_t bits) { return __builtin_bit_cast(float, bits); }
inline int64_t bits_of(double x) { return __builtin_bit_cast(int64_t, x); }
inline double double_of(int64_t bits) { return __builtin_bit_cast(double, bits); }

template <class T>
inline T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T most(T a, T b) {
  return a > b ? a : b;
}

// 2^exponent for exponents from -127 (a subnormal) to 127.
inline float power_of_two(int32_t exponent) {
  return float_of(exponent >= -126 ? (exponent + 127) << 23 : kNormal >> 1);
}

}  // namespace

#endif

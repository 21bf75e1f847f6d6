// The smallest and the largest magnitude of many values.
#pragma once

#include <cmath>

#include "kernels.h"

namespace {

// Magnitudes of finite numbers compare as their bits do.
template <class Signed>
void extent_of(const Signed* x, int64_t n, int threads, float* two) {
  constexpr int mantissa = sizeof(Signed) == 4 ? 23 : 7;
  constexpr Signed all = sizeof(Signed) == 4 ? Signed(0x7fffffff) : Signed(0x7fff);
  constexpr Signed infinity = Signed(255) << mantissa;
  Signed least = infinity, most = 0;
#pragma omp parallel for num_threads(threads) reduction(min : least) reduction(max : most)
  for (int64_t from = 0; from < n; from += 4096) {
    Signed low = infinity, high = 0;
    const int64_t end = n - from < 4096 ? n : from + 4096;
    for (int64_t i = from; i < end; ++i) {
      const Signed u = x[i] & all;
      const Signed above = u == 0 ? infinity : u, below = u >= infinity ? Signed(0) : u;
      low = above < low ? above : low;
      high = below > high ? below : high;
    }
    least = low < least ? low : least;
    most = high > most ? high : most;
  }
  const uint32_t bits[2] = {uint32_t(least) << (sizeof(Signed) == 4 ? 0 : 16),
                            uint32_t(most) << (sizeof(Signed) == 4 ? 0 : 16)};
  std::memcpy(two, bits, sizeof bits);
}

void extent(const void* x, int32_t type, int64_t n, int threads, float* two) {
  if (type == MS_BFLOAT16) extent_of(static_cast<const int16_t*>(x), n, threads, two);
  else extent_of(static_cast<const int32_t*>(x), n, threads, two);
}

}  // namespace

// Codes to a stream of bits and back: least significant bit first, as docs/numerics.md section 9.
#ifndef MICROSCALE_PACK_H
#define MICROSCALE_PACK_H

#include <string.h>

#include "bits.h"

namespace {

inline int64_t bytes_of(int64_t codes, int bits) { return (codes * bits + 7) / 8; }

inline void pack_any(const uint8_t* codes, int64_t n, int bits, uint8_t* to) {
  uint32_t held = 0;
  int filled = 0;
  for (int64_t i = 0; i < n; ++i) {
    held |= static_cast<uint32_t>(codes[i]) << filled;
    filled += bits;
    for (; filled >= 8; filled -= 8, held >>= 8) *to++ = static_cast<uint8_t>(held);
  }
  if (filled) *to = static_cast<uint8_t>(held);
}

// n codes into bytes_of(n, bits) bytes.
inline void pack(const uint8_t* codes, int64_t n, int bits, uint8_t* to) {
  if (bits == 8) {
    memcpy(to, codes, static_cast<size_t>(n));
    return;
  }
  int64_t i = 0;
  if (bits == 4) {
    const int64_t pairs = n / 2;
#pragma GCC ivdep
    for (int64_t p = 0; p < pairs; ++p) {
      to[p] = static_cast<uint8_t>(codes[2 * p] | codes[2 * p + 1] << 4);
    }
    i = 2 * pairs, to += pairs;
  } else if (bits == 6) {
    for (; i + 4 <= n; i += 4, to += 3) {
      const uint32_t word = codes[i] | static_cast<uint32_t>(codes[i + 1]) << 6 |
                            static_cast<uint32_t>(codes[i + 2]) << 12 |
                            static_cast<uint32_t>(codes[i + 3]) << 18;
      to[0] = static_cast<uint8_t>(word);
      to[1] = static_cast<uint8_t>(word >> 8);
      to[2] = static_cast<uint8_t>(word >> 16);
    }
  }
  pack_any(codes + i, n - i, bits, to);
}

inline void unpack_any(const uint8_t* from, int64_t n, int bits, uint8_t* codes) {
  uint32_t held = 0;
  int filled = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (filled < bits) {
      held |= static_cast<uint32_t>(*from++) << filled;
      filled += 8;
    }
    codes[i] = static_cast<uint8_t>(held & ((1u << bits) - 1));
    held >>= bits;
    filled -= bits;
  }
}

// The first n codes of a stream.
inline void unpack(const uint8_t* from, int64_t n, int bits, uint8_t* codes) {
  if (bits == 8) {
    memcpy(codes, from, static_cast<size_t>(n));
    return;
  }
  int64_t i = 0;
  if (bits == 4) {
    const int64_t pairs = n / 2;
#pragma GCC ivdep
    for (int64_t p = 0; p < pairs; ++p) {
      codes[2 * p] = from[p] & 15;
      codes[2 * p + 1] = from[p] >> 4;
    }
    i = 2 * pairs, from += pairs;
  } else if (bits == 6) {
    for (; i + 4 <= n; i += 4, from += 3) {
      const uint32_t word = from[0] | static_cast<uint32_t>(from[1]) << 8 |
                            static_cast<uint32_t>(from[2]) << 16;
      for (int k = 0; k < 4; ++k) codes[i + k] = static_cast<uint8_t>(word >> (6 * k) & 63);
    }
  }
  unpack_any(from, n - i, bits, codes + i);
}

}  // namespace

#endif

// Philox4x32-10 (Salmon et al., SC 2011), as kernels/philox.py states it: element i takes word
// i mod 4 of the block with the counter (i div 4, low and high word; call; operand).
#ifndef MICROSCALE_PHILOX_H
#define MICROSCALE_PHILOX_H

#include <stdint.h>

namespace {

struct Philox {
  uint32_t key0, key1, call, operand;
  int64_t offset;  // of the tensor's first element in the whole of which it is a shard
};

// seed, call, operand, offset: the int64 [4] that ops.py receives.
inline Philox philox_of(const int64_t* seed) {
  const uint64_t key = static_cast<uint64_t>(seed[0]);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32),
          static_cast<uint32_t>(seed[1]), static_cast<uint32_t>(seed[2]), seed[3]};
}

inline void philox_block(const Philox& p, int64_t block, uint32_t* words) {
  uint32_t c0 = static_cast<uint32_t>(block);
  uint32_t c1 = static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32);
  uint32_t c2 = p.call, c3 = p.operand, k0 = p.key0, k1 = p.key1;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Words of n elements whose logical indices begin at `index` and are `stride` apart. For stride 1
// there must be room for 3 words before `words` and after its n: whole blocks are written.
inline void philox_words(const Philox& p, int64_t index, int64_t stride, int64_t n,
                         uint32_t* words) {
  index += p.offset;
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) {
      uint32_t four[4];
      const int64_t at = index + i * stride;
      philox_block(p, at >> 2, four);
      words[i] = four[at & 3];
    }
    return;
  }
  uint32_t* whole = words - (index & 3);
  const int64_t first = index >> 2, blocks = ((index + n + 3) >> 2) - first;
  for (int64_t b = 0; b < blocks; ++b) philox_block(p, first + b, whole + 4 * b);
}

}  // namespace

#endif

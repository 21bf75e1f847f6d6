"""Philox4x32-10: random bits that are a function of a key and a counter, and of nothing else.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Any device,
thread count, layout or order of evaluation gives the same bits.

A block of the generator is four 32-bit words. Element i of a tensor takes word i mod 4 of the
block whose counter is (i div 4, low and high word; call; operand), under the 64-bit seed as key.
All arithmetic is in int64: a product of two 32-bit words wraps around modulo 2^64 and its bits stay
right, because only masks and shifts follow.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four words (int64, 0 to 2^32 - 1) for each counter of four words under a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def random_words(index: Tensor, seed: Tensor) -> Tensor:
    """32 random bits (int64) for each global element index (int64, any shape).

    `seed` is int64 [3]: the seed, the number of the call, the number of the operand.
    """
    block = index >> 2
    zero = torch.zeros_like(block)
    counter = (block & _WORD, block >> 32, zero + (seed[1] & _WORD), zero + (seed[2] & _WORD))
    words = philox(counter, (seed[0] & _WORD, (seed[0] >> 32) & _WORD))
    lane = index & 3
    low = torch.where(lane == 0, words[0], words[1])
    high = torch.where(lane == 2, words[2], words[3])
    return torch.where(lane < 2, low, high)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD

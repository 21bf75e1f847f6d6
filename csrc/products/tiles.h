// The tile registers of AMX, or, with MICROSCALE_EMULATE_TILES, a model of them in plain C++ for
// processors that have none: the same loads, the same order of sums (pairs of bfloat16, in order
// of the reduction), every product rounded into the sum; no flushing of subnormals.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(MICROSCALE_EMULATE_TILES)

#include "tables.h"

namespace {

struct TileModel {
  uint8_t rows[8][16][64];
};
thread_local TileModel tile_model;

inline void load_tile(int tile, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(tile_model.rows[tile][r], static_cast<const char*>(from) + r * stride, 64);
}

inline void store_tile(int tile, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tile_model.rows[tile][r], 64);
}

inline void multiply_tiles(int sum, int a, int b) {
  for (int r = 0; r < 16; ++r) {
    float sums[16];
    uint16_t left[32], right[32];
    std::memcpy(sums, tile_model.rows[sum][r], 64);
    std::memcpy(left, tile_model.rows[a][r], 64);
    for (int k = 0; k < 16; ++k) {
      std::memcpy(right, tile_model.rows[b][k], 64);
      for (int c = 0; c < 16; ++c)
        for (int half = 0; half < 2; ++half)
          sums[c] += from_bfloat16(left[2 * k + half]) * from_bfloat16(right[2 * c + half]);
    }
    std::memcpy(tile_model.rows[sum][r], sums, 64);
  }
}

struct Tiles {
  Tiles() {}
};

#define LOAD_TILE(tile, from, stride) load_tile(tile, from, stride)
#define STORE_TILE(tile, to, stride) store_tile(tile, to, stride)
#define MULTIPLY_TILES(sum, a, b) multiply_tiles(sum, a, b)

}  // namespace

#else

#include <immintrin.h>

namespace {

// All eight tiles as 16 rows of 64 bytes, as long as this lives.
struct Tiles {
  Tiles() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = 16;
    }
    // GCC 12 takes the operand of ldtilecfg for 8 bytes and would drop the other stores.
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Macros, because a tile is part of the instruction.
#define LOAD_TILE(tile, from, stride) _tile_loadd(tile, from, stride)
#define STORE_TILE(tile, to, stride) _tile_stored(tile, to, stride)
#define MULTIPLY_TILES(sum, a, b) _tile_dpbf16ps(sum, a, b)

}  // namespace

#endif

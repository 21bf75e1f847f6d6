// GEMM in AMX's tiles: 16 rows of weights by 32 values as they are decoded, 32 values by 16 rows of
// x as they are turned; one block of 32 is one row of a tile. Two by two tiles of sums.
// Few rows of x are better off with AVX-512.
#include "bfloat16.h"
#include "gemm_decode.h"
#include "kernels.h"
#include "tiles.h"

namespace {

struct BFloat16 : BFloat16Order {
  using State = Tiles;
  static constexpr int64_t HEIGHT = 32;
  static constexpr int WIDTH = 2;

  // 32 rows by WIDTH times 16 columns.
  template <int WIDTH>
  static void tile(const uint16_t* w, const uint16_t* x, float* sums, int64_t width) {
    constexpr int64_t PANEL = DEPTH * COLUMNS, ROW = DEPTH * 2;
    const int64_t stride = width * 4;
    float* lower = sums + 16 * width;
    LOAD_TILE(0, sums, stride);
    LOAD_TILE(2, lower, stride);
    if constexpr (WIDTH > 1) {
      LOAD_TILE(1, sums + 16, stride);
      LOAD_TILE(3, lower + 16, stride);
    }
    for (int64_t k = 0; k < DEPTH; k += 32) {
      LOAD_TILE(4, w + k, ROW);
      LOAD_TILE(5, w + 16 * DEPTH + k, ROW);
      LOAD_TILE(6, x + k * COLUMNS, 64);
      MULTIPLY_TILES(0, 4, 6);
      MULTIPLY_TILES(2, 5, 6);
      if constexpr (WIDTH > 1) {
        LOAD_TILE(7, x + PANEL + k * COLUMNS, 64);
        MULTIPLY_TILES(1, 4, 7);
        MULTIPLY_TILES(3, 5, 7);
      }
    }
    STORE_TILE(0, sums, stride);
    STORE_TILE(2, lower, stride);
    if constexpr (WIDTH > 1) {
      STORE_TILE(1, sums + 16, stride);
      STORE_TILE(3, lower + 16, stride);
    }
  }
};

template <Look LOOK>
using Decoded = Decoding<BFloat16, LOOK>;

int gemm_bfloat16(const GemmCall& call) { return by_look<Decoded>(call); }
int gemm_dense(const GemmCall& call) { return Gemm<Dense<BFloat16>>(call).run(); }

}  // namespace

const ProductKernels MS_PRODUCTS = {nullptr, nullptr,       nullptr,   nullptr,
                                    nullptr, gemm_bfloat16, gemm_dense, nullptr};

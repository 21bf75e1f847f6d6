// A matrix stored packed, and the products of it, as they cross the C interface.
//
// Layout (docs/numerics.md, section 9): row r has its codes from `codes + r * row_bytes`, a bit
// stream along the reduction, least significant bit first; its scales from `scales + r *
// scale_stride` elements. A block is `block` values that share a scale, the whole row where
// `block` is 0. Numbers of a format arrive as numbers: the value of every code, the value of every
// stored scale. Nothing here knows a format's name.
#pragma once

#include "../format.h"

extern "C" {

enum ms_scale_kind : int32_t {
  MS_SCALE_E8M0 = 0,   // uint8, 2^(code - 127), 255 is NaN
  MS_SCALE_TABLE = 1,  // uint8, value by table
  MS_SCALE_BF16 = 2,
  MS_SCALE_FP32 = 3,
};

struct ms_packed {
  const uint8_t* codes;
  const void* scales;
  const float* values;        // the value of every code, 2^bits of them
  const float* scale_values;  // the value of every scale code (MS_SCALE_TABLE)
  int64_t rows;
  int64_t length;        // values of a row
  int64_t row_bytes;     // between rows
  int64_t scale_stride;  // elements between rows; 0 where rows share theirs
  int32_t bits;          // 4, 6 or 8
  int32_t block;
  int32_t scale_kind;
  float tensor_scale;  // 1 where there is none
};

// For tests: multiply in AMX's tiles as modelled in C++ (slow). -1 where there is no AVX-512 VNNI.
MS_API int ms_model_tiles(int on);

// Matrices that are not packed: out[m, n] = sum over k of left[m, k] right[n, k], plus bias[n].
//
// Both factors are in bfloat16 without subnormals; out is contiguous, of `type`, float32 or
// bfloat16. MS_NO_KERNEL where the instruction set in use has none, as ms_has_matmul tells.
enum { MS_NO_KERNEL = -1 };
struct ms_dense;
MS_API int ms_has_matmul(void);
MS_API int ms_matmul(const ms_dense* left, const ms_dense* right, int64_t length, const float* bias,
                     void* out, int type, int threads);

// The smallest and the largest finite magnitude among n values, float32 or bfloat16, zeros apart:
// infinity and 0 if there are none.
MS_API int ms_extent(const void* x, int type, int64_t n, int threads, float* two);

// What tells Python that its records are these.
MS_API int ms_product_sizes(void);

// out[m, n] = sum over k of x[m, k] w[n, k], plus bias[n] if there is a bias (float32).
//
// x: `batch` rows, `stride` elements apart, and out: contiguous, both float32 or bfloat16;
// types = that of x + 16 times that of out (ms_type). Returns MS_OK or MS_NO_MEMORY.
MS_API int ms_linear(const ms_packed* w, const void* x, int64_t batch, int64_t stride,
                     const float* bias, void* out, int types, int threads);

// The same with both operands packed along the reduction.
MS_API int ms_linear_packed(const ms_packed* w, const ms_packed* x, const float* bias, void* out,
                            int type, int threads);
}

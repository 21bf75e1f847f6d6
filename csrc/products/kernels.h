// The kernels of one instruction set, chosen by linear.cpp.
#pragma once

#include "packed.h"

// A matrix that is not packed.
struct ms_dense {
  const void* data;
  int64_t rows;
  int64_t stride;    // elements between rows
  int32_t type;      // ms_type
  int64_t step = 1;  // elements between values of a row; if not 1, rows lie side by side
};

struct GemvCall {
  const ms_packed* w;
  const float* bias;
  const ms_dense* out;
  int64_t batch;
  int threads;
  bool tiny_x;   // x has values, not 0, below 2^-100
  uint8_t* bad;  // by row of weights: in `careful`, do this row; elsewhere set instead of doing it
};

struct GemmCall {
  const ms_packed* w;  // or null, and then
  const ms_dense* rows;  // the same in bfloat16
  int64_t length;
  const ms_dense* x;
  const float* bias;
  const ms_dense* out;
  const float* factors;  // by row of weights: what the sums are multiplied with
  int threads;

  int64_t row_count() const { return w ? w->rows : rows->rows; }
};

// All return MS_OK or MS_NO_MEMORY. Those that are null are not there; x is widened instead.
struct ProductKernels {
  // At most GEMV_BATCH rows of x, in float32 of at most 2^100, or in bfloat16 of 2^-100 to 2^100.
  // Scale the sum of a block.
  int (*gemv_float32)(const GemvCall&, const ms_dense& x);
  int (*gemv_bfloat16)(const GemvCall&, const ms_dense& x);
  // Elements of w and x are whole multiples, at most 128, of their smallest; scales are safe.
  int (*gemv_integer)(const GemvCall&, const ms_packed& x);
  // The same for any numbers: of weights as `dequantize` gives them.
  int (*gemv_careful)(const GemvCall&, const ms_dense& x);
  // Of weights as `dequantize` gives them.
  int (*gemm_float32)(const GemmCall&);
  // x in bfloat16 without subnormals; scaled elements are exact in bfloat16, or the scale is one
  // a row and among the factors.
  int (*gemm_bfloat16)(const GemmCall&);
  // Of rows in bfloat16 without subnormals, like x; either may lie side by side.
  int (*gemm_dense)(const GemmCall&);
  // The smallest and the largest finite magnitude of values, zeros apart: infinity and 0 if none.
  void (*extent)(const void* x, int32_t type, int64_t n, int threads, float* two);
};

constexpr int64_t GEMV_BATCH = 8;

extern const ProductKernels ms_products_baseline, ms_products_avx2, ms_products_avx512;
extern const ProductKernels ms_products_vbmi, ms_products_amx;
// The kernels for AMX over a model of its tiles in C++, to be tested without it.
extern const ProductKernels ms_products_modelled;

// Those of the instruction set in use; without those of VBMI and later unless `newest`.
const ProductKernels& product_kernels(bool newest);

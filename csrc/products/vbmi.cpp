// The kernels of processors with AVX-512 VBMI, VNNI and BF16.
#include "gemm_vbmi.h"
#include "gemv_vbmi.h"

const ProductKernels ms_products_vbmi = {
  gemv_float32_vbmi, gemv_bfloat16_vbmi, gemv_integer_vbmi, nullptr,
  gemm_float32_vbmi, gemm_bfloat16_vbmi, gemm_dense_vbmi,
  extent_vbmi,
};

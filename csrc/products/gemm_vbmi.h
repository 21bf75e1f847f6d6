// GEMM with AVX-512 VBMI and BF16: see ProductKernels.
#pragma once

#include "kernels.h"

int gemm_bfloat16_vbmi(const GemmCall& call);
int gemm_dense_vbmi(const GemmCall& call);
int gemm_float32_vbmi(const GemmCall& call);
void extent_vbmi(const void* x, int32_t type, int64_t n, int threads, float* two);

// GEMV with AVX-512 VBMI, BF16 and VNNI: see ProductKernels.
#pragma once

#include "kernels.h"

int gemv_float32_vbmi(const GemvCall& call, const ms_dense& x);
int gemv_bfloat16_vbmi(const GemvCall& call, const ms_dense& x);
int gemv_integer_vbmi(const GemvCall& call, const ms_packed& x);

// The kernels of processors with AMX: GEMM in tiles of bfloat16.
#include "kernels.h"

const ProductKernels ms_products_amx = {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};

// Products of matrices in bfloat16, and what they need to know of them.
#include <algorithm>

#include "kernels.h"

int ms_has_matmul(void) { return product_kernels(true).gemm_dense != nullptr; }

int ms_matmul(const ms_dense* left, const ms_dense* right, int64_t length, const float* bias,
              void* out, int type, int threads) {
  const ProductKernels& k = product_kernels(true);
  if (!k.gemm_dense) return MS_NO_KERNEL;
  if (left->rows == 0 || right->rows == 0) return MS_OK;
  const ms_dense result{out, left->rows, right->rows, type};
  const double work = double(left->rows) * double(right->rows) * double(length);
  return k.gemm_dense({nullptr, right, length, left, bias, &result, nullptr,
                       work < 65536 ? 1 : std::max(threads, 1)});
}

int ms_extent(const void* x, int type, int64_t n, int threads, float* two) {
  const ProductKernels& k = product_kernels(true);
  if (!k.extent) return MS_NO_KERNEL;
  k.extent(x, type, n, n < 65536 ? 1 : std::max(threads, 1), two);
  return MS_OK;
}

// The tables of kernels of the instruction sets.
#include <algorithm>
#include <atomic>

#include "../isa.h"
#include "kernels.h"

namespace {

// The kernels of an instruction set, completed by those of lesser ones.
ProductKernels kernels_of(int isa) {
  const ProductKernels* tables[] = {
    &ms_products_baseline,
#if defined(MICROSCALE_X86)
    &ms_products_avx2, &ms_products_avx512, &ms_products_vbmi, &ms_products_amx,
#endif
  };
  ProductKernels all = *tables[isa];
  while (--isa >= 0) {
    const ProductKernels& less = *tables[isa];
    if (!all.gemv_float32) all.gemv_float32 = less.gemv_float32;
    if (!all.gemv_bfloat16) all.gemv_bfloat16 = less.gemv_bfloat16;
    if (!all.gemv_integer) all.gemv_integer = less.gemv_integer;
    if (!all.gemv_careful) all.gemv_careful = less.gemv_careful;
    if (!all.gemm_float32) all.gemm_float32 = less.gemm_float32;
    if (!all.gemm_bfloat16) all.gemm_bfloat16 = less.gemm_bfloat16;
    if (!all.extent) all.extent = less.extent;
    if (!all.gemm_dense) all.gemm_dense = less.gemm_dense;
  }
  return all;
}

#if defined(MICROSCALE_X86)
std::atomic<bool> model_tiles{false};
#endif

}  // namespace

const ProductKernels& product_kernels(bool newest) {
  static const ProductKernels all[MS_ISAS] = {
    kernels_of(0),
#if defined(MICROSCALE_X86)
    kernels_of(1), kernels_of(2), kernels_of(3), kernels_of(4),
#endif
  };
  const int isa = newest ? ms_isa() : std::min<int>(ms_isa(), MS_AVX512);
#if defined(MICROSCALE_X86)
  if (isa >= MS_AVX512_VNNI && model_tiles) {
    static const ProductKernels modelled = [] {
      ProductKernels k = kernels_of(MS_AVX512_VNNI);
      k.gemm_bfloat16 = ms_products_modelled.gemm_bfloat16;
      k.gemm_dense = ms_products_modelled.gemm_dense;
      return k;
    }();
    return modelled;
  }
#endif
  return all[isa];
}

int ms_model_tiles(int on) {
#if defined(MICROSCALE_X86)
  model_tiles = on != 0;
  return ms_isa() >= MS_AVX512_VNNI ? 0 : -1;
#else
  return on ? -1 : 0;
#endif
}

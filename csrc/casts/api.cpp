// The C interface of casts: it picks the table of the instruction set in use.
#include "cast.h"
#include "../isa.h"

namespace {

const ms_cast_table& table() {
#if defined(MICROSCALE_X86)
  if (ms_isa() >= MS_AVX512) return ms_cast_avx512;
  if (ms_isa() == MS_AVX2) return ms_cast_avx2;
#endif
  return ms_cast_baseline;
}

ms_job packing(const ms_job* job, const void* x, void* codes, void* scales, float* tensor_scale,
               const int64_t* seed) {
  ms_job here = *job;
  here.x = x;
  here.y = codes;
  here.scales = scales;
  here.tensor_scale = here.plan->format.has_tensor_scale ? tensor_scale : nullptr;
  here.seed = seed;
  return here;
}

}  // namespace

extern "C" {

// Sizes of the records, by which the loader sees that library and Python agree.
MS_API int ms_sizes(void) { return static_cast<int>(sizeof(ms_plan) * 10000 + sizeof(ms_job)); }

// `job` says everything but where the values are: Python keeps it for calls to come.
MS_API int ms_cast(const ms_job* job, const void* x, void* y, const int64_t* seed) {
  ms_job here = *job;
  here.x = x;
  here.y = y;
  here.seed = seed;
  return table().cast(&here);
}

MS_API int ms_quantize(const ms_job* job, const void* x, void* codes, void* scales,
                       float* tensor_scale, const int64_t* seed) {
  const ms_job here = packing(job, x, codes, scales, tensor_scale, seed);
  return table().quantize(&here);
}

// The same of one tensor along two neighbouring axes.
MS_API int ms_quantize_both(const ms_job* job, const ms_job* also, const void* x, void* codes,
                            void* scales, float* tensor_scale, void* also_codes,
                            void* also_scales, float* also_tensor_scale, const int64_t* seed) {
  const ms_job here = packing(job, x, codes, scales, tensor_scale, seed);
  const ms_job other = packing(also, x, also_codes, also_scales, also_tensor_scale, seed);
  return table().quantize_both(&here, &other);
}

MS_API int ms_dequantize(const ms_job* job, const void* codes, void* scales, float* tensor_scale,
                         void* y) {
  ms_job here = *job;
  here.x = codes;
  here.scales = scales;
  here.tensor_scale = tensor_scale;
  here.y = y;
  return table().dequantize(&here);
}

}  // extern "C"

// The C interface of casts: it picks the table of the instruction set in use.
#include "cast.h"
#include "isa.h"

namespace {

const ms_cast_table& table() {
#if defined(MICROSCALE_X86)
  if (ms_isa() >= MS_AVX512) return ms_cast_avx512;
  if (ms_isa() == MS_AVX2) return ms_cast_avx2;
#endif
  return ms_cast_baseline;
}

}  // namespace

extern "C" {

// Sizes of the records, by which the loader sees that library and Python agree.
MS_API int ms_sizes(void) { return static_cast<int>(sizeof(ms_plan) * 10000 + sizeof(ms_job)); }

MS_API int ms_cast(const ms_job* job) { return table().cast(job); }

MS_API int ms_quantize(const ms_job* job) { return table().quantize(job); }

MS_API int ms_dequantize(const ms_job* job) { return table().dequantize(job); }

// A contiguous tensor [outer, length, inner] to a contiguous one: `types` is x's + 16 times y's.
// Blocks as long as the data are those of each lane.
MS_API int ms_cast_contiguous(const ms_plan* plan, const void* x, void* y, int types, int64_t outer,
                       int64_t length, int64_t inner, const int64_t* seed, int threads) {
  const int64_t plane = length * inner;
  ms_job job{};
  job.plan = plan;
  job.x = x;
  job.y = y;
  job.seed = seed;
  job.x_type = types & 15;
  job.y_type = types >> 4;
  job.threads = threads;
  ms_geometry& g = job.geometry;
  g.dimensions = 2;
  g.shape[0] = outer, g.shape[1] = inner;
  g.x[0] = g.y[0] = g.index[0] = plane;
  g.x[1] = g.y[1] = g.index[1] = 1;
  // Only blocks as long as the data have scales by lane; for others the numbers mean nothing.
  g.scale[0] = plan->format.block ? plane : inner;
  g.scale[1] = 1;
  g.length = length;
  g.x_axis = g.y_axis = g.index_axis = inner;
  return table().cast(&job);
}

}  // extern "C"

// Cast, quantize and dequantize. Compiled once for each instruction set; MS_CAST_TABLE names the
// table that this compilation fills.
//
// Blocks of a number of values are done in batches that stay in the first cache: amax of each, the
// scales of all, then the values. Blocks as long as the data take two passes over it.
#include "cast.h"

#include "both.h"
#include "dequantize.h"
#include "swift_rows.h"
#include "whole.h"

namespace {

int counted_rows(Job& job) {
  join_rows(job);
#if defined(__AVX512BW__)
  if (const Part part = swift_part(job)) return swift_rows(job, part);
#endif
  const ms_geometry& g = job.geometry;
  const int batch = batch_of(job);
  const int64_t blocks = ceil_div(g.length, job.block), batches = ceil_div(blocks, batch);
  const auto unit = [&](int64_t u, Room& room) {
    const int64_t first = u % batches * batch;
    const int count = static_cast<int>(least<int64_t>(batch, blocks - first));
    row_batch(job, place_of(g, u / batches, -1), first, count, room);
  };
  return for_units(lanes_of(g) * batches, values_of(job), job.threads, batch * job.block, unit);
}

int prepare(const ms_job* given, bool codes, Job& job) {
  job = job_of(given, codes);
  job.stochastic = given->plan->rounding == MS_STOCHASTIC;
  if (job.stochastic) {
    if (!given->seed) return MS_NO_SEED;
    job.philox = philox_of(given->seed);
  }
  job.inner = strip_dimension(job, job.geometry.x, job.geometry.x_axis);
  return MS_OK;
}

int finish(Job& job) {
  if (values_of(job) == 0) return MS_OK;
  if (job.block == 0) return job.inner < 0 ? whole_rows(job) : whole_strips(job);
  if (job.rule.has_outer) {
    int32_t largest;
    const int status = measure_tensor(job, &largest);
    if (status) return status;
    set_outer(job, largest);
  }
  return job.inner < 0 ? counted_rows(job) : counted_strips(job);
}

int run(const ms_job* given, bool codes) {
  Job job;
  const int status = prepare(given, codes, job);
  return status ? status : finish(job);
}

int cast(const ms_job* job) { return run(job, false); }

int quantize(const ms_job* job) { return run(job, true); }

int quantize_both(const ms_job* given, const ms_job* also) {
  Job job, other;
  int status = prepare(given, true, job);
  if (!status) status = prepare(also, true, other);
  if (status) return status;
  if (makes_tiles(job, other)) return quantize_tiles(job, other);
  if (makes_tiles(other, job)) return quantize_tiles(other, job);
  status = finish(job);
  return status ? status : finish(other);
}

}  // namespace

extern const ms_cast_table MS_CAST_TABLE;
const ms_cast_table MS_CAST_TABLE = {cast, quantize, quantize_both, dequantize};

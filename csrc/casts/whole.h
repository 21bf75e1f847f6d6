// Blocks as long as the data: one pass for their largest values, one to round.
#ifndef MICROSCALE_WHOLE_H
#define MICROSCALE_WHOLE_H

#include "rows.h"
#include "strips.h"

namespace {

inline void raise(int32_t* to, int32_t value) {
  int32_t seen = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(to, &seen, value, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
}

// Amax and scales of the groups that share one; group k is entry k mod kBatch of batch k / kBatch.
struct Groups {
  Amax* found = nullptr;
  Scales* scales = nullptr;
  int64_t count = 0;

  bool reserve(int64_t groups) {
    count = groups;
    const size_t batches = static_cast<size_t>(ceil_div(groups, kBatch));
    found = new (std::nothrow) Amax[batches];
    scales = new (std::nothrow) Scales[batches];
    if (!found || !scales) return false;
    for (size_t b = 0; b < batches; ++b) reset(found[b], kBatch);
    return true;
  }
  ~Groups() {
    delete[] found;
    delete[] scales;
  }

  void add(int64_t group, const Amax& from, int i, bool of_finite) {
    Amax& to = found[group / kBatch];
    const int at = static_cast<int>(group % kBatch);
    raise(to.all + at, from.all[i]);
    if (!of_finite) return;
    raise(to.finite + at, from.finite[i]);
    raise(to.infinite + at, from.infinite[i]);
  }

  void copy(int64_t group, Scales& s, int i) const {
    const Scales& from = scales[group / kBatch];
    const int at = static_cast<int>(group % kBatch);
    s.block[i] = from.block[at], s.divisor[i] = from.divisor[at], s.flush[i] = from.flush[at];
    s.low[i] = from.low[at], s.top[i] = from.top[at], s.indirect[i] = from.indirect[at];
  }
};

inline int64_t groups_of(const ms_geometry& g) {
  int64_t last = 0;
  for (int d = 0; d < g.dimensions; ++d) last += (g.shape[d] - 1) * g.scale[d];
  return last + 1;
}

inline void scales_of_groups(const Job& job, Groups& groups) {
  for (int64_t first = 0; first < groups.count; first += kBatch) {
    const int n = static_cast<int>(least<int64_t>(kBatch, groups.count - first));
    Scales& s = groups.scales[first / kBatch];
    find_scales(groups.found[first / kBatch], n, job.rule, s);
    if (job.scales) store_scales(job.scales, first, 1, s, n, job.plan->format);
  }
}

// The largest magnitude of the tensor, as its tensor scale sees it, from that of all blocks.
inline int32_t settled_amax(const Job& job, const Amax& found, int n) {
  int32_t amax[kBatch], poisoned[kBatch], largest = 0;
  Scales unused;
  settle(found, n, job.rule, amax, poisoned, unused);
  for (int i = 0; i < n; ++i) largest = most(largest, amax[i]);
  return largest;
}

inline void set_outer(Job& job, int32_t largest) {
  job.rule.outer = tensor_scale(largest, job.plan->format);
  if (job.tensor_scale) *job.tensor_scale = job.rule.outer;
}

inline int whole_rows(Job& job) {
  const ms_geometry& g = job.geometry;
  job.block = kRun;  // every part is one run
  const int64_t parts = ceil_div(g.length, kRun), units = lanes_of(g) * parts;
  Groups groups;
  if (!groups.reserve(groups_of(g))) return MS_NO_MEMORY;
  const auto part = [&](int64_t u, Room& room, const float** x, int64_t* at, Place* p) {
    *p = place_of(g, u / parts, -1);
    *at = u % parts * kRun;
    const int n = static_cast<int>(least<int64_t>(kRun, g.length - *at));
    *x = load_row(job, *p, *at, n, room);
    return n;
  };
  const auto measure = [&](int64_t u, Room& room) {
    const float* x;
    int64_t at;
    Place p;
    const int n = part(u, room, &x, &at, &p);
    Amax found;
    find_amax(job, p, at, x, n, 1, found);
    groups.add(p.scale, found, 0, job.rule.of_finite);
  };
  for_units(units, values_of(job), job.threads, 0, measure);
  if (job.rule.has_outer) {
    int32_t largest = 0;
    for (int64_t first = 0; first < groups.count; first += kBatch) {
      const int n = static_cast<int>(least<int64_t>(kBatch, groups.count - first));
      largest = most(largest, settled_amax(job, groups.found[first / kBatch], n));
    }
    set_outer(job, largest);
  }
  scales_of_groups(job, groups);
  const auto finish = [&](int64_t u, Room& room) {
    const float* x;
    int64_t at;
    Place p;
    const int n = part(u, room, &x, &at, &p);
    Scales s;
    groups.copy(p.scale, s, 0);
    s.any_indirect = s.indirect[0];
    finish_row(job, p, at, x, n, s, room);
  };
  return for_units(units, values_of(job), job.threads, 0, finish);
}

inline int whole_strips(Job& job) {
  const ms_geometry& g = job.geometry;
  const int64_t rows_of_measure = 1024, apart = g.scale[job.inner];
  Groups groups;
  if (!groups.reserve(groups_of(g))) return MS_NO_MEMORY;
  for_strips(job, ceil_div(g.length, rows_of_measure),
             [&](const Place& p, int lanes, int64_t number, Room& room) {
               const int64_t row = number * rows_of_measure;
               Amax found;
               amax_of_strip(job, p, row, least(rows_of_measure, g.length - row), lanes, found,
                             room);
               for (int i = 0; i < lanes; ++i) {
                 groups.add(p.scale + i * apart, found, i, job.rule.of_finite);
               }
             });
  if (job.rule.has_outer) {
    int32_t largest = 0;
    for (int64_t first = 0; first < groups.count; first += kBatch) {
      const int n = static_cast<int>(least<int64_t>(kBatch, groups.count - first));
      largest = most(largest, settled_amax(job, groups.found[first / kBatch], n));
    }
    set_outer(job, largest);
  }
  scales_of_groups(job, groups);
  return for_strips(job, ceil_div(g.length, kTile),
                    [&](const Place& p, int lanes, int64_t number, Room& room) {
                      const int64_t row = number * kTile;
                      Scales s;
                      for (int i = 0; i < (apart ? lanes : 1); ++i) {
                        groups.copy(p.scale + i * apart, s, i);
                      }
                      any_indirect(s, apart ? lanes : 1);
                      finish_strip(job, p, row, least<int64_t>(kTile, g.length - row), lanes, s,
                                   apart == 0, room);
                    });
}

// ---------------------------------------------------------------- tensor scale of counted blocks

inline int measure_tensor(const Job& job, int32_t* largest) {
  *largest = 0;
  if (job.inner >= 0) {
    return for_strips(job, ceil_div(job.geometry.length, job.block),
                      [&](const Place& p, int lanes, int64_t number, Room& room) {
                        const int64_t row = number * job.block;
                        Amax found;
                        amax_of_strip(job, p, row, least(job.block, job.geometry.length - row),
                                      lanes, found, room);
                        raise(largest, settled_amax(job, found, lanes));
                      });
  }
  const ms_geometry& g = job.geometry;
  const int batch = batch_of(job);
  const int64_t blocks = ceil_div(g.length, job.block), batches = ceil_div(blocks, batch);
  const auto unit = [&](int64_t u, Room& room) {
    const Place p = place_of(g, u / batches, -1);
    const int64_t first = u % batches * batch, at = first * job.block;
    const int count = static_cast<int>(least<int64_t>(batch, blocks - first));
    const int n = static_cast<int>(least(count * job.block, g.length - at));
    Amax found;
    find_amax(job, p, at, load_row(job, p, at, n, room), n, count, found);
    raise(largest, settled_amax(job, found, count));
  };
  return for_units(lanes_of(g) * batches, values_of(job), job.threads, batch * job.block, unit);
}

}  // namespace

#endif

// Blocks along an axis whose values lie together: batches that stay in the first cache.
#ifndef MICROSCALE_ROWS_H
#define MICROSCALE_ROWS_H

#include "job.h"
#include "search.h"
#include "swift_runs.h"

namespace {

// Values of a row from element `at` on, which lie in blocks with the scales s.
template <class Out>
void round_blocks(const Job& job, const float* x, Out out, int n, const Scales& s,
                  const uint32_t* words) {
  const Rule& rule = job.rule;
  const Grid g = rule.grid;
  const int block = static_cast<int>(job.block), whole = n / block;
  if (rule.plain && rule.plan->rounding == MS_EVEN && !s.any_indirect && block == 32) {
    for (int i = 0; i < whole; ++i) {
      direct<MS_EVEN, false>(x + 32 * i, Out{out.to + 32 * i}, 32, g, s, i, nullptr);
    }
  } else if (rule.plain && rule.plan->rounding == MS_EVEN && block == 16) {
    const Wishes w = wishes_of(rule);
    for (int i = 0; i < whole; ++i) {
      general<MS_EVEN, false, true>(x + 16 * i, Out{out.to + 16 * i}, 16, g, s, i, nullptr, w);
    }
  } else {
    for (int i = 0; i < whole; ++i) {
      const int at = i * block;
      round_run<false>(x + at, Out{out.to + at}, block, rule, s, i, words + at);
    }
  }
  const int at = whole * block;
  if (at < n) round_run<false>(x + at, Out{out.to + at}, n - at, rule, s, whole, words + at);
}

// n values of a row from element `at` on, as float32; null where vectors read them as they are.
inline const float* load_row(const Job& job, const Place& p, int64_t at, int n, Room& room) {
  const ms_geometry& g = job.geometry;
  if (is_swift_row(job)) return nullptr;
  return load(job.x, job.x_type, p.x + at * g.x_axis, g.x_axis, n, room.in);
}

inline void find_amax(const Job& job, const Place& p, int64_t at, const float* x, int n,
                      int blocks, Amax& found) {
  if (!x) return swift_amax(job, p.x + at, n, blocks, found.all);
  const int block = static_cast<int>(job.block);
  reset(found, blocks);
  if (block == 32 && n % 32 == 0 && !job.rule.of_finite) {
    for (int i = 0; i < blocks; ++i) add_row(found, x + 32 * i, 32, i, false);
    return;
  }
  for (int i = 0; i < blocks; ++i) {
    add_row(found, x + i * block, least(block, n - i * block), i, job.rule.of_finite);
  }
}

inline void search_row(const Job& job, const float* x, int n, int blocks, const Amax& found, Scales& s,
                Room& room) {
  Search search;
  propose(found, blocks, job.rule, s, search);
  const int block = static_cast<int>(job.block);
  for (int c = 0; c < search.candidates; ++c) {
    for (int i = 0; i < blocks; ++i) {
      const int at = i * block, size = least(block, n - at);
      add_errors<false>(x + at, size, job.rule, search.scales[c], i, room.out,
                        &search.error[c][i]);
    }
  }
  choose(found, blocks, job.rule, search, s);
}

inline void write_codes(const Job& job, const uint8_t* codes, int n, uint8_t* row, int64_t at) {
  uint8_t* to = row + at * job.bits / 8;
  pack(codes, n, job.bits, to);
  if (at + n < job.geometry.length) return;
  uint8_t *end = to + bytes_of(n, job.bits), *whole = row + job.row_bytes;
  if (end < whole) memset(end, 0, static_cast<size_t>(whole - end));
}

// The values of a row that vectors left: from element `at + done` to `at + n`.
inline void finish_rest(const Job& job, const Place& p, int64_t at, int done, int n,
                        const Scales& s, Room& room) {
  const ms_geometry& g = job.geometry;
  const int block = static_cast<int>(least<int64_t>(job.block, n));
  const int64_t to = p.y + at + done;
  const float* x = load(job.x, job.x_type, p.x + at + done, 1, n - done, room.in);
  float* out = job.codes ? nullptr : ::room(job.y, job.y_type, to, 1, room.out);
  for (int i = done, size; i < n; i += size) {
    const int number = i / block, k = i - done;
    size = least((number + 1) * block, n) - i;
    if (job.codes) {
      round_run<false>(x + k, Codes{room.codes + k}, size, job.rule, s, number, nullptr);
    } else {
      round_run<false>(x + k, Values{out + k}, size, job.rule, s, number, nullptr);
    }
  }
  if (!job.codes) return store(out, job.y, job.y_type, to, g.y_axis, n - done);
  write_codes(job, room.codes, n - done, static_cast<uint8_t*>(job.y) + p.y, at + done);
}

inline void finish_row(const Job& job, const Place& p, int64_t at, const float* x, int n,
                       const Scales& s, Room& room) {
  const ms_geometry& g = job.geometry;
  if (!x) return finish_rest(job, p, at, swift_row(job, p, at, n, s), n, s, room);
  if (job.stochastic) {
    philox_words(job.philox, p.index + at * g.index_axis, g.index_axis, n, room.words);
  }
  if (job.codes) {
    round_blocks(job, x, Codes{room.codes}, n, s, room.words);
    write_codes(job, room.codes, n, static_cast<uint8_t*>(job.y) + p.y, at);
    return;
  }
  const int64_t to = p.y + at * g.y_axis;
  float* out = ::room(job.y, job.y_type, to, g.y_axis, room.out);
  round_blocks(job, x, Values{out}, n, s, room.words);
  store(out, job.y, job.y_type, to, g.y_axis, n);
}

// `blocks` blocks of a row from block `first` on.
inline void row_batch(const Job& job, const Place& p, int64_t first, int blocks, Room& room) {
  const ms_geometry& g = job.geometry;
  const int64_t at = first * job.block;
  const int n = static_cast<int>(least(blocks * job.block, g.length - at));
  const float* x = load_row(job, p, at, n, room);
  Amax found;
  Scales s;
  find_amax(job, p, at, x, n, blocks, found);
  find_scales(found, blocks, job.rule, s);
  if (job.search) search_row(job, x, n, blocks, found, s, room);
  finish_row(job, p, at, x, n, s, room);
  if (!job.scales) return;
  store_scales(job.scales, p.scale + first * g.scale_axis, g.scale_axis, s, blocks,
               job.plan->format);
}

// Blocks in a batch: whole bytes of codes, at most kBatch, about kRun values.
inline int batch_of(const Job& job) {
  int64_t blocks = least<int64_t>(kRun / job.block, kBatch);
  if (blocks >= 8) return static_cast<int>(blocks / 8 * 8);
  return job.block * job.bits % 8 == 0 ? static_cast<int>(most<int64_t>(blocks, 1)) : 8;
}

// Rows that lie behind each other everywhere and end with a whole block are one row.
inline void join_rows(Job& job) {
  ms_geometry& g = job.geometry;
  if (job.block == 0 || g.dimensions == 0 || g.length % job.block) return;
  const int d = static_cast<int>(g.dimensions) - 1;
  const int64_t written = job.codes ? g.length * job.bits / 8 : g.length * g.y_axis;
  const int64_t scales = g.length / job.block * g.scale_axis;
  if (g.x[d] != g.length * g.x_axis || g.y[d] != written ||
      g.index[d] != g.length * g.index_axis || (job.scales && g.scale[d] != scales)) {
    return;
  }
  if (job.codes && g.length * job.bits % 8) return;
  g.length *= g.shape[d];
  remove_dimension(g, d);
  job.row_bytes = bytes_of(g.length, job.bits);
  join_rows(job);
}

}  // namespace

#endif

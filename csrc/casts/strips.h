// Blocks along any other axis: those of neighbouring lanes side by side.
#ifndef MICROSCALE_STRIPS_H
#define MICROSCALE_STRIPS_H

#include "job.h"
#include "search.h"
#include "rows.h"

namespace {

inline const float* load_lanes(const Job& job, const Place& p, int64_t row, int lanes, Room& room) {
  const ms_geometry& g = job.geometry;
  return load(job.x, job.x_type, p.x + row * g.x_axis, g.x[job.inner], lanes, room.in);
}

template <class Out>
void round_lanes(const Job& job, const Place& p, int64_t row, int lanes, const Scales& s,
                 bool one_scale, Out out, Room& room) {
  const ms_geometry& g = job.geometry;
  const float* x = load_lanes(job, p, row, lanes, room);
  if (job.stochastic) {
    const int64_t index = p.index + row * g.index_axis;
    philox_words(job.philox, index, g.index[job.inner], lanes, room.words);
  }
  if (one_scale) {
    round_run<false>(x, out, lanes, job.rule, s, 0, room.words);
  } else {
    round_run<true>(x, out, lanes, job.rule, s, 0, room.words);
  }
}

inline void pack_tile(const Job& job, const Place& p, int64_t row, int rows, int lanes,
               const uint8_t* codes) {
  const int64_t apart = job.geometry.y[job.inner];
  for (int lane = 0; lane < lanes; ++lane) {
    uint8_t line[kTile];
    for (int r = 0; r < rows; ++r) line[r] = codes[r * lanes + lane];
    write_codes(job, line, rows, static_cast<uint8_t*>(job.y) + p.y + lane * apart, row);
  }
}

// Whether no bytes follow a row's codes.
inline bool row_ends_whole(const Job& job) {
  return job.geometry.length * job.bits == job.row_bytes * 8;
}

// Rows `row` to `row + rows` of a strip, with the scales s (one for each lane, or one for all).
inline void finish_strip(const Job& job, const Place& p, int64_t row, int64_t rows, int lanes,
                  const Scales& s, bool one_scale, Room& room) {
  const ms_geometry& g = job.geometry;
  const bool whole = rows % 16 == 0 && (row + rows < g.length || row_ends_whole(job));
  if (is_swift_strip(job, lanes) && (!job.codes || whole)) {
    return swift_strip(job, p, row, rows, lanes, s, one_scale);
  }
  if (job.codes) {
    for (int64_t done = 0; done < rows; done += kTile) {
      const int part = static_cast<int>(least<int64_t>(kTile, rows - done));
      for (int r = 0; r < part; ++r) {
        round_lanes(job, p, row + done + r, lanes, s, one_scale, Codes{room.codes + r * lanes},
                    room);
      }
      pack_tile(job, p, row + done, part, lanes, room.codes);
    }
    return;
  }
  for (int64_t r = row; r < row + rows; ++r) {
    const int64_t to = p.y + r * g.y_axis, apart = g.y[job.inner];
    float* out = ::room(job.y, job.y_type, to, apart, room.out);
    round_lanes(job, p, r, lanes, s, one_scale, Values{out}, room);
    store(out, job.y, job.y_type, to, apart, lanes);
  }
}

inline void search_strip(const Job& job, const Place& p, int64_t row, int64_t rows, int lanes,
                  const Amax& found, Scales& s, Room& room) {
  Search search;
  propose(found, lanes, job.rule, s, search);
  for (int64_t r = row; r < row + rows; ++r) {
    const float* x = load_lanes(job, p, r, lanes, room);
    for (int c = 0; c < search.candidates; ++c) {
      add_errors<true>(x, lanes, job.rule, search.scales[c], 0, room.out, search.error[c]);
    }
  }
  choose(found, lanes, job.rule, search, s);
}

inline void amax_of_strip(const Job& job, const Place& p, int64_t row, int64_t rows, int lanes,
                   Amax& found, Room& room) {
  if (is_swift_strip(job, lanes)) {
    return swift_strip_amax(job, p.x + row * job.geometry.x_axis, rows, lanes, found.all);
  }
  reset(found, lanes);
  for (int64_t r = row; r < row + rows; ++r) {
    add_lanes(found, load_lanes(job, p, r, lanes, room), lanes, job.rule.of_finite);
  }
}

inline void strip_block(const Job& job, const Place& p, int64_t number, int lanes, Room& room) {
  const ms_geometry& g = job.geometry;
  const int64_t row = number * job.block, rows = least(job.block, g.length - row);
  Amax found;
  Scales s;
  amax_of_strip(job, p, row, rows, lanes, found, room);
  find_scales(found, lanes, job.rule, s);
  if (job.search) search_strip(job, p, row, rows, lanes, found, s, room);
  finish_strip(job, p, row, rows, lanes, s, false, room);
  if (!job.scales) return;
  store_scales(job.scales, p.scale + number * g.scale_axis, g.scale[job.inner], s, lanes,
               job.plan->format);
}

// Strips of a row of lanes: of kBatch, then what is left in 64s, then the rest.
struct Chunks {
  int64_t lanes, whole, count;

  explicit Chunks(int64_t all) : lanes(all), whole(all / 64 * 64) {
    count = ceil_div(whole, kBatch) + (whole < lanes);
  }
  int64_t first(int64_t chunk) const { return least(chunk * kBatch, whole); }
  int size(int64_t chunk) const {
    const int64_t left = first(chunk) < whole ? whole - first(chunk) : lanes - whole;
    return static_cast<int>(least<int64_t>(kBatch, left));
  }
};

// Calls visit(place of a strip's first lane, its lanes, segment along the axis, room). Segments
// whose codes share lines of the caches follow each other.
template <class Visit>
int for_strips(const Job& job, int64_t segments, const Visit& visit) {
  const ms_geometry& g = job.geometry;
  const Chunks chunks(g.shape[job.inner]);
  const int64_t near = job.codes ? 4 : 1, groups = ceil_div(segments, near);
  const int64_t before = lanes_of(g) / chunks.lanes;
  const auto unit = [&](int64_t u, Room& room) {
    const int64_t chunk = u % chunks.count, group = u / chunks.count % groups;
    Place p = place_of(g, u / chunks.count / groups, job.inner);
    move(p, g, job.inner, chunks.first(chunk));
    const int64_t end = least((group + 1) * near, segments);
    for (int64_t k = group * near; k < end; ++k) visit(p, chunks.size(chunk), k, room);
  };
  return for_units(before * groups * chunks.count, values_of(job), job.threads, 0, unit);
}

inline int counted_strips(const Job& job) {
  return for_strips(job, ceil_div(job.geometry.length, job.block),
                    [&](const Place& p, int lanes, int64_t number, Room& room) {
                      strip_block(job, p, number, lanes, room);
                    });
}

}  // namespace

#endif

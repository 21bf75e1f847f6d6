// Blocks along any other axis: those of neighbouring lanes side by side.
#ifndef MICROSCALE_STRIPS_H
#define MICROSCALE_STRIPS_H

#include "job.h"
#include "search.h"
#include "rows.h"

namespace {

const float* load_lanes(const Job& job, const Place& p, int64_t row, int lanes, Room& room) {
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

void pack_tile(const Job& job, const Place& p, int64_t row, int rows, int lanes,
               const uint8_t* codes) {
  const int64_t apart = job.geometry.y[job.inner];
  for (int lane = 0; lane < lanes; ++lane) {
    uint8_t line[kTile];
    for (int r = 0; r < rows; ++r) line[r] = codes[r * lanes + lane];
    write_codes(job, line, rows, static_cast<uint8_t*>(job.y) + p.y + lane * apart, row);
  }
}

// Rows `row` to `row + rows` of a strip, with the scales s (one for each lane, or one for all).
void finish_strip(const Job& job, const Place& p, int64_t row, int64_t rows, int lanes,
                  const Scales& s, bool one_scale, Room& room) {
  const ms_geometry& g = job.geometry;
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

void search_strip(const Job& job, const Place& p, int64_t row, int64_t rows, int lanes,
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

void amax_of_strip(const Job& job, const Place& p, int64_t row, int64_t rows, int lanes,
                   Amax& found, Room& room) {
  reset(found, lanes);
  for (int64_t r = row; r < row + rows; ++r) {
    add_lanes(found, load_lanes(job, p, r, lanes, room), lanes, job.rule.of_finite);
  }
}

void strip_block(const Job& job, const Place& p, int64_t number, int lanes, Room& room) {
  const ms_geometry& g = job.geometry;
  const int64_t row = number * job.block, rows = least(job.block, g.length - row);
  Amax found;
  Scales s;
  amax_of_strip(job, p, row, rows, lanes, found, room);
  find_scales(found, lanes, job.rule, s);
  if (job.search) search_strip(job, p, row, rows, lanes, found, s, room);
  finish_strip(job, p, row, rows, lanes, s, false, room);
  if (!job.scales) return;
  for (int i = 0; i < lanes; ++i) {
    const int64_t to = p.scale + i * g.scale[job.inner] + number * g.scale_axis;
    store_scale(job.scales, to, s, i, job.plan->format);
  }
}

// Calls visit(place of a strip's first lane, its lanes, segment along the axis, room).
template <class Visit>
int for_strips(const Job& job, int64_t segments, const Visit& visit) {
  const ms_geometry& g = job.geometry;
  const int64_t lanes = g.shape[job.inner], chunks = ceil_div(lanes, kBatch);
  const int64_t before = lanes_of(g) / lanes;
  const auto unit = [&](int64_t u, Room& room) {
    Place p = place_of(g, u / chunks / segments, job.inner);
    const int64_t first = u % chunks * kBatch;
    move(p, g, job.inner, first);
    visit(p, static_cast<int>(least<int64_t>(kBatch, lanes - first)), u / chunks % segments, room);
  };
  return for_units(before * segments * chunks, values_of(job), job.threads, 0, unit);
}

int counted_strips(const Job& job) {
  return for_strips(job, ceil_div(job.geometry.length, job.block),
                    [&](const Place& p, int lanes, int64_t number, Room& room) {
                      strip_block(job, p, number, lanes, room);
                    });
}

}  // namespace

#endif

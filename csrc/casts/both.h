// Packing one tensor along two neighbouring axes in one read: tile by tile, the rows of a tile and
// then its columns, which by then lie in the second cache.
#ifndef MICROSCALE_BOTH_H
#define MICROSCALE_BOTH_H

#include "swift_rows.h"
#include "whole.h"

namespace {

constexpr int64_t kTileRows = 128, kTileLanes = 2048;

// Whether the rows of one job are the strips' segments of the other, in blocks that tiles hold.
inline bool makes_tiles(const Job& rows, const Job& strips) {
  if (rows.inner >= 0 || strips.inner < 0 || !rows.block || !strips.block) return false;
  const ms_geometry &r = rows.geometry, &s = strips.geometry;
  return kTileLanes % rows.block == 0 && kTileRows % strips.block == 0 &&
         s.shape[strips.inner] == r.length && s.x[strips.inner] == r.x_axis &&
         lanes_of(s) * s.length == lanes_of(r) * r.length;
}

inline void tile_rows(const Job& job, int64_t lane, int64_t rows, int64_t first, int64_t end,
                      Room& room) {
  const int batch = batch_of(job);
  for (int64_t r = 0; r < rows; ++r) {
    const Place p = place_of(job.geometry, lane + r, -1);
    int64_t at = first;
#if defined(__AVX512BW__)
    if (const Part part = swift_part(job)) {
      const int64_t whole = least(end, job.geometry.length / job.block);
      if (at < whole) part(job, p, at, whole - at, room), at = whole;
    }
#endif
    for (; at < end; at += batch) {
      row_batch(job, p, at, static_cast<int>(least<int64_t>(batch, end - at)), room);
    }
  }
}

inline void tile_strips(const Job& job, int64_t before, int64_t row, int64_t rows, int64_t first,
                        int64_t end, Room& room) {
  Place p = place_of(job.geometry, before, job.inner);
  move(p, job.geometry, job.inner, first);
  const Chunks chunks(end - first);
  for (int64_t c = 0; c < chunks.count; ++c) {
    Place at = p;
    move(at, job.geometry, job.inner, chunks.first(c));
    const int64_t last = ceil_div(row + rows, job.block);
    for (int64_t k = row / job.block; k < last; ++k) {
      strip_block(job, at, k, chunks.size(c), room);
    }
  }
}

// Both jobs, whose tensor scale is one.
inline int quantize_tiles(Job& rows, Job& strips) {
  if (rows.rule.has_outer) {
    int32_t largest;
    const int status = measure_tensor(rows, &largest);
    if (status) return status;
    set_outer(rows, largest);
    set_outer(strips, largest);
  }
  const int64_t length = strips.geometry.length, lanes = rows.geometry.length;
  const int64_t down = ceil_div(length, kTileRows), across = ceil_div(lanes, kTileLanes);
  const auto unit = [&](int64_t u, Room& room) {
    const int64_t before = u / across / down, row = u / across % down * kTileRows;
    const int64_t first = u % across * kTileLanes, end = least(first + kTileLanes, lanes);
    const int64_t height = least(kTileRows, length - row);
    tile_rows(rows, before * length + row, height, first / rows.block,
              ceil_div(end, rows.block), room);
    tile_strips(strips, before, row, height, first, end, room);
  };
  const int64_t units = values_of(rows) / (length * lanes) * down * across;
  return for_units(units, values_of(rows), rows.threads, 0, unit);
}

}  // namespace

#endif

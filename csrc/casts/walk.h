// How kernels walk through a tensor: lanes (every index but the axis), in rows or in strips.
//
// A row is one lane, with blocks along it: for an axis that is contiguous. A strip is many
// neighbouring lanes, whose blocks are done side by side, so that no axis needs a transposed copy.
#ifndef MICROSCALE_WALK_H
#define MICROSCALE_WALK_H

#include "bits.h"
#include "../format.h"

namespace {

struct Place {
  int64_t x, y, index, scale;
};

inline void move(Place& p, const ms_geometry& g, int d, int64_t by) {
  p.x += by * g.x[d];
  p.y += by * g.y[d];
  p.index += by * g.index[d];
  p.scale += by * g.scale[d];
}

inline void remove_dimension(ms_geometry& g, int d) {
  for (int i = d; i + 1 < g.dimensions; ++i) {
    g.shape[i] = g.shape[i + 1], g.x[i] = g.x[i + 1], g.y[i] = g.y[i + 1];
    g.index[i] = g.index[i + 1], g.scale[i] = g.scale[i + 1];
  }
  --g.dimensions;
}

// Drop dimensions of one and join neighbours that lie behind each other everywhere.
inline void simplify(ms_geometry& g) {
  for (int d = static_cast<int>(g.dimensions) - 1; d >= 0; --d) {
    if (g.shape[d] == 1) remove_dimension(g, d);
  }
  for (int d = static_cast<int>(g.dimensions) - 2; d >= 0; --d) {
    const int64_t n = g.shape[d + 1];
    if (g.x[d] == n * g.x[d + 1] && g.y[d] == n * g.y[d + 1] &&
        g.index[d] == n * g.index[d + 1] && g.scale[d] == n * g.scale[d + 1]) {
      const int64_t joined = g.shape[d] * n;
      remove_dimension(g, d);
      g.shape[d] = joined;
    }
  }
}

inline int64_t lanes_of(const ms_geometry& g) {
  int64_t lanes = 1;
  for (int d = 0; d < g.dimensions; ++d) lanes *= g.shape[d];
  return lanes;
}

// The place of a lane by its number; dimension `skipped` (or -1) stays at its start.
inline Place place_of(const ms_geometry& g, int64_t lane, int skipped) {
  Place p{};
  for (int d = static_cast<int>(g.dimensions) - 1; d >= 0; --d) {
    if (d == skipped) continue;
    move(p, g, d, lane % g.shape[d]);
    lane /= g.shape[d];
  }
  return p;
}

// The dimension whose lanes are the closest together, or -1: the lanes of a strip.
inline int nearest_lanes(const ms_geometry& g, const int64_t* strides) {
  int found = -1;
  for (int d = 0; d < g.dimensions; ++d) {
    if (found < 0 || strides[d] <= strides[found]) found = d;
  }
  return found;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

#endif

// Scales of a batch of blocks, and those that a searching rule compares.
#ifndef MICROSCALE_SEARCH_H
#define MICROSCALE_SEARCH_H

#include "runs.h"

namespace {

inline void find_scales(const Amax& found, int n, const Rule& rule, Scales& s) {
  int32_t amax[kBatch], poisoned[kBatch];
  settle(found, n, rule, amax, poisoned, s);
  const ms_format& f = rule.plan->format;
  if (f.power_of_two) {
    power_scales(amax, poisoned, n, rule, s);
  } else {
    real_scales(amax, poisoned, n, f.element.largest, rule, s);
    if (rule.of_finite) poison_infinities(found, n, s);
  }
  any_indirect(s, n);
}

// Scales that a searching rule compares: `Moves` candidates for each block of a batch, the first of
// which wins a tie. A block of zeros keeps the scale that zeros have.
struct Search {
  int candidates;
  Scales scales[3];
  double error[3][kBatch];
};

inline void propose(const Amax& found, int n, const Rule& rule, const Scales& s, Search& search) {
  int32_t amax[kBatch], poisoned[kBatch];
  Scales& first = search.scales[0];
  settle(found, n, rule, amax, poisoned, first);
  const ms_format& f = rule.plan->format;
  search.candidates = f.power_of_two ? 3 : 2;
  for (int c = 0; c < search.candidates; ++c) {
    Scales& to = search.scales[c];
    to = s;
    if (f.power_of_two) {
      for (int i = 0; i < n; ++i) {
        const int32_t moved = amax[i] == 0 ? s.exponent[i] : s.exponent[i] + c - 1;
        const int32_t exponent = least(most(moved, f.scale_low), f.scale_high);
        set_power(to, i, exponent, amax[i], poisoned[i] != 0, rule);
      }
    } else {
      real_scales(amax, poisoned, n, c == 0 ? f.element.largest : 4.0, rule, to);
    }
    for (int i = 0; i < n; ++i) search.error[c][i] = 0.0;
  }
}

inline void choose(const Amax& found, int n, const Rule& rule, const Search& search, Scales& s) {
  for (int i = 0; i < n; ++i) {
    int best = 0;
    for (int c = 1; c < search.candidates; ++c) {
      if (search.error[c][i] < search.error[best][i]) best = c;
    }
    const Scales& from = search.scales[best];
    s.block[i] = from.block[i], s.divisor[i] = from.divisor[i], s.low[i] = from.low[i];
    s.top[i] = from.top[i], s.exponent[i] = from.exponent[i], s.indirect[i] = from.indirect[i];
  }
  if (!rule.plan->format.power_of_two && rule.of_finite) poison_infinities(found, n, s);
  any_indirect(s, n);
}

}  // namespace

#endif

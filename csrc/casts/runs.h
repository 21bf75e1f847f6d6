// Runs of values: the inner loops of all casts. A run is rounded with one scale, or (Lanes) with a
// scale for each of its values.
//
// `direct` runs never divide: the grid is moved to where the values are. `general` runs take the
// quotient x / divisor first, as the reference does, and serve real scales, the ends of float32's
// range, and every option. `ivdep`: each value depends on its own input alone, so x may be y.
#ifndef MICROSCALE_RUNS_H
#define MICROSCALE_RUNS_H

#include "scale.h"

namespace {

constexpr int32_t kSign = INT32_MIN;

struct Values {
  float* to;
};

struct Codes {
  uint8_t* to;
};

// What the options ask of a general run.
struct Wishes {
  bool overflow, keep_infinity, has_outer;
  float outer;
};

inline Wishes wishes_of(const Rule& rule) {
  return {rule.overflow, rule.of_finite && rule.grid.has_inf, rule.has_outer, rule.outer};
}

// ---------------------------------------------------------------- direct

inline void put(Values out, int i, float r, int32_t sign, int32_t, int32_t, float top,
                const Grid& g) {
  out.to[i] = signed_value(top < r ? top : r, sign, g);
}

inline void put(Codes out, int i, float r, int32_t sign, int32_t e, int32_t low, float,
                const Grid& g) {
  const int32_t code = least(steps(r, e, low, g), g.largest_code);
  out.to[i] = static_cast<uint8_t>(with_sign(code, sign, g));
}

template <ms_rounding R, bool Lanes, class Out>
inline __attribute__((always_inline)) void direct(const float* x, Out out, int n, const Grid& grid,
                                                  const Scales& s, int at,
                                                  const uint32_t* words) {
  // Copies: a store of a byte might change anything that has an address.
  const Grid g = grid;
  const int32_t *lows = s.low + at, one_low = s.low[at];
  const float *tops = s.top + at, one_top = s.top[at];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const int32_t low = Lanes ? lows[i] : one_low;
    const float top = Lanes ? tops[i] : one_top;
    const int32_t bits = bits_of(x[i]), sign = bits & kSign, a = bits & kMagnitude;
    const int32_t e = binade(a, low, g);
    const float r = round_at<R>(float_of(a), e, g, R == MS_STOCHASTIC ? words[i] : 0);
    put(out, i, r, sign, e, low, top, g);
  }
}

// ---------------------------------------------------------------- general

struct Rounded {
  float value;   // on the grid, without sign; what overflows is treated already
  int32_t q, e;  // bits of the quotient, and its binade
};

template <ms_rounding R, bool Plain>
inline Rounded round_quotient(int32_t a, float divisor, int32_t flush, uint32_t word,
                              const Grid& g, const Wishes& w) {
  if (!Plain) a = a < flush ? 0 : a;
  const float q = float_of(a) / divisor;
  const int32_t bits = bits_of(q) & kMagnitude;
  const int32_t e = least(binade(bits, g.low, g), g.high);
  float r = round_at<R>(q, e, g, word);
  if (Plain) return {r > g.largest ? g.largest : r, bits, e};
  const float infinity = float_of(kExponent);
  const float beyond = w.overflow ? (g.has_inf ? infinity : float_of(kQuietNaN)) : g.largest;
  r = r > g.largest ? beyond : r;
  return {w.keep_infinity && bits == kExponent ? infinity : r, bits, e};
}

inline void put(Values out, int i, const Rounded& r, int32_t sign, float scale, const Grid& g,
                const Wishes& w) {
  const float value = signed_value(r.value, sign, g) * scale;
  out.to[i] = w.has_outer ? value * w.outer : value;
}

inline void put(Codes out, int i, const Rounded& r, int32_t sign, float, const Grid& g,
                const Wishes&) {
  int32_t code = steps(r.value, r.e, g.low, g);
  code = bits_of(r.value) == kExponent ? g.inf_code : code;
  code = with_sign(code, sign, g);
  // NaN without a code belongs to a block whose scale is NaN.
  out.to[i] = static_cast<uint8_t>(r.value != r.value ? g.nan_code : code);
}

template <ms_rounding R, bool Lanes, bool Plain, class Out>
inline __attribute__((always_inline)) void general(const float* x, Out out, int n,
                                                   const Grid& grid, const Scales& s, int at,
                                                   const uint32_t* words, const Wishes& wishes) {
  const Grid g = grid;
  const Wishes w = wishes;
  const float *divisors = s.divisor + at, one_divisor = s.divisor[at];
  const float *blocks = s.block + at, one_block = s.block[at];
  const int32_t *flushes = s.flush + at, one_flush = s.flush[at];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const float divisor = Lanes ? divisors[i] : one_divisor, block = Lanes ? blocks[i] : one_block;
    const int32_t flush = Lanes ? flushes[i] : one_flush;
    const int32_t bits = bits_of(x[i]), sign = bits & kSign, a = bits & kMagnitude;
    const uint32_t word = R == MS_STOCHASTIC ? words[i] : 0;
    const Rounded r = round_quotient<R, Plain>(a, divisor, flush, word, g, w);
    put(out, i, r, sign, block, g, w);
  }
}

// ---------------------------------------------------------------- choice

template <ms_rounding R, bool Lanes, class Out>
inline void round_with(const float* x, Out out, int n, const Rule& rule, const Scales& s, int at,
                       const uint32_t* words, bool indirect) {
  const Grid g = rule.grid;
  if (rule.plain && !indirect) return direct<R, Lanes>(x, out, n, g, s, at, words);
  const Wishes w = wishes_of(rule);
  if (rule.plain) return general<R, Lanes, true>(x, out, n, g, s, at, words, w);
  general<R, Lanes, false>(x, out, n, g, s, at, words, w);
}

// Round n values with the scale `at`, or (Lanes) the scales from `at` on.
template <bool Lanes, class Out>
inline void round_run(const float* x, Out out, int n, const Rule& rule, const Scales& s, int at,
                      const uint32_t* words) {
  const bool indirect = Lanes ? s.any_indirect : s.indirect[at];
  switch (rule.plan->rounding) {
    case MS_EVEN: return round_with<MS_EVEN, Lanes>(x, out, n, rule, s, at, words, indirect);
    case MS_AWAY: return round_with<MS_AWAY, Lanes>(x, out, n, rule, s, at, words, indirect);
    case MS_ZERO: return round_with<MS_ZERO, Lanes>(x, out, n, rule, s, at, words, indirect);
    default: return round_with<MS_STOCHASTIC, Lanes>(x, out, n, rule, s, at, words, indirect);
  }
}

// ---------------------------------------------------------------- amax

inline void reset(Amax& found, int n) {
  for (int i = 0; i < n; ++i) found.all[i] = found.finite[i] = found.infinite[i] = 0;
}

// Add n values of block `at`.
inline void add_row(Amax& found, const float* x, int n, int at, bool of_finite) {
  int32_t all = 0;
  for (int i = 0; i < n; ++i) all = most(all, bits_of(x[i]) & kMagnitude);
  found.all[at] = most(found.all[at], all);
  if (!of_finite) return;
  int32_t finite = 0, infinite = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t a = bits_of(x[i]) & kMagnitude;
    finite = most(finite, a < kExponent ? a : 0);
    infinite |= a == kExponent;
  }
  found.finite[at] = most(found.finite[at], finite);
  found.infinite[at] |= infinite;
}

// Add one value to each of n lanes.
inline void add_lanes(Amax& found, const float* x, int n, bool of_finite) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) found.all[i] = most(found.all[i], bits_of(x[i]) & kMagnitude);
  if (!of_finite) return;
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const int32_t a = bits_of(x[i]) & kMagnitude;
    found.finite[i] = most(found.finite[i], a < kExponent ? a : 0);
    found.infinite[i] |= a == kExponent;
  }
}

// ---------------------------------------------------------------- errors of searched scales

// Add to `error` the squared errors of n values, from the first to the last; what is not finite
// counts nothing. Rounding is to nearest whatever the cast's is.
template <bool Lanes>
inline void add_errors(const float* x, int n, const Rule& rule, const Scales& s, int at,
                       float* buffer, double* error) {
  const Wishes w = {false, rule.grid.has_inf, rule.has_outer, rule.outer};
  const Grid g = rule.grid;
  general<MS_EVEN, Lanes, false>(x, Values{buffer}, n, g, s, at, nullptr, w);
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const int32_t a = bits_of(x[i]) & kMagnitude;
    const float seen = a < s.flush[at + (Lanes ? i : 0)] ? 0.0f : x[i];
    const double gap = static_cast<double>(seen) - static_cast<double>(buffer[i]);
    const bool finite = gap - gap == 0.0;
    const double square = finite ? gap * gap : 0.0;
    if (Lanes) {
      error[i] += square;
    } else {
      *error += square;
    }
  }
}

}  // namespace

#endif

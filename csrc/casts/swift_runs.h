// Rows and strips in vectors: rounding to even without any other option, under scales of every
// kind. The steps are those of runs.h.
#ifndef MICROSCALE_SWIFT_RUNS_H
#define MICROSCALE_SWIFT_RUNS_H

#include "job.h"
#include "vectors.h"

#include <type_traits>

namespace {

#if defined(__AVX512BW__)

// Whether the options and the element have vectors: not every grid has codes of whole vectors.
inline bool rounds_swiftly(const Job& job) {
  const ms_element& e = job.plan->format.element;
  return job.rule.plain && job.plan->rounding == MS_EVEN && !job.search &&
         (e.bits == 4 || e.bits == 6 || e.bits == 8) && (e.is_integer || e.has_negative_zero);
}

inline bool is_swift_row(const Job& job) {
  const ms_geometry& g = job.geometry;
  return rounds_swiftly(job) && g.x_axis == 1 && (job.codes || g.y_axis == 1) &&
         job.block % 16 == 0;
}

// Strips of 64 lanes.
inline bool is_swift_strip(const Job& job, int lanes) {
  const ms_geometry& g = job.geometry;
  return rounds_swiftly(job) && lanes % 64 == 0 && g.x[job.inner] == 1 &&
         (job.codes || g.y[job.inner] == 1);
}

// What rounds 16 values: the grid where the values are (Direct), or the grid of quotients.
template <bool Integer, bool Direct>
struct Step {
  __m512i low;
  __m512 top, divisor, block;

  // One scale for all.
  static MS_INLINE Step one(const Scales& s, int i, const Grid& g) {
    const __m512 none = _mm512_setzero_ps();
    if (Direct) return {_mm512_set1_epi32(s.low[i]), _mm512_set1_ps(s.top[i]), none, none};
    return {_mm512_set1_epi32(g.low), _mm512_set1_ps(g.largest), _mm512_set1_ps(s.divisor[i]),
            _mm512_set1_ps(s.block[i])};
  }

  // The scales of 16 lanes.
  static MS_INLINE Step lanes(const Scales& s, int i, const Grid& g) {
    const __m512 none = _mm512_setzero_ps();
    if (Direct) return {_mm512_loadu_si512(s.low + i), _mm512_loadu_ps(s.top + i), none, none};
    return {_mm512_set1_epi32(g.low), _mm512_set1_ps(g.largest), _mm512_loadu_ps(s.divisor + i),
            _mm512_loadu_ps(s.block + i)};
  }

  MS_INLINE __m512i magnitude(__m512i x, const Lattice& l) const {
    const __m512i a = _mm512_and_epi32(x, l.magnitude);
    if (Direct) return a;
    const __m512 q = _mm512_div_ps(_mm512_castsi512_ps(a), divisor);
    return _mm512_and_epi32(_mm512_castps_si512(q), l.magnitude);
  }

  MS_INLINE __m512i value(__m512i x, const Lattice& l, __m512 outer) const {
    const __m512i v = value16<Integer, !Direct>(magnitude(x, l), x, l, low, top);
    if (Direct) return v;
    const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(v), block);
    return _mm512_castps_si512(_mm512_mul_ps(scaled, outer));
  }

  MS_INLINE __m512i code(__m512i x, const Lattice& l, __m512i nan_code) const {
    const __m512i a = magnitude(x, l), code = code16<Integer, !Direct>(a, x, l, low);
    if (Direct) return code;
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(a, _mm512_set1_epi32(kExponent));
    return _mm512_mask_mov_epi32(code, nan, nan_code);
  }
};

// The largest magnitudes of `blocks` blocks of n values.
template <class From>
inline void amax_of_blocks(const From* x, int n, int block, int blocks, int32_t* amax) {
  const __m512i magnitude = _mm512_set1_epi32(kMagnitude);
  int k = 0;
  for (; block <= 32 && block % 16 == 0 && k + 16 <= blocks && (k + 16) * block <= n; k += 16) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const From* from = x + (k + i) * block;
      v[i] = _mm512_and_epi32(bits16(from), magnitude);
      if (block == 32) {
        v[i] = _mm512_max_epi32(v[i], _mm512_and_epi32(bits16(from + 16), magnitude));
      }
    }
    _mm512_storeu_si512(amax + k, largest_of_sixteen(v));
  }
  for (; k < blocks; ++k) {
    const From *from = x + k * block, *end = x + least((k + 1) * block, n);
    __m512i largest[4] = {};
    for (; from + 64 <= end; from += 64) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i v = _mm512_and_epi32(bits16(from + 16 * i), magnitude);
        largest[i] = _mm512_max_epi32(largest[i], v);
      }
    }
    for (; from < end; from += 16) {
      const __m512i v = load_some(from, static_cast<int>(least<int64_t>(16, end - from)));
      largest[0] = _mm512_max_epi32(largest[0], _mm512_and_epi32(v, magnitude));
    }
    const __m512i two = _mm512_max_epi32(largest[0], largest[1]);
    const __m512i others = _mm512_max_epi32(largest[2], largest[3]);
    amax[k] = _mm512_reduce_max_epi32(_mm512_max_epi32(two, others));
  }
}

// The same of a row from element `at` on.
inline void swift_amax(const Job& job, int64_t at, int n, int blocks, int32_t* amax) {
  const int block = static_cast<int>(least<int64_t>(job.block, n));
  with_type(job.x, job.x_type, at,
            [&](auto* x) { amax_of_blocks(x, n, block, blocks, amax); });
}

// Calls round(first of 64 values, four steps) for the values of a row but the last n mod 64.
template <bool Integer, bool Direct, class Round>
inline void for_64_of_row(const Job& job, int n, const Scales& s, const Round& round) {
  const int per = static_cast<int>(least<int64_t>(job.block, n + 16) / 16);
  Step<Integer, Direct> steps[4];
  for (int i = 0, number = 0, left = per; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      steps[k] = Step<Integer, Direct>::one(s, number, job.rule.grid);
      if (--left == 0) left = per, ++number;
    }
    round(i, steps);
  }
}

template <bool Integer, bool Direct>
inline void row_values(const Job& job, int64_t from, int64_t to, int n, const Scales& s) {
  const Lattice l(job.rule.grid);
  const __m512 outer = _mm512_set1_ps(job.rule.outer);
  const bool stream = job.streamed && is_on_line(job, to);
  for_64_of_row<Integer, Direct>(job, n, s, [&](int i, const Step<Integer, Direct>* steps) {
    __m512i v[4];
    load64(job.x, job.x_type, from + i, v);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) v[k] = steps[k].value(v[k], l, outer);
    store64(job.y, job.y_type, to + i, v, stream);
  });
  if (stream) _mm_sfence();
}

template <bool Integer, bool Direct, int Bits>
inline void row_codes(const Job& job, int64_t from, uint8_t* to, int n, const Scales& s) {
  const Lattice l(job.rule.grid);
  const __m512i nan_code = _mm512_set1_epi32(job.rule.grid.nan_code);
  for_64_of_row<Integer, Direct>(job, n, s, [&](int i, const Step<Integer, Direct>* steps) {
    __m512i v[4];
    load64(job.x, job.x_type, from + i, v);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) v[k] = steps[k].code(v[k], l, nan_code);
    put_codes<Bits>(to_bytes(v), to + i * Bits / 8);
  });
}

// Values of `rows` rows of 64 lanes, `lanes` in all.
template <bool Integer, bool Direct>
inline void strip_values(const Job& job, int64_t from, int64_t to, int64_t rows, int lanes,
                         const Scales& s, bool one_scale) {
  const ms_geometry& g = job.geometry;
  const Lattice l(job.rule.grid);
  const __m512 outer = _mm512_set1_ps(job.rule.outer);
  const bool stream =
      job.streamed && is_on_line(job, to) && g.y_axis * size_of(job.y_type) % 64 == 0;
  for (int first = 0; first < lanes; first += 64) {
    Step<Integer, Direct> steps[4];
    for (int k = 0; k < 4; ++k) {
      steps[k] = one_scale ? Step<Integer, Direct>::one(s, 0, job.rule.grid)
                           : Step<Integer, Direct>::lanes(s, first + 16 * k, job.rule.grid);
    }
    for (int64_t r = 0; r < rows; ++r) {
      __m512i v[4];
      load64(job.x, job.x_type, from + r * g.x_axis + first, v);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) v[k] = steps[k].value(v[k], l, outer);
      store64(job.y, job.y_type, to + r * g.y_axis + first, v, stream);
    }
  }
  if (stream) _mm_sfence();
}

// Codes of 16 rows of 16 lanes, packed along the rows: `apart` bytes from lane to lane.
template <bool Integer, bool Direct, int Bits, class From>
inline void pack_16x16(const From* x, int64_t row, const Step<Integer, Direct>& step,
                       const Lattice& l, __m512i nan_code, uint8_t* to, int64_t apart) {
  constexpr int held = Bits == 4 ? 8 : 4;  // codes of one lane in 32 bits
  __m512i w[4] = {};
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    const __m512i code = step.code(bits16(x + r * row), l, nan_code);
    w[r / held] = _mm512_or_epi32(w[r / held], _mm512_slli_epi32(code, r % held * Bits));
  }
  // 4 x 4 words turned within each quarter: of lanes 4 q to 4 q + 3.
  const __m512i a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpackhi_epi32(w[0], w[1]);
  alignas(64) uint8_t lanes[4][64];
  if (Bits == 4) {
    _mm512_store_si512(lanes[0], a);
    _mm512_store_si512(lanes[1], b);
    for (int lane = 0; lane < 16; ++lane) {
      memcpy(to + lane * apart, lanes[lane / 2 % 2] + lane / 4 * 16 + lane % 2 * 8, 8);
    }
    return;
  }
  const __m512i c = _mm512_unpacklo_epi32(w[2], w[3]), d = _mm512_unpackhi_epi32(w[2], w[3]);
  __m512i turned[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),
                       _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
  const __m512i three = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  for (int k = 0; k < 4; ++k) {
    if (Bits == 6) turned[k] = _mm512_shuffle_epi8(turned[k], three);
    _mm512_store_si512(lanes[k], turned[k]);
  }
  for (int lane = 0; lane < 16; ++lane) {
    memcpy(to + lane * apart, lanes[lane % 4] + lane / 4 * 16, 2 * Bits);
  }
}

template <bool Integer, bool Direct, int Bits>
inline void strip_codes(const Job& job, int64_t from, uint8_t* to, int64_t rows, int lanes,
                        const Scales& s, bool one_scale) {
  const ms_geometry& g = job.geometry;
  const Lattice l(job.rule.grid);
  const __m512i nan_code = _mm512_set1_epi32(job.rule.grid.nan_code);
  const int64_t apart = g.y[job.inner];
  with_type(job.x, job.x_type, from, [&](auto* x) {
    for (int first = 0; first < lanes; first += 16) {
      const auto step = one_scale ? Step<Integer, Direct>::one(s, 0, job.rule.grid)
                                  : Step<Integer, Direct>::lanes(s, first, job.rule.grid);
      for (int64_t r = 0; r < rows; r += 16) {
        pack_16x16<Integer, Direct, Bits>(x + r * g.x_axis + first, g.x_axis, step, l, nan_code,
                                          to + first * apart + r * Bits / 8, apart);
      }
    }
  });
}

// The largest magnitudes of lanes, 64 at a time; each 64 fetch what the next will read.
inline void swift_strip_amax(const Job& job, int64_t from, int64_t rows, int lanes,
                             int32_t* amax) {
  const int64_t apart = job.geometry.x_axis, size = size_of(job.x_type);
  const __m512i magnitude = _mm512_set1_epi32(kMagnitude);
  for (int first = 0; first < lanes; first += 64) {
    __m512i largest[4] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = from + r * apart + first;
      const char* next = static_cast<const char*>(job.x) + (at + 64) * size;
      for (int64_t line = 0; line < 64 * size; line += 64) _mm_prefetch(next + line, _MM_HINT_T0);
      __m512i v[4];
      load64(job.x, job.x_type, at, v);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        largest[k] = _mm512_max_epi32(largest[k], _mm512_and_epi32(v[k], magnitude));
      }
    }
    for (int k = 0; k < 4; ++k) _mm512_storeu_si512(amax + first + 16 * k, largest[k]);
  }
}

// Calls what(Integer, Direct) with both as types.
template <class What>
inline void with_kind(const Job& job, bool direct, const What& what) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (job.rule.grid.is_integer) return direct ? what(Yes{}, Yes{}) : what(Yes{}, No{});
  direct ? what(No{}, Yes{}) : what(No{}, No{});
}

inline bool all_direct(const Job& job, const Scales& s) {
  return job.plan->format.power_of_two && !s.any_indirect;
}

// The first n / 64 x 64 values of a row; how many were done.
inline int swift_row(const Job& job, const Place& p, int64_t at, int n, const Scales& s) {
  const int64_t from = p.x + at;
  with_kind(job, all_direct(job, s), [&](auto integer, auto direct) {
    if (!job.codes) return row_values<integer, direct>(job, from, p.y + at, n, s);
    uint8_t* to = static_cast<uint8_t*>(job.y) + p.y + at * job.bits / 8;
    if (job.bits == 4) return row_codes<integer, direct, 4>(job, from, to, n, s);
    if (job.bits == 6) return row_codes<integer, direct, 6>(job, from, to, n, s);
    row_codes<integer, direct, 8>(job, from, to, n, s);
  });
  return n / 64 * 64;
}

inline void swift_strip(const Job& job, const Place& p, int64_t row, int64_t rows, int lanes,
                        const Scales& s, bool one) {
  const ms_geometry& g = job.geometry;
  const int64_t from = p.x + row * g.x_axis;
  with_kind(job, all_direct(job, s), [&](auto integer, auto direct) {
    if (!job.codes) {
      const int64_t to = p.y + row * g.y_axis;
      return strip_values<integer, direct>(job, from, to, rows, lanes, s, one);
    }
    uint8_t* to = static_cast<uint8_t*>(job.y) + p.y + row * job.bits / 8;
    if (job.bits == 4) return strip_codes<integer, direct, 4>(job, from, to, rows, lanes, s, one);
    if (job.bits == 6) return strip_codes<integer, direct, 6>(job, from, to, rows, lanes, s, one);
    strip_codes<integer, direct, 8>(job, from, to, rows, lanes, s, one);
  });
}

#else

inline bool is_swift_row(const Job&) { return false; }
inline bool is_swift_strip(const Job&, int) { return false; }
inline void swift_amax(const Job&, int64_t, int, int, int32_t*) {}
inline void swift_strip_amax(const Job&, int64_t, int64_t, int, int32_t*) {}
inline int swift_row(const Job&, const Place&, int64_t, int, const Scales&) { return 0; }
inline void swift_strip(const Job&, const Place&, int64_t, int64_t, int, const Scales&, bool) {}

#endif

}  // namespace

#endif

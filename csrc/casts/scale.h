// The shared scales of a batch of blocks, from the largest magnitudes of the blocks.
#ifndef MICROSCALE_SCALE_H
#define MICROSCALE_SCALE_H

#include "grid.h"

namespace {

constexpr int kBatch = 256;  // blocks, or lanes, that are treated together

// What one pass over a block finds, as bits of magnitudes.
struct Amax {
  int32_t all[kBatch];     // of all values: above infinity where a NaN is
  int32_t finite[kBatch];  // of the finite values; filled where nonfinite = element
  int32_t infinite[kBatch];  // whether an infinity is there; likewise
};

// The scales of a batch. A block is `direct` if its values can be rounded where they stand, without
// dividing: its scale is a power of two and nothing leaves the normal range of float32.
struct Scales {
  float block[kBatch];     // what is stored, as a value; NaN for a poisoned block
  float divisor[kBatch];   // what x is divided by; infinity for a scale that underflowed to 0
  int32_t flush[kBatch];   // magnitudes with smaller bits become zero
  int32_t low[kBatch];     // direct: the grid's low exponent and largest value, times the scale
  float top[kBatch];
  int32_t exponent[kBatch];  // of a power of two
  int32_t indirect[kBatch];
  int32_t any_indirect;
};

// The numbers of a scale rule, derived once for each call.
struct Rule {
  const ms_plan* plan;
  Grid grid;
  int32_t bump;  // floor(log2 amax) is raised by one where amax's fraction reaches this
  bool plain;    // no option but the rounding departs from its default
  bool of_finite, flush_element, flush_block, overflow;
  float outer;  // the tensor scale, 1 where there is none
  bool has_outer;
};

inline Rule rule_of(const ms_plan* plan) {
  Rule rule{};
  const ms_format& f = plan->format;
  const int m = f.element.mantissa_bits;
  rule.plan = plan;
  rule.grid = grid_of(f.element);
  rule.bump = kNormal;  // never reached
  if (f.rule == MS_CEIL) rule.bump = 1;
  // R carries into the next binade from the middle of the last gap below it.
  if (f.rule == MS_RULE_EVEN) rule.bump = kNormal - (1 << (22 - m));
  if (f.rule == MS_RCEIL) rule.bump = (bits_of(rule.grid.largest) & (kNormal - 1)) + 1;
  rule.of_finite = plan->nonfinite;
  rule.flush_element = plan->flush == MS_FLUSH_ELEMENT;
  rule.flush_block = plan->flush == MS_FLUSH_BLOCK;
  rule.overflow = plan->overflow;
  rule.plain = !rule.of_finite && !plan->flush && !rule.overflow;
  rule.outer = 1.0f;
  rule.has_outer = f.has_tensor_scale;
  return rule;
}

// floor(log2) of a positive finite float by its bits, and its fraction of 23 bits, subnormals too.
inline int32_t floor_log2(int32_t bits, int32_t* fraction) {
  // A subnormal's bits are an integer times 2^-149.
  const int32_t tiny = bits_of(static_cast<float>(bits)) - (149 << 23);
  const int32_t normal = bits < kNormal ? tiny : bits;
  *fraction = normal & (kNormal - 1);
  return (normal >> 23) - 127;
}

inline void set_power(Scales& s, int i, int32_t exponent, int32_t amax, bool poisoned,
                      const Rule& rule) {
  const ms_element& e = rule.plan->format.element;
  const float scale = poisoned ? float_of(kQuietNaN) : power_of_two(exponent);
  s.exponent[i] = exponent;
  s.block[i] = scale;
  s.divisor[i] = scale;
  // Both ends of the range: the spacing is normal, and C does not overflow.
  const bool in_range = exponent + e.emin + 127 > e.mantissa_bits &&
                        (amax >> 23) <= 229 + e.mantissa_bits;
  const bool zero = amax == 0;
  const bool direct = (in_range || zero) && !poisoned;
  s.indirect[i] = !direct;
  s.low[i] = zero ? rule.grid.low : rule.grid.low + static_cast<int32_t>(
                                        static_cast<uint32_t>(exponent) << 23);
  s.top[i] = zero ? rule.grid.largest
                  : float_of(direct ? bits_of(rule.grid.largest) +
                                          static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23)
                                    : 0);
}

inline void power_scales(const int32_t* amax, const int32_t* poisoned, int n, const Rule& rule,
                         Scales& s) {
  const ms_format& f = rule.plan->format;
  const int32_t emax = f.element.emax, least_exponent = f.scale_low, most_exponent = f.scale_high;
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    int32_t fraction;
    int32_t exponent = floor_log2(amax[i], &fraction) - emax + (fraction >= rule.bump ? 1 : 0);
    exponent = least(most(exponent, least_exponent), most_exponent);
    exponent = amax[i] == 0 ? least_exponent : exponent;
    set_power(s, i, exponent, amax[i], poisoned[i] != 0, rule);
  }
}

// x rounded to nearest on a grid of positive values, saturating; the arithmetic is float64's, whose
// quotient is exact enough to be rounded once to any scale format.
inline double to_scale_grid(double x, const ms_element& g) {
  const int64_t field = 0x7ff0000000000000, low = static_cast<int64_t>(g.emin + 1023) << 52;
  const int64_t high = static_cast<int64_t>(g.emax + 1023) << 52;
  const int64_t e = least(most(bits_of(x) & field, low), high);
  const double c = double_of(e + (static_cast<int64_t>(52 - g.mantissa_bits) << 52));
  const double r = (x + c) - c;
  return r > g.largest ? g.largest : r;
}

inline void real_scales(const int32_t* amax, const int32_t* poisoned, int n, double largest,
                        const Rule& rule, Scales& s) {
  const ms_element& grid = rule.plan->format.grid;
  const float narrow = static_cast<float>(largest);
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const float top = float_of(amax[i]);
    double quotient = static_cast<double>(top) / largest;
    if (rule.has_outer) {
      // A tensor scale that underflowed to zero leaves zero scales, not NaN.
      quotient = rule.outer == 0.0f ? 0.0 : static_cast<double>(top / narrow / rule.outer);
    }
    float scale = static_cast<float>(to_scale_grid(quotient, grid));
    scale = amax[i] == 0 ? 1.0f : scale;
    s.block[i] = poisoned[i] ? float_of(kQuietNaN) : scale;
    const float divisor = rule.has_outer ? s.block[i] * rule.outer : s.block[i];
    s.divisor[i] = divisor == 0.0f ? float_of(kExponent) : divisor;
    s.indirect[i] = 1;
  }
}

// The tensor scale from the largest magnitude of the tensor.
inline float tensor_scale(int32_t amax, const ms_format& f) {
  const double quotient =
      static_cast<double>(float_of(amax)) / (f.scale_largest * f.element.largest);
  if (quotient == 0.0) return 1.0f;
  return static_cast<float>(to_scale_grid(quotient, f.tensor_grid));
}

// Amax and poison of each block as its scale sees them.
inline void settle(const Amax& found, int n, const Rule& rule, int32_t* amax, int32_t* poisoned,
                   Scales& s) {
  for (int i = 0; i < n; ++i) {
    int32_t top = rule.of_finite ? found.finite[i] : found.all[i];
    const bool bad = rule.of_finite ? found.all[i] > kExponent && !rule.grid.has_nan
                                    : found.all[i] >= kExponent;
    const bool tiny = top < kNormal;
    const bool flushed = tiny && (rule.flush_element || rule.flush_block);
    s.flush[i] = rule.flush_element || flushed ? kNormal : 0;
    top = flushed || bad ? 0 : top;
    amax[i] = top;
    poisoned[i] = bad;
  }
}

inline void any_indirect(Scales& s, int n) {
  int32_t any = 0;
  for (int i = 0; i < n; ++i) any |= s.indirect[i];
  s.any_indirect = any;
}

// An infinity beside a scale that underflowed to zero would vanish: make the block NaN instead.
inline void poison_infinities(const Amax& found, int n, Scales& s) {
  for (int i = 0; i < n; ++i) {
    if (s.block[i] == 0.0f && found.infinite[i]) {
      s.block[i] = s.divisor[i] = float_of(kQuietNaN);
    }
  }
}

template <class T, class Bits>
inline void put_scales(void* scales, int64_t at, int64_t apart, int n, Bits bits) {
  T* to = static_cast<T*>(scales) + at;
  if (apart == 1) {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) to[i] = static_cast<T>(bits(i));
  } else {
    for (int i = 0; i < n; ++i) to[i * apart] = static_cast<T>(bits(i));
  }
}

// Store the first n scales, `apart` from each other: codes of 8 bits, bfloat16 or float32.
inline void store_scales(void* scales, int64_t at, int64_t apart, const Scales& s, int n,
                         const ms_format& f) {
  const float* block = s.block;
  const int32_t *exponent = s.exponent, low = f.scale_low, nan_code = f.grid.nan_code;
  if (f.power_of_two) {
    put_scales<uint8_t>(scales, at, apart, n, [=](int i) {
      return block[i] == block[i] ? exponent[i] - low : 255;
    });
  } else if (f.scale_bits == 32) {
    put_scales<int32_t>(scales, at, apart, n, [=](int i) { return bits_of(block[i]); });
  } else if (f.scale_bits == 16) {  // on bfloat16's grid
    put_scales<uint16_t>(scales, at, apart, n, [=](int i) {
      return static_cast<uint32_t>(bits_of(block[i])) >> 16;
    });
  } else {
    const Grid g = grid_of(f.grid);
    put_scales<uint8_t>(scales, at, apart, n, [=](int i) {
      const int32_t e = binade(bits_of(block[i]), g.low, g);
      return block[i] == block[i] ? steps(block[i], e, g.low, g) : nan_code;
    });
  }
}

}  // namespace

#endif

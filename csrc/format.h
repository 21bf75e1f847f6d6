// The numbers of a format, as microscale/formats states them. Python fills these records; no number about a
// format is written in C++. Enumerations below have the order of their Python twins in
// kernels/native/records.py.
#ifndef MICROSCALE_FORMAT_H
#define MICROSCALE_FORMAT_H

#include <stdint.h>

#define MS_API __attribute__((visibility("default")))  // what Python calls

enum ms_type { MS_FLOAT32, MS_BFLOAT16, MS_FLOAT16 };
enum ms_rounding { MS_EVEN, MS_AWAY, MS_ZERO, MS_STOCHASTIC };
enum ms_rule { MS_FLOOR, MS_CEIL, MS_RULE_EVEN, MS_RCEIL, MS_MSE, MS_AMAX, MS_FOUR_OVER_SIX };
enum ms_flush { MS_FLUSH_OFF, MS_FLUSH_ELEMENT, MS_FLUSH_BLOCK };
enum ms_status { MS_OK, MS_NO_MEMORY, MS_NO_SEED };

// The grid of an element or of a real-valued scale (ElementFormat). Codes that do not exist are -1.
typedef struct {
  int32_t bits, mantissa_bits, emin, emax;
  int32_t is_integer, has_negative_zero;
  int32_t largest_code, inf_code, nan_code;
  int32_t unused;  // keeps `largest` aligned alike everywhere
  double largest;
} ms_element;

// A block format. `scale_bits` is 8, 16 or 32; a power of two has the exponents scale_low to
// scale_high and no grid. `block` is 0 for blocks as long as the data.
typedef struct {
  ms_element element, grid, tensor_grid;
  int32_t power_of_two, scale_bits, scale_low, scale_high;
  int32_t rule, has_tensor_scale;
  double scale_largest;
  int64_t block;
} ms_format;

// A format and the options of one cast. overflow: 1 = nonfinite; nonfinite: 1 = element.
typedef struct {
  ms_format format;
  int32_t rounding, overflow, nonfinite, flush;
} ms_plan;

// How to walk through a tensor: the lanes (every dimension but the axis) and the axis, with strides
// in elements of the values read (x), written (y), the logical row-major index, and the scales.
enum { MS_DIMENSIONS = 8 };
typedef struct {
  int64_t dimensions;
  int64_t shape[MS_DIMENSIONS], x[MS_DIMENSIONS], y[MS_DIMENSIONS];
  int64_t index[MS_DIMENSIONS], scale[MS_DIMENSIONS];
  int64_t length, x_axis, y_axis, index_axis, scale_axis;
} ms_geometry;

#endif

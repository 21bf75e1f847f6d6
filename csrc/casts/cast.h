// The table of cast kernels that each instruction set fills, and the C interface over it.
#ifndef MICROSCALE_CAST_H
#define MICROSCALE_CAST_H

#include "../format.h"

// What one call works on. `scales` is null for a cast to values. Threads: as many as torch has.
typedef struct {
  const ms_plan* plan;
  ms_geometry geometry;
  const void* x;
  void* y;
  void* scales;
  const int64_t* seed;  // int64 [4], or null unless rounding is stochastic
  float* tensor_scale;  // written by quantize, read by dequantize; null where there is none
  int32_t x_type, y_type, threads;
  int32_t given;  // y is memory that is there already: it may be written past the caches
} ms_job;

typedef struct {
  int (*cast)(const ms_job*);
  int (*quantize)(const ms_job*);
  int (*quantize_both)(const ms_job*, const ms_job*);  // of one tensor along neighbouring axes
  int (*dequantize)(const ms_job*);
} ms_cast_table;

extern const ms_cast_table ms_cast_baseline;
#if defined(MICROSCALE_X86)
extern const ms_cast_table ms_cast_avx2, ms_cast_avx512;
#endif

#endif

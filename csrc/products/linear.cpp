// Which kernel multiplies: by the processor, the number of rows of x, and the numbers in it.
//
// Fast kernels ask for numbers that cannot overflow, underflow or be taken for zero on their way;
// what does not fit goes to slower ones that decode weights to float32 first, as `dequantize` does,
// row by row where that is possible.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "memory.h"
#include "tables.h"

namespace {

// The kernels with VBMI take 64 values at a time, in one, two or four blocks or a part of one.
bool fits_chunks(const ms_packed& w) {
  return w.block == 0 || w.block == 16 || w.block == 32 || w.block % 64 == 0;
}

const ProductKernels& kernels_for(const ms_packed& w) { return product_kernels(fits_chunks(w)); }

// ---------------------------------------------------------------- what is in x and w

struct Magnitudes {
  bool tiny = false;       // below 2^-100, not 0
  bool subnormal = false;
  bool huge = false;       // finite and above 2^100
};

// Signed, and masks instead of branches, so that any processor compares vectors of them.
template <class Signed>
Magnitudes magnitudes(const ms_dense& x, int64_t length, int threads) {
  constexpr int mantissa = sizeof(Signed) == 4 ? 23 : 7;
  constexpr Signed all = sizeof(Signed) == 4 ? Signed(0x7fffffff) : Signed(0x7fff);
  constexpr Signed normal = Signed(1) << mantissa, infinity = Signed(255) << mantissa;
  constexpr Signed low = Signed(27) << mantissa, high = Signed(228) << mantissa;
  int tiny = 0, subnormal = 0, huge = 0;
#pragma omp parallel for num_threads(threads) reduction(| : tiny, subnormal, huge)
  for (int64_t m = 0; m < x.rows; ++m) {
    const Signed* row = static_cast<const Signed*>(x.data) + m * x.stride;
    Signed small = 0, smaller = 0, large = 0;
    for (int64_t k = 0; k < length; ++k) {
      const Signed u = row[k] & all;
      const Signed some = u > 0 ? -1 : 0;
      small |= some & Signed(u < low ? -1 : 0);
      smaller |= some & Signed(u < normal ? -1 : 0);
      large |= Signed(u >= high ? -1 : 0) & Signed(u < infinity ? -1 : 0);
    }
    tiny |= small, subnormal |= smaller, huge |= large;
  }
  return {tiny != 0, subnormal != 0, huge != 0};
}

Magnitudes magnitudes_of(const ms_dense& x, int64_t length, int threads) {
  return x.type == MS_BFLOAT16 ? magnitudes<int16_t>(x, length, threads)
                               : magnitudes<int32_t>(x, length, threads);
}

bool scales_are_safe(const ms_packed& w, int threads) {
  const SafeScales safe(w);
  const int64_t rows = w.scale_stride ? w.rows : 1, blocks = blocks_of(w);
  bool by_code[256];
  if (has_scale_codes(w))
    for (uint32_t c = 0; c < 256; ++c) by_code[c] = safe.holds(scale_of_code(w, c));
  uint8_t least = 0, span = 0;
  if (w.scale_kind == MS_SCALE_E8M0) {
    least = uint8_t(std::find(by_code, by_code + 255, true) - by_code);
    span = uint8_t(std::count(by_code, by_code + 256, true) - 1);
    if (!by_code[least]) return false;
  }
  int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(| : bad)
  for (int64_t row = 0; row < rows; ++row) {
    if (w.scale_kind == MS_SCALE_E8M0) {  // safe codes follow each other: a loop of vectors
      const uint8_t* codes = static_cast<const uint8_t*>(w.scales) + row * w.scale_stride;
      uint8_t beyond = 0;
      for (int64_t i = 0; i < blocks; ++i) beyond |= uint8_t(codes[i] - least) > span;
      bad |= beyond;
    } else if (w.scale_kind == MS_SCALE_TABLE) {
      const uint8_t* codes = static_cast<const uint8_t*>(w.scales) + row * w.scale_stride;
      for (int64_t i = 0; i < blocks; ++i) bad |= !by_code[codes[i]];
    } else {
      for (int64_t i = 0; i < blocks; ++i) bad |= !safe.holds(scale_at(w, row, i));
    }
  }
  return !bad;
}

// Bits from the highest to the lowest set one of any finite value's significand.
int significant_bits(const float* values, int count) {
  int most = 1;
  for (int c = 0; c < count; ++c) {
    const uint32_t u = bits_of(values[c]);
    if ((u & 0x7f800000u) == 0x7f800000u || !(u & 0x7fffffffu)) continue;
    const uint32_t significand = (u & 0x7fffffu) | 0x800000u;
    most = std::max(most, 24 - __builtin_ctz(significand));
  }
  return most;
}

// Whether element times block scale is exact in bfloat16, or the scale is one a row.
bool suits_bfloat16(const ms_packed& w) {
  if (w.block == 0 || w.scale_kind == MS_SCALE_E8M0) return true;
  if (w.scale_kind != MS_SCALE_TABLE) return false;
  return significant_bits(w.values, 1 << w.bits) + significant_bits(w.scale_values, 256) <= 8;
}

// Whether every element is a whole multiple, at most 128, of the smallest.
bool is_integral(const ms_packed& w) {
  float least = HUGE_VALF, most = 0;
  for (int c = 0; c < 1 << w.bits; ++c) {
    const float v = std::fabs(w.values[c]);
    if (!(v <= FLT_MAX)) return false;
    if (v > 0) least = std::fmin(least, v);
    most = std::fmax(most, v);
  }
  if (!(most <= 128 * least)) return false;
  for (int c = 0; c < 1 << w.bits; ++c)
    if (w.values[c] / least != std::nearbyint(w.values[c] / least)) return false;
  return true;
}

// ---------------------------------------------------------------- x in another type

struct Copy {
  Buffer<uint8_t> data;
  ms_dense x;
};

template <class T>
Copy room_for(int64_t rows, int64_t length, int32_t type) {
  Copy copy{allocate<uint8_t>(rows * length * int64_t(sizeof(T))), {nullptr, rows, length, type}};
  copy.x.data = copy.data.get();
  return copy;
}

// Whether float32 values are all numbers of bfloat16, as values cast to narrow formats are.
bool are_bfloat16(const ms_dense& x, int64_t length) {
  for (int64_t m = 0; m < x.rows; ++m) {
    const uint32_t* row = static_cast<const uint32_t*>(x.data) + m * x.stride;
    uint32_t lower = 0;
    for (int64_t k = 0; k < length; ++k) lower |= row[k] & 0xffffu;
    if (lower) return false;
  }
  return true;
}

Copy as_bfloat16(const ms_dense& x, int64_t length, int threads) {
  Copy copy = room_for<uint16_t>(x.rows, length, MS_BFLOAT16);
  if (!copy.data) return copy;
  uint16_t* to = reinterpret_cast<uint16_t*>(copy.data.get());
  const uint32_t* from = static_cast<const uint32_t*>(x.data);
#pragma omp parallel for num_threads(threads)
  for (int64_t m = 0; m < x.rows; ++m)
    for (int64_t k = 0; k < length; ++k)
      to[m * length + k] = uint16_t(from[m * x.stride + k] >> 16);
  return copy;
}

Copy as_float32(const ms_dense& x, int64_t length, int threads) {
  Copy copy = room_for<float>(x.rows, length, MS_FLOAT32);
  if (!copy.data) return copy;
  float* to = reinterpret_cast<float*>(copy.data.get());
  const uint16_t* from = static_cast<const uint16_t*>(x.data);
#pragma omp parallel for num_threads(threads)
  for (int64_t m = 0; m < x.rows; ++m)
    for (int64_t k = 0; k < length; ++k)
      to[m * length + k] = from_bfloat16(from[m * x.stride + k]);
  return copy;
}

// Decoded values of a packed matrix, in bfloat16 where that is exact.
template <class T>
Copy decoded(const ms_packed& x, int32_t type, int threads) {
  Copy copy = room_for<T>(x.rows, x.length, type);
  if (!copy.data) return copy;
  void* to = copy.data.get();
#pragma omp parallel for num_threads(threads)
  for (int64_t m = 0; m < x.rows; ++m)
    for (int64_t k = 0; k < x.length; ++k)
      store(to, type, m * x.length + k, value_at(x, m, k));
  return copy;
}

// ---------------------------------------------------------------- the choice

struct Call {
  const ms_packed& w;
  const float* bias;
  const ms_dense& out;
  int threads;
};

// Rows whose scales a fast kernel did not dare, by the careful one.
template <class Fast>
int with_careful_rows(const Call& call, const ms_dense& x, bool tiny, Fast fast) {
  Buffer<uint8_t> bad = allocate<uint8_t>(call.w.rows);
  if (!bad) return MS_NO_MEMORY;
  std::memset(bad.get(), 0, size_t(call.w.rows));
  const GemvCall gemv{&call.w, call.bias, &call.out, x.rows, call.threads, tiny, bad.get()};
  const int status = fast(gemv);
  if (status != MS_OK || !std::memchr(bad.get(), 1, size_t(call.w.rows))) return status;
  return kernels_for(call.w).gemv_careful(gemv, x);
}

int few_rows(const Call& call, const ms_dense& x) {
  const ProductKernels& k = kernels_for(call.w);
  const Magnitudes found = magnitudes_of(x, call.w.length, 1);
  if (!k.gemv_float32 || found.huge)
    return k.gemv_careful({&call.w, call.bias, &call.out, x.rows, call.threads, false, nullptr},
                              x);
  if (x.type == MS_BFLOAT16 && !found.tiny)
    return with_careful_rows(call, x, false,
                                 [&](const GemvCall& g) { return k.gemv_bfloat16(g, x); });
  if (x.type == MS_BFLOAT16) {
    const Copy wide = as_float32(x, call.w.length, 1);
    return wide.data ? few_rows(call, wide.x) : MS_NO_MEMORY;
  }
  return with_careful_rows(call, x, found.tiny,
                             [&](const GemvCall& g) { return k.gemv_float32(g, x); });
}

// One factor for every row of weights: its scale, if it has but one, and the tensor's.
Buffer<float> factors_of(const ms_packed& w) {
  Buffer<float> factors = allocate<float>(w.rows);
  if (!factors) return factors;
  for (int64_t row = 0; row < w.rows; ++row)
    factors[row] = (w.block ? 1.0f : scale_at(w, row, 0)) * w.tensor_scale;
  return factors;
}

// Whether no product of x, in bfloat16, is flushed to zero or overflows before its time.
bool suits_bfloat16(const ms_dense& x, const ms_packed& w, int threads) {
  const Magnitudes found = magnitudes_of(x, w.length, threads);
  const bool factored = w.block == 0 || w.tensor_scale != 1;
  return !found.subnormal && !(factored && (found.tiny || found.huge));
}

int multiply(const Call& call, const ms_dense& x, bool in_bfloat16) {
  const ProductKernels& k = kernels_for(call.w);
  if (!in_bfloat16)
    return k.gemm_float32({&call.w, nullptr, call.w.length, &x, call.bias, &call.out, nullptr, call.threads});
  const Buffer<float> factors = factors_of(call.w);
  if (!factors) return MS_NO_MEMORY;
  return k.gemm_bfloat16({&call.w, nullptr, call.w.length, &x, call.bias, &call.out, factors.get(), call.threads});
}

int many_rows(const Call& call, const ms_dense& x) {
  const ProductKernels& k = kernels_for(call.w);
  const int64_t length = call.w.length;
  const bool exact = k.gemm_bfloat16 && suits_bfloat16(call.w) &&
                     (x.type == MS_BFLOAT16 || are_bfloat16(x, length)) &&
                     suits_bfloat16(x, call.w, call.threads) && scales_are_safe(call.w, call.threads);
  if (exact != (x.type == MS_BFLOAT16)) {
    const Copy other = exact ? as_bfloat16(x, length, call.threads)
                             : as_float32(x, length, call.threads);
    if (!other.data) return MS_NO_MEMORY;
    return multiply(call, other.x, exact);
  }
  return multiply(call, x, exact);
}

// Threads that are worth waking for so many multiplications.
int worthwhile(int threads, const ms_packed& w, int64_t batch) {
  return double(w.rows) * double(w.length) * double(batch) < 65536 ? 1 : std::max(threads, 1);
}

}  // namespace

int ms_product_sizes(void) { return int(sizeof(ms_packed)); }

int ms_linear(const ms_packed* w, const void* x, int64_t batch, int64_t stride, const float* bias,
              void* out, int types, int threads) {
  if (w->rows == 0 || batch == 0) return MS_OK;
  const ms_dense left{x, batch, stride, types & 15}, result{out, batch, w->rows, types >> 4};
  const Call call{*w, bias, result, worthwhile(threads, *w, batch)};
  return batch <= GEMV_BATCH ? few_rows(call, left) : many_rows(call, left);
}

int ms_linear_packed(const ms_packed* w, const ms_packed* x, const float* bias, void* out, int type,
                     int threads) {
  if (w->rows == 0 || x->rows == 0) return MS_OK;
  const ms_dense result{out, x->rows, w->rows, type};
  const Call call{*w, bias, result, worthwhile(threads, *w, x->rows)};
  const ProductKernels& k = kernels_for(call.w);
  // From three rows on vdpbf16ps gains more from sharing weights than integers do.
  if (x->rows <= 2 && k.gemv_integer && is_integral(*w) && is_integral(*x) &&
      scales_are_safe(*x, 1)) {
    const Copy wide = decoded<float>(*x, MS_FLOAT32, 1);
    if (!wide.data) return MS_NO_MEMORY;
    return with_careful_rows(call, wide.x, false,
                             [&](const GemvCall& g) { return k.gemv_integer(g, *x); });
  }
  const bool exact = x->scale_kind == MS_SCALE_E8M0 && x->tensor_scale == 1 &&
                     scales_are_safe(*x, call.threads);
  const Copy dense = exact ? decoded<uint16_t>(*x, MS_BFLOAT16, call.threads)
                           : decoded<float>(*x, MS_FLOAT32, call.threads);
  if (!dense.data) return MS_NO_MEMORY;
  return ms_linear(w, dense.x.data, x->rows, x->length, bias, out, dense.x.type + 16 * type,
                   threads);
}

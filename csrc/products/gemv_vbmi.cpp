// GEMV with AVX-512 VBMI, BF16 and VNNI. Three kinds of products, one loop:
//   Float32    x in float32: elements widened, products fused into float32 sums;
//   BFloat16   x in bfloat16: vdpbf16ps, exact products, float32 sums;
//   Integer    x in 8-bit integers with a scale for each block: vpdpbusd, exact sums of a block.
// In all of them the sum of the 64 values of a chunk, by lane, is scaled and added to the row's.
#include <omp.h>

#include <algorithm>

#include "gemv_vbmi.h"
#include "kernels.h"
#include "memory.h"
#include "vbmi.h"

namespace {

// ---------------------------------------------------------------- the kinds

// Element of a chunk at position i of `Halves`.
inline int unpacked_order(int i) { return i % 8 + i % 32 / 8 * 16 + i / 32 * 8; }

struct Float32 {
  static constexpr int CHUNK_BYTES = 256;
  static constexpr bool SCALED_X = false;
  struct Values {
    __m512 v[4];
  };

  template <Look LOOK>
  struct Unpack : Decoder<LOOK> {
    explicit Unpack(const ms_packed& w) : Decoder<LOOK>(w.values, w.bits) {}
    static Values widen(const Halves& h) {
      return {{even_values(h.first), odd_values(h.first), even_values(h.second),
                     odd_values(h.second)}};
    }
    template <class... Mask>
    Values operator()(__m512i codes, Mask... mask) const {
      return widen(Decoder<LOOK>::operator()(codes, mask...));
    }
  };

  static Values load_x(const uint8_t* x) {
    const float* p = reinterpret_cast<const float*>(x);
    return {{_mm512_load_ps(p), _mm512_load_ps(p + 16), _mm512_load_ps(p + 32),
                 _mm512_load_ps(p + 48)}};
  }

  static __m512 dot(const Values& w, const Values& x) {
    __m512 t = _mm512_mul_ps(w.v[0], x.v[0]);
    t = _mm512_fmadd_ps(w.v[1], x.v[1], t);
    t = _mm512_fmadd_ps(w.v[2], x.v[2], t);
    return _mm512_fmadd_ps(w.v[3], x.v[3], t);
  }

  static int position(int i) {  // slot of the i-th unpacked value: evens before odds
    return i / 32 * 32 + i % 2 * 16 + i % 32 / 2;
  }
};

struct BFloat16 {
  static constexpr int CHUNK_BYTES = 128;
  static constexpr bool SCALED_X = false;
  using Values = Halves;

  template <Look LOOK>
  struct Unpack : Decoder<LOOK> {
    explicit Unpack(const ms_packed& w) : Decoder<LOOK>(w.values, w.bits) {}
  };

  static Values load_x(const uint8_t* x) {
    return {_mm512_load_si512(x), _mm512_load_si512(x + 64)};
  }

  static __m512 dot(const Values& w, const Values& x) {
    const __m512 t =
      _mm512_dpbf16_ps(_mm512_setzero_ps(), __m512bh(w.first), __m512bh(x.first));
    return _mm512_dpbf16_ps(t, __m512bh(w.second), __m512bh(x.second));
  }

  static int position(int i) { return i; }
};

// Weights as unsigned integers, 128 too large; x's part holds what that makes too much.
struct Integer {
  static constexpr int CHUNK_BYTES = 128;
  static constexpr bool SCALED_X = true;
  using Values = __m512i;

  template <Look LOOK>
  struct Unpack {
    ByteTable<LOOK> table;

    explicit Unpack(const ms_packed& w) {
      uint8_t bytes[256];
      const float unit = unit_of(w);
      for (int c = 0; c < 256; ++c)
        bytes[c] = uint8_t(int(w.values[c & ((1 << w.bits) - 1)] / unit) + 128);
      table.fill(bytes);
    }
    Values operator()(__m512i codes) const {
      // Integers of 8 bits are their own code, but for the offset.
      if constexpr (LOOK == Look::EIGHT) return _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
      else return table(codes);
    }
    Values operator()(__m512i codes, __mmask64 kept) const {
      return _mm512_mask_mov_epi8(_mm512_set1_epi8(-128), kept, (*this)(codes));
    }
  };

  static float unit_of(const ms_packed& w) {
    float least = FLT_MAX;
    for (int c = 0; c < 1 << w.bits; ++c)
      if (const float v = std::fabs(w.values[c]); v > 0) least = std::fmin(least, v);
    return least;
  }

  struct Factors {
    __m512i values, surplus;
  };

  static Factors load_x(const uint8_t* x) {
    return {_mm512_load_si512(x), _mm512_load_si512(x + 64)};
  }

  static __m512 dot(const Values& w, const Factors& x) {
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(x.surplus, w, x.values));
  }
};

// ---------------------------------------------------------------- preparing x

struct Prepared {
  int64_t chunks, row_bytes;
  Buffer<uint8_t> data;
  Buffer<float> scales;  // for each lane of each chunk (Integer)
  float largest = 0;     // of the scales
  bool exact = true;     // no scale lost a bit

  explicit operator bool() const { return bool(data); }

  // Zeros up to a batch that there is a kernel for.
  Prepared(int64_t length, int64_t batch, int chunk_bytes, bool scaled)
    : chunks((length + CHUNK - 1) / CHUNK), row_bytes(chunks * chunk_bytes) {
    const int64_t rows = batch > 4 ? 8 : batch == 3 ? 4 : batch;
    data = allocate<uint8_t>(row_bytes * rows);
    if (!data) return;
    std::memset(data.get() + row_bytes * batch, 0, row_bytes * (rows - batch));
    if (!scaled) return;
    scales = allocate<float>(chunks * 16 * rows);
    if (!scales) data.reset();
    if (!scales) return;
    std::fill_n(scales.get() + chunks * 16 * batch, chunks * 16 * (rows - batch), 0.0f);
  }
};

template <class Kind, class Element>
Prepared prepare(const ms_dense& x, int64_t length) {
  Prepared p(length, x.rows, Kind::CHUNK_BYTES, false);
  if (!p) return p;
  int order[CHUNK];
  for (int i = 0; i < CHUNK; ++i) order[Kind::position(i)] = unpacked_order(i);
  for (int64_t m = 0; m < x.rows; ++m) {
    Element* to = reinterpret_cast<Element*>(p.data.get() + m * p.row_bytes);
    const Element* from = static_cast<const Element*>(x.data) + m * x.stride;
    const int64_t whole = length / CHUNK * CHUNK;
    for (int64_t k = 0; k < whole; k += CHUNK)
      for (int i = 0; i < CHUNK; ++i) to[k + i] = from[k + order[i]];
    if (whole < length)
      for (int i = 0; i < CHUNK; ++i)
        to[whole + i] = whole + order[i] < length ? from[whole + order[i]] : Element(0);
  }
  return p;
}

// Integers of x with the sums that undo the weights' offset; a scale for each lane, with `units`, what
// integers of x and of the weights count: applied later, sums would leave float32 before that.
Prepared prepare_integers(const ms_packed& x, float units) {
  Prepared p(x.length, x.rows, Integer::CHUNK_BYTES, true);
  if (!p) return p;
  const float unit = Integer::unit_of(x);
  for (int64_t m = 0; m < x.rows; ++m) {
    for (int64_t c = 0; c < p.chunks; ++c) {
      int8_t* to = reinterpret_cast<int8_t*>(p.data.get() + m * p.row_bytes + c * 128);
      int32_t* surplus = reinterpret_cast<int32_t*>(to + 64);
      for (int i = 0; i < CHUNK; ++i) {
        const int64_t k = c * CHUNK + i;
        to[i] = k < x.length ? int8_t(x.values[code_at(x, m, k)] / unit) : 0;
      }
      for (int l = 0; l < 16; ++l) {
        const int64_t k = c * CHUNK + 4 * l;
        surplus[l] = -128 * (to[4 * l] + to[4 * l + 1] + to[4 * l + 2] + to[4 * l + 3]);
        const float s = k < x.length ? scale_at(x, m, x.block ? k / x.block : 0) : 0.0f;
        p.scales[(m * p.chunks + c) * 16 + l] = s * units;
        p.largest = std::fmax(p.largest, std::fabs(s * units));
        p.exact &= s * units / units == s;
      }
    }
  }
  return p;
}

// ---------------------------------------------------------------- the loop

struct Walk {
  const ms_packed* w;
  const Prepared* x;
  ScaleSpread spread;
  __mmask64 tail_bytes, tail_codes;
  int64_t whole;  // chunks without the last, ragged one

  Walk(const ms_packed& w, const Prepared& x) : w(&w), x(&x), spread(w.block) {
    whole = w.length / CHUNK;
    const int64_t rest = w.length - whole * CHUNK;
    tail_codes = low_bits(rest);
    tail_bytes = low_bits((rest * w.bits + 7) / 8);
  }
};

// R rows of weights by M rows of x.
template <class Kind, int BITS, Look LOOK, int R, int M>
struct Tile {
  using Unpack = typename Kind::template Unpack<LOOK>;
  __m512 sums[R][M];

  template <class... Mask>
  inline __attribute__((always_inline)) void chunk(const Walk& walk, const Unpack& unpack,
                                                     const uint8_t* rows, const float* scales,
                                                     int64_t scale_row, int64_t c, __mmask64 bytes,
                                                     Mask... mask) {
    const uint8_t* x = walk.x->data.get() + c * Kind::CHUNK_BYTES;
    const float* at = scales + walk.spread.offset(c);
    typename Kind::Values values[R];
    __m512 scale[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint8_t* row = chunk_at<BITS>(rows + r * walk.w->row_bytes, c);
      _mm_prefetch(row + R * walk.w->row_bytes, _MM_HINT_T0);
      values[r] = unpack(load_codes<BITS>(row, bytes), mask...);
      scale[r] = walk.spread(at + r * scale_row);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto part = Kind::load_x(x + m * walk.x->row_bytes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        __m512 factor = scale[r];
        if constexpr (Kind::SCALED_X)
          factor = _mm512_mul_ps(
            factor, _mm512_load_ps(walk.x->scales.get() + (m * walk.x->chunks + c) * 16));
        sums[r][m] = _mm512_fmadd_ps(Kind::dot(values[r], part), factor, sums[r][m]);
      }
    }
  }

  inline __attribute__((always_inline)) void run(const Walk& walk, const Unpack& unpack,
                                                   const uint8_t* rows, const float* scales,
                                                   int64_t scale_row) {
    for (auto& row : sums)
      for (__m512& sum : row) sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < walk.whole; ++c) chunk(walk, unpack, rows, scales, scale_row, c, ~0ull);
    if (walk.tail_codes)
      chunk(walk, unpack, rows, scales, scale_row, walk.whole, walk.tail_bytes,
                  walk.tail_codes);
  }
};

template <class Kind, int BITS, Look LOOK, int R, int M>
void group(const GemvCall& call, const Walk& walk, const typename Kind::template Unpack<LOOK>& unpack,
           int64_t row, float* scales, const ScaleReader& reader, float factor) {
  const ms_packed& w = *call.w;
  const int64_t scale_row = scale_room(w);
  for (int r = 0; r < R; ++r)
    call.bad[row + r] = !reader(row + r, scales + r * scale_row);
  Tile<Kind, BITS, LOOK, R, M> tile;
  tile.run(walk, unpack, w.codes + row * w.row_bytes, scales, scale_row);
  for (int r = 0; r < R; ++r) {
    const float bias = call.bias ? call.bias[row + r] : 0.0f;
    for (int m = 0; m < call.batch && !call.bad[row + r]; ++m)
      store(const_cast<void*>(call.out->data), call.out->type, m * call.out->stride + row + r,
                  _mm512_reduce_add_ps(tile.sums[r][m]) * factor + bias);
  }
}

template <class Kind, int BITS, Look LOOK, int M>
int all_rows(const GemvCall& call, const Prepared& x, float factor) {
  constexpr int R = M <= 4 ? 4 : 2;
  const ms_packed& w = *call.w;
  const Walk walk(w, x);
  const typename Kind::template Unpack<LOOK> unpack(w);
  const ScaleReader reader(w, call.tiny_x);
  const PerThread<float> scales(call.threads, R * scale_room(w));
  if (!scales || !x) return MS_NO_MEMORY;
  const int64_t groups = w.rows / R;
#pragma omp parallel num_threads(call.threads)
  {
    float* own = scales[omp_get_thread_num()];
#pragma omp for schedule(static) nowait
    for (int64_t g = 0; g < groups; ++g)
      group<Kind, BITS, LOOK, R, M>(call, walk, unpack, g * R, own, reader, factor);
#pragma omp for schedule(static)
    for (int64_t row = groups * R; row < w.rows; ++row)
      group<Kind, BITS, LOOK, 1, M>(call, walk, unpack, row, own, reader, factor);
  }
  return MS_OK;
}

template <class Kind, int BITS, Look LOOK>
int by_batch(const GemvCall& call, const Prepared& x, float factor) {
  using Function = int (*)(const GemvCall&, const Prepared&, float);
  static constexpr Function one = all_rows<Kind, BITS, LOOK, 1>;
  static constexpr Function two = all_rows<Kind, BITS, LOOK, 2>;
  static constexpr Function four = all_rows<Kind, BITS, LOOK, 4>;
  static constexpr Function eight = all_rows<Kind, BITS, LOOK, 8>;
  const Function chosen[] = {one, two, four, four, eight, eight, eight, eight};
  return chosen[call.batch - 1](call, x, factor);
}

template <class Kind>
int by_format(const GemvCall& call, const Prepared& x, float factor) {
  const ms_packed& w = *call.w;
  if (w.bits == 4) return by_batch<Kind, 4, Look::SIX>(call, x, factor);
  if (w.bits == 6) return by_batch<Kind, 6, Look::SIX>(call, x, factor);
  if (!Kind::SCALED_X && is_sign_symmetric(w)) return by_batch<Kind, 8, Look::SIGNED>(call, x, factor);
  return by_batch<Kind, 8, Look::EIGHT>(call, x, factor);
}

}  // namespace

int gemv_float32_vbmi(const GemvCall& call, const ms_dense& x) {
  return by_format<Float32>(call, prepare<Float32, float>(x, call.w->length),
                              call.w->tensor_scale);
}

int gemv_bfloat16_vbmi(const GemvCall& call, const ms_dense& x) {
  return by_format<BFloat16>(call, prepare<BFloat16, uint16_t>(x, call.w->length),
                               call.w->tensor_scale);
}

int gemv_integer_vbmi(const GemvCall& call, const ms_packed& x) {
  const Prepared p = prepare_integers(x, Integer::unit_of(*call.w) * Integer::unit_of(x));
  // A scale is one for four values, and a product of two must not overflow: the sum may be 0.
  if (p && !(p.exact && x.block % 4 == 0 && p.largest <= 0x1p100f)) {
    std::memset(call.bad, 1, size_t(call.w->rows));
    return MS_OK;
  }
  GemvCall bounded = call;
  bounded.tiny_x |= p.largest > 1;  // scales of weights up to 2^20
  return by_format<Integer>(bounded, p, call.w->tensor_scale * x.tensor_scale);
}

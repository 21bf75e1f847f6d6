// Products of many rows of x with a packed matrix: what the instruction sets' kernels share.
//
// Lanes run over 16 rows of x, so that weights stay in their own order and are broadcast: only x is
// brought into another order, once. A thread takes some rows of weights; for each Kernel::DEPTH
// values of the reduction it fetches (decodes) them and multiplies them with all rows of x there,
// adding to sums [rows of weights][rows of x]. Weights, sums and a pass of x fit the second cache.
// The sums are turned, scaled, given their bias and rounded once at the end. So a weight is decoded
// once for 512 rows of x.
//
// A Kernel has
//   Element        float or uint16_t (bfloat16);  STEP  values of the reduction side by side in x
//   DEPTH, HEIGHT  values of the reduction in a pass; rows of weights of a tile
//   Rows           Rows(call), operator()(row, rows, k, to): DEPTH values of each row from k, zeros
//                  behind its end, in [rows][DEPTH]
//   tile<WIDTH>    sums of HEIGHT rows by WIDTH times 16 columns
//   turn_x         16 rows of x into the order [DEPTH / STEP][16][STEP]
//   join_x         the same for a strip of all rows of x, where these lie side by side
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "memory.h"
#include "packed.h"
#include "tables.h"

namespace {

constexpr int64_t COLUMNS = 16;    // rows of x in a tile
constexpr int64_t X_ROWS = 512;    // rows of x for which a weight is decoded once
constexpr int64_t STRIP = 32;      // values of the reduction that are brought into order together
constexpr int64_t MOST_ROWS = 192;  // rows of weights that a thread takes at a time

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Kernel>
class Gemm {
  using Element = typename Kernel::Element;
  static constexpr int64_t DEPTH = Kernel::DEPTH, HEIGHT = Kernel::HEIGHT;
  static constexpr int64_t PANEL = DEPTH * COLUMNS;
  static_assert(MOST_ROWS % HEIGHT == 0 && MOST_ROWS % 16 == 0);

  const GemmCall& call_;
  int64_t passes_, first_ = 0, count_ = 0, panels_;
  int64_t tiles_, blocks_, room_;  // tiles of rows, blocks of tiles, rows of the largest block
  Buffer<Element> x_;
  PerThread<float> sums_;
  PerThread<Element> weights_;

  public:
  explicit Gemm(const GemmCall& call)
    : call_(call), passes_(ceil_div(call.length, DEPTH)),
          panels_(ceil_div(std::min(call.x->rows, X_ROWS), COLUMNS)),
          tiles_(ceil_div(call.row_count(), HEIGHT)), blocks_(blocks_for(tiles_, call.threads)),
          room_(ceil_div(ceil_div(tiles_, blocks_) * HEIGHT, 16) * 16),
          x_(allocate<Element>(passes_ * panels_ * PANEL)),
          sums_(call.threads, room_ * panels_ * COLUMNS), weights_(call.threads, room_ * DEPTH) {}

  int run() {
    if (!x_ || !sums_ || !weights_) return MS_NO_MEMORY;
    const typename Kernel::Rows fetch(call_);
    for (first_ = 0; first_ < call_.x->rows; first_ += X_ROWS) {
      count_ = std::min(X_ROWS, call_.x->rows - first_);
      panels_ = ceil_div(count_, COLUMNS);
#pragma omp parallel num_threads(call_.threads)
      {
        set_x();
        const int thread = omp_get_thread_num();
        [[maybe_unused]] const typename Kernel::State state;
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < blocks_; ++b) {
          const int64_t row = tiles_ * b / blocks_ * HEIGHT;
          const int64_t end = std::min(tiles_ * (b + 1) / blocks_ * HEIGHT, call_.row_count());
          multiply(fetch, row, end - row, weights_[thread], sums_[thread]);
          write(row, end - row, sums_[thread]);
        }
      }
    }
    return MS_OK;
  }

  private:
  // As many for each thread, of about the same size.
  static int64_t blocks_for(int64_t tiles, int64_t threads) {
    const int64_t each = ceil_div(ceil_div(tiles, threads) * HEIGHT, MOST_ROWS);
    return std::min(std::max<int64_t>(tiles, 1), each * threads);
  }

  Element* panel(int64_t pass, int64_t p) const { return x_.get() + (pass * panels_ + p) * PANEL; }

  // All threads share the work.
  void set_x() {
    const int64_t pieces = call_.x->step == 1 ? panels_ : DEPTH / STRIP;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < passes_ * pieces; ++i) {
      if (call_.x->step == 1) turn(i / pieces, i % pieces);
      else join(i / pieces, i % pieces * STRIP);
    }
  }

  void turn(int64_t pass, int64_t p) {
    const ms_dense& x = *call_.x;
    const int64_t m = first_ + p * COLUMNS, k = pass * DEPTH;
    const Element* from = static_cast<const Element*>(x.data) + m * x.stride + k;
    Kernel::turn_x(from, x.stride, std::min(COLUMNS, x.rows - m),
                       std::min(DEPTH, call_.length - k), panel(pass, p));
  }

  // A strip of the reduction for all rows, which lie side by side.
  void join(int64_t pass, int64_t strip) {
    const ms_dense& x = *call_.x;
    const int64_t k = pass * DEPTH + strip;
    const Element* from = static_cast<const Element*>(x.data) + first_ * x.stride + k * x.step;
    Kernel::join_x(from, x.step, count_, call_.length - k, STRIP, panel(pass, 0) + strip * COLUMNS);
  }

  void multiply(const typename Kernel::Rows& fetch, int64_t row, int64_t rows, Element* weights,
                  float* sums) const {
    const int64_t width = panels_ * COLUMNS;
    std::memset(sums, 0, sizeof(float) * room_ * width);
    if (rows % HEIGHT) std::memset(weights + rows * DEPTH, 0, sizeof(Element) * (room_ - rows) * DEPTH);
    for (int64_t pass = 0; pass < passes_; ++pass) {
      fetch(row, rows, pass * DEPTH, weights);
      int64_t p = 0;
      for (; p + Kernel::WIDTH <= panels_; p += Kernel::WIDTH)
        column<Kernel::WIDTH>(weights, pass, p, rows, sums);
      if constexpr (Kernel::WIDTH > 1)
        for (; p < panels_; ++p) column<1>(weights, pass, p, rows, sums);
    }
  }

  template <int WIDTH>
  void column(const Element* weights, int64_t pass, int64_t p, int64_t rows, float* sums) const {
    const int64_t width = panels_ * COLUMNS;
    for (int64_t r = 0; r < rows; r += HEIGHT)
      Kernel::template tile<WIDTH>(weights + r * DEPTH, panel(pass, p),
                                         sums + r * width + p * COLUMNS, width);
  }

  // By rows of the result, each a stretch of memory as long as there are rows of weights.
  void write(int64_t row, int64_t rows, const float* sums) const {
    const int64_t width = panels_ * COLUMNS;
    const ms_dense& out = *call_.out;
    alignas(64) float factor[MOST_ROWS], bias[MOST_ROWS];
    for (int64_t r = 0; r < room_; ++r) {
      factor[r] = call_.factors && r < rows ? call_.factors[row + r] : 1.0f;
      bias[r] = call_.bias && r < rows ? call_.bias[row + r] : 0.0f;
    }
    for (int64_t m = 0; m < count_; m += 16) {
      for (int64_t r = 0; r < rows; r += 16) {
        alignas(64) float turned[16][16];
        Kernel::turn_sums(sums + r * width + m, width, turned);
        for (int64_t j = 0; j < std::min<int64_t>(16, count_ - m); ++j)
          write_row(turned[j], factor + r, bias + r, std::min<int64_t>(16, rows - r),
                        (first_ + m + j) * out.stride + row + r);
      }
    }
  }

  void write_row(const float* sums, const float* factor, const float* bias, int64_t n,
                   int64_t at) const {
    alignas(64) float result[16];
    for (int i = 0; i < 16; ++i) result[i] = sums[i] * factor[i] + bias[i];
    void* data = const_cast<void*>(call_.out->data);
    if (call_.out->type == MS_BFLOAT16) {
      alignas(64) uint16_t narrow[16];
      for (int i = 0; i < 16; ++i) narrow[i] = to_bfloat16(result[i]);
      copy(narrow, n, static_cast<uint16_t*>(data) + at);
    } else {
      copy(result, n, static_cast<float*>(data) + at);
    }
  }

  // A size that is known saves a call for every 16 values.
  template <class T>
  static void copy(const T* from, int64_t n, T* to) {
    if (n == 16) std::memcpy(to, from, 16 * sizeof(T));
    else std::memcpy(to, from, size_t(n) * sizeof(T));
  }
};

// What a thread sets up before its products and undoes after them.
struct NoState {
  NoState() {}
};

}  // namespace

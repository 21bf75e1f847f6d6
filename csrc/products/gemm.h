// Products of many rows of x with a packed matrix: what the instruction sets' kernels share.
//
// Lanes run over 16 rows of x, so that decoded weights stay in their own order and are broadcast:
// only x is brought into another order, once. A thread takes ROWS rows of weights; for each
// Kernel::DEPTH values of the reduction it decodes them into the first cache and multiplies them
// with all rows of x there, adding to sums [ROWS][rows of x] in the second cache. The sums are
// turned, scaled, given their bias and rounded once at the end. So a weight is decoded once for
// 512 rows of x.
//
// A Kernel has
//   Element        float or uint16_t (bfloat16);  STEP  values of the reduction side by side in x
//   DEPTH, HEIGHT  values of the reduction in a pass; rows of weights of a tile
//   ROWS           rows of weights that a thread takes at a time, whole tiles
//   Decode         Decode(w), operator()(row, k, to): DEPTH values of a row from k, zeros behind it
//   tile<WIDTH>    sums of HEIGHT rows by WIDTH times 16 columns
//   turn_x         16 rows of x into the order [DEPTH / STEP][16][STEP]
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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Kernel>
class Gemm {
  using Element = typename Kernel::Element;
  static constexpr int64_t DEPTH = Kernel::DEPTH, HEIGHT = Kernel::HEIGHT;
  static constexpr int64_t ROWS = Kernel::ROWS, PANEL = DEPTH * COLUMNS;
  static_assert(ROWS % HEIGHT == 0 && ROWS % 16 == 0);

  const GemmCall& call_;
  int64_t passes_, first_ = 0, count_ = 0, panels_;
  Buffer<Element> x_;
  PerThread<float> sums_;
  PerThread<Element> weights_;

  public:
  explicit Gemm(const GemmCall& call)
    : call_(call), passes_(ceil_div(call.w->length, DEPTH)),
          panels_(ceil_div(std::min(call.x->rows, X_ROWS), COLUMNS)),
          x_(allocate<Element>(passes_ * panels_ * PANEL)),
          sums_(call.threads, ROWS * panels_ * COLUMNS), weights_(call.threads, ROWS * DEPTH) {}

  int run() {
    if (!x_ || !sums_ || !weights_) return MS_NO_MEMORY;
    const typename Kernel::Decode decode(*call_.w);
    for (first_ = 0; first_ < call_.x->rows; first_ += X_ROWS) {
      count_ = std::min(X_ROWS, call_.x->rows - first_);
      panels_ = ceil_div(count_, COLUMNS);
#pragma omp parallel num_threads(call_.threads)
      {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < passes_ * panels_; ++i) turn(i / panels_, i % panels_);
        const int thread = omp_get_thread_num();
        [[maybe_unused]] const typename Kernel::State state;
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < call_.w->rows; row += ROWS) {
          multiply(decode, row, weights_[thread], sums_[thread]);
          write(row, sums_[thread]);
        }
      }
    }
    return MS_OK;
  }

  private:
  Element* panel(int64_t pass, int64_t p) const { return x_.get() + (pass * panels_ + p) * PANEL; }

  void turn(int64_t pass, int64_t p) {
    const int64_t m = first_ + p * COLUMNS, k = pass * DEPTH;
    const Element* from = static_cast<const Element*>(call_.x->data) + m * call_.x->stride + k;
    Kernel::turn_x(from, call_.x->stride, std::min(COLUMNS, call_.x->rows - m),
                       std::min(DEPTH, call_.w->length - k), panel(pass, p));
  }

  void multiply(const typename Kernel::Decode& decode, int64_t row, Element* weights,
                  float* sums) const {
    const int64_t rows = std::min(ROWS, call_.w->rows - row), width = panels_ * COLUMNS;
    std::memset(sums, 0, sizeof(float) * ROWS * width);
    std::memset(weights, 0, sizeof(Element) * ROWS * DEPTH);
    for (int64_t pass = 0; pass < passes_; ++pass) {
      for (int64_t r = 0; r < rows; ++r) decode(row + r, pass * DEPTH, weights + r * DEPTH);
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

  void write(int64_t row, const float* sums) const {
    const int64_t rows = std::min(ROWS, call_.w->rows - row), width = panels_ * COLUMNS;
    const ms_dense& out = *call_.out;
    for (int64_t r = 0; r < rows; r += 16) {
      alignas(64) float factor[16], bias[16];
      const int64_t n = std::min<int64_t>(16, rows - r);
      for (int64_t i = 0; i < n; ++i) {
        factor[i] = call_.factors ? call_.factors[row + r + i] : 1.0f;
        bias[i] = call_.bias ? call_.bias[row + r + i] : 0.0f;
      }
      for (int64_t m = 0; m < count_; m += 16) {
        alignas(64) float turned[16][16];
        Kernel::turn_sums(sums + r * width + m, width, turned);
        for (int64_t j = 0; j < std::min<int64_t>(16, count_ - m); ++j) {
          const int64_t at = (first_ + m + j) * out.stride + row + r;
          write_row(turned[j], factor, bias, n, at);
        }
      }
    }
  }

  void write_row(const float* sums, const float* factor, const float* bias, int64_t n,
                   int64_t at) const {
    void* data = const_cast<void*>(call_.out->data);
    if (call_.out->type == MS_BFLOAT16)
      for (int64_t i = 0; i < n; ++i)
        static_cast<uint16_t*>(data)[at + i] = to_bfloat16(sums[i] * factor[i] + bias[i]);
    else
      for (int64_t i = 0; i < n; ++i)
        static_cast<float*>(data)[at + i] = sums[i] * factor[i] + bias[i];
  }
};

// What a thread sets up before its products and undoes after them.
struct NoState {
  NoState() {}
};

}  // namespace

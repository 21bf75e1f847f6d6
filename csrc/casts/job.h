// One call: what it works on, the memory of each thread, and how threads share the work.
#ifndef MICROSCALE_JOB_H
#define MICROSCALE_JOB_H

#include "cast.h"

#include <new>

#include "io.h"
#include "pack.h"
#include "philox.h"
#include "scale.h"
#include "walk.h"

namespace {

constexpr int kRun = 2048;  // values of a batch
constexpr int kTile = 64;   // rows of a strip that are packed together
constexpr int64_t kSmall = 1 << 14;  // below this many values one thread is enough
constexpr int64_t kStreamed = 1 << 24;  // bytes from which output goes past the caches

struct Job : ms_job {
  Rule rule;
  Philox philox;
  bool codes, stochastic, search;
  bool streamed;  // values may go past the caches
  int bits, inner;  // inner: the dimension of a strip's lanes, or -1 for rows
  int64_t block, row_bytes;
};

// Memory of one thread. Blocks longer than a batch take theirs from the heap.
struct Room {
  alignas(64) float in_place[kRun], out_place[kRun];
  alignas(64) uint32_t words_place[kRun + 8];
  alignas(64) uint8_t codes_place[kTile * kBatch];
  float *in = in_place, *out = out_place;
  uint32_t* words = words_place + 4;
  uint8_t* codes = codes_place;
  char* heap = nullptr;

  bool reserve(int64_t n) {
    if (n <= kRun) return true;
    heap = new (std::nothrow) char[static_cast<size_t>(n) * 13 + 64];
    if (!heap) return false;
    in = reinterpret_cast<float*>(heap);
    out = in + n;
    words = reinterpret_cast<uint32_t*>(out + n) + 4;
    codes = reinterpret_cast<uint8_t*>(words + n + 4);
    return true;
  }
  ~Room() { delete[] heap; }
};

inline int64_t values_of(const Job& job) { return lanes_of(job.geometry) * job.geometry.length; }

template <class T>
const T* read_at(const Job& job, int64_t at) {
  return static_cast<const T*>(job.x) + at;
}

template <class T>
T* write_at(const Job& job, int64_t at) {
  return static_cast<T*>(job.y) + at;
}

inline bool is_on_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// Whether element `at` of the output begins a line of the caches.
inline bool is_on_line(const Job& job, int64_t at) {
  return is_on_line(static_cast<const char*>(job.y) + at * size_of(job.y_type));
}

template <class Unit>
int for_units(int64_t units, int64_t values, int threads, int64_t reserved, const Unit& unit) {
  if (values < kSmall || units < 2) threads = 1;
  if (threads == 1) {
    Room room;
    if (!room.reserve(reserved)) return MS_NO_MEMORY;
    for (int64_t u = 0; u < units; ++u) unit(u, room);
    return MS_OK;
  }
  int status = MS_OK;
#pragma omp parallel num_threads(threads)
  {
    Room room;
    const bool ready = room.reserve(reserved);
    if (!ready) {
#pragma omp atomic write
      status = MS_NO_MEMORY;
    }
#pragma omp for schedule(static)
    for (int64_t u = 0; u < units; ++u) {
      if (ready) unit(u, room);
    }
  }
  return status;
}

// Strips where neighbouring lanes are closer than neighbours along the axis.
inline int strip_dimension(const Job& job, const int64_t* strides, int64_t axis_stride) {
  const ms_geometry& g = job.geometry;
  const int inner = nearest_lanes(g, strides);
  if (inner < 0) return -1;
  const bool aligned = !job.codes || job.block == 0 || job.block * job.bits % 8 == 0;
  const bool near = strides[inner] < axis_stride && g.shape[inner] >= 8;
  const bool short_axis = g.length < 8 && g.shape[inner] > g.length;
  return aligned && (near || short_axis) ? inner : -1;
}

inline Job job_of(const ms_job* given, bool codes) {
  Job job{};
  static_cast<ms_job&>(job) = *given;
  simplify(job.geometry);
  const ms_format& f = given->plan->format;
  job.rule = rule_of(given->plan);
  job.codes = codes;
  job.bits = f.element.bits;
  job.block = f.block;
  // An axis shorter than a block is one block.
  if (job.block > job.geometry.length && !codes) job.block = job.geometry.length;
  const int64_t padded =
      f.block ? ceil_div(job.geometry.length, f.block) * f.block : job.geometry.length;
  // Rows end with whole bytes and a whole number of codes: 8 odd ones, four of 6 bits in 3 bytes.
  const int64_t unit = job.bits % 2 ? job.bits : job.bits == 6 ? 3 : 1;
  job.row_bytes = ceil_div(bytes_of(padded, job.bits), unit) * unit;
  job.streamed = given->given && given->x != given->y &&
                 values_of(job) * size_of(given->y_type) >= kStreamed;
  job.search = f.rule == MS_MSE || f.rule == MS_FOUR_OVER_SIX;
  return job;
}

}  // namespace

#endif

// Rows of blocks of 32, sixteen at a time.
#ifndef MICROSCALE_SWIFT_ROWS_H
#define MICROSCALE_SWIFT_ROWS_H

#include "rows.h"
#include "swift.h"

namespace {

#if defined(__AVX512BW__)

constexpr int64_t kChunk = 8192;  // values that one thread takes at once

// `blocks` blocks of a row from block `first` on, the odd ones by the general loops.
template <bool Integer, bool Stream, class From, class To>
void cast_part(const Job& job, const Place& p, int64_t first, int64_t blocks, Room& room) {
  const From* x = read_at<From>(job, p.x + 32 * first);
  To* y = write_at<To>(job, p.y + 32 * first);
  const bool streamed = Stream && is_on_line(y);
  for (int64_t k = 0; k < blocks; k += kGroup) {
    const int n = static_cast<int>(least<int64_t>(kGroup, blocks - k));
    const From* from = x + 32 * k;
    To* to = y + 32 * k;
    const bool done = n < kGroup ? cast_group<Integer, false, false>(from, to, n, job.rule)
                      : streamed ? cast_group<Integer, true, Stream>(from, to, n, job.rule)
                                 : cast_group<Integer, true, false>(from, to, n, job.rule);
    if (!done) row_batch(job, p, first + k, n, room);
  }
  if (streamed) _mm_sfence();
}

template <bool Integer, int Bits, class From>
inline void quantize_part(const Job& job, const Place& p, int64_t first, int64_t blocks, Room& room) {
  const From* x = read_at<From>(job, p.x + 32 * first);
  uint8_t* y = write_at<uint8_t>(job, p.y + 4 * Bits * first);
  uint8_t* scales = static_cast<uint8_t*>(job.scales) + p.scale + first;
  for (int64_t k = 0; k < blocks; k += kGroup) {
    const int n = static_cast<int>(least<int64_t>(kGroup, blocks - k));
    const From* from = x + 32 * k;
    uint8_t* to = y + 4 * Bits * k;
    const bool done =
        n == kGroup ? quantize_group<Integer, Bits, true>(from, to, scales + k, n, job.rule)
                    : quantize_group<Integer, Bits, false>(from, to, scales + k, n, job.rule);
    if (!done) row_batch(job, p, first + k, n, room);
  }
}

using Part = void (*)(const Job&, const Place&, int64_t, int64_t, Room&);

template <bool Integer, class From>
Part quantize_part_of(const Job& job) {
  if (job.bits == 4) return quantize_part<Integer, 4, From>;
  if (job.bits == 6) return quantize_part<Integer, 6, From>;
  return quantize_part<Integer, 8, From>;
}

template <bool Integer, class From>
Part cast_part_of(const Job& job) {
  const bool streamed = job.streamed;
  if (job.y_type == MS_FLOAT32) {
    return streamed ? cast_part<Integer, true, From, float>
                    : cast_part<Integer, false, From, float>;
  }
  return streamed ? cast_part<Integer, true, From, uint16_t>
                  : cast_part<Integer, false, From, uint16_t>;
}

template <bool Integer>
Part part_of(const Job& job) {
  const bool wide = job.x_type == MS_FLOAT32;
  if (job.codes) {
    return wide ? quantize_part_of<Integer, float>(job) : quantize_part_of<Integer, uint16_t>(job);
  }
  return wide ? cast_part_of<Integer, float>(job) : cast_part_of<Integer, uint16_t>(job);
}

// The swift kernel of a job, or null where there is none.
Part swift_part(const Job& job) {
  const ms_geometry& g = job.geometry;
  const bool near = g.x_axis == 1 && (job.codes ? g.scale_axis == 1 : g.y_axis == 1);
  const bool types = job.x_type != MS_FLOAT16 && (job.codes || job.y_type != MS_FLOAT16);
  const bool blocks = is_swift(job.plan->format) && job.block == 32 && !job.search;
  if (!near || !types || !blocks) return nullptr;
  if (!job.rule.plain || job.plan->rounding != MS_EVEN) return nullptr;
  return job.rule.grid.is_integer ? part_of<true>(job) : part_of<false>(job);
}

inline int swift_rows(const Job& job, Part part) {
  const ms_geometry& g = job.geometry;
  const int64_t chunks = ceil_div(g.length, kChunk);
  const auto unit = [&](int64_t u, Room& room) {
    const Place p = place_of(g, u / chunks, -1);
    const int64_t first = u % chunks * (kChunk / 32);
    const int64_t left = g.length - 32 * first;
    part(job, p, first, least(kChunk, left) / 32, room);
    if (left < kChunk && left % 32) row_batch(job, p, first + left / 32, 1, room);
  };
  return for_units(lanes_of(g) * chunks, values_of(job), job.threads, 0, unit);
}

#endif

}  // namespace

#endif

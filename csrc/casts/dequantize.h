// Packed codes to values.
#ifndef MICROSCALE_DEQUANTIZE_H
#define MICROSCALE_DEQUANTIZE_H

#include "decode.h"
#include "strips.h"
#include "swift_decode.h"

namespace {

inline void decode_row(const Job& job, const Decoder& d, const Place& p, int64_t at, int n, Room& room) {
  const ms_geometry& g = job.geometry;
  unpack(static_cast<const uint8_t*>(job.x) + p.x + at * job.bits / 8, n, job.bits, room.codes);
  const int64_t to = p.y + at * g.y_axis;
  float* out = ::room(job.y, job.y_type, to, g.y_axis, room.out);
  const int64_t block = job.block ? job.block : g.length;
  for (int done = 0; done < n;) {
    const int64_t number = (at + done) / block;
    const int size = static_cast<int>(least<int64_t>(n - done, (number + 1) * block - at - done));
    const float scale = scale_at(d, job.scales, p.scale + number * g.scale_axis);
    decode<false>(d, room.codes + done, size, &scale, out + done);
    done += size;
  }
  store(out, job.y, job.y_type, to, g.y_axis, n);
}

inline int decode_rows(const Job& job, const Decoder& d) {
  const ms_geometry& g = job.geometry;
  const int64_t parts = ceil_div(g.length, kRun);
  const auto unit = [&](int64_t u, Room& room) {
    const int64_t at = u % parts * kRun;
    const int n = static_cast<int>(least<int64_t>(kRun, g.length - at));
    decode_row(job, d, place_of(g, u / parts, -1), at, n, room);
  };
  return for_units(lanes_of(g) * parts, values_of(job), job.threads, 0, unit);
}

#if defined(__AVX512BW__)

template <int Bits, bool Integer, bool Stream, class To>
bool decode_part_of(const Job& job, const Place& p, int64_t at, int n, const Halves& h) {
  const uint8_t* from = read_at<uint8_t>(job, p.x + at * Bits / 8);
  const uint8_t* scales = static_cast<const uint8_t*>(job.scales) + p.scale + at / 32;
  return decode_blocks<Bits, Integer, Stream>(from, scales, n, h, write_at<To>(job, p.y + at));
}

using DecodePart = bool (*)(const Job&, const Place&, int64_t, int, const Halves&);

template <int Bits, bool Integer>
DecodePart decode_part_with(const Job& job) {
  bool streamed = job.streamed && is_on_line(job.y);
  const ms_geometry& g = job.geometry;
  for (int d = 0; d < g.dimensions; ++d) streamed &= g.y[d] * size_of(job.y_type) % 64 == 0;
  if (job.y_type == MS_FLOAT32) {
    return streamed ? decode_part_of<Bits, Integer, true, float>
                    : decode_part_of<Bits, Integer, false, float>;
  }
  return streamed ? decode_part_of<Bits, Integer, true, uint16_t>
                  : decode_part_of<Bits, Integer, false, uint16_t>;
}

// The decoder of blocks of 32 under powers of two, or null where there is none.
inline DecodePart swift_decoder(const Job& job) {
  if (!is_swift(job.plan->format) || job.geometry.scale_axis != 1 || job.y_type == MS_FLOAT16) {
    return nullptr;
  }
  if (job.bits == 4) return decode_part_with<4, false>(job);
  if (job.bits == 6) return decode_part_with<6, false>(job);
  return job.rule.grid.is_integer ? decode_part_with<8, true>(job)
                                  : decode_part_with<8, false>(job);
}

inline bool decodes_swiftly(const Job& job) {
  const int64_t block = job.block ? job.block : 16;
  return job.geometry.y_axis == 1 && block % 16 == 0 && has_halves(job.plan->format.element);
}

// The first n / 64 x 64 values; how many were done.
inline int decode_any(const Job& job, const Decoder& d, const Halves& h, const Place& p,
                      int64_t at, int n) {
  n = n / 64 * 64;
  if (job.bits == 4) {
    decode_scaled<4, false>(job, d, h, p, at, n);
  } else if (job.bits == 6) {
    decode_scaled<6, false>(job, d, h, p, at, n);
  } else if (job.rule.grid.is_integer) {
    decode_scaled<8, true>(job, d, h, p, at, n);
  } else {
    decode_scaled<8, false>(job, d, h, p, at, n);
  }
  return n;
}

inline int swift_decode(const Job& job, const Decoder& d) {
  const ms_geometry& g = job.geometry;
  const DecodePart part = swift_decoder(job);
  const Halves h(job.plan->format.element);
  const int64_t parts = ceil_div(g.length, kRun);
  const auto unit = [&](int64_t u, Room& room) {
    const Place p = place_of(g, u / parts, -1);
    const int64_t at = u % parts * kRun;
    const int n = static_cast<int>(least<int64_t>(kRun, g.length - at));
    const int whole = part && part(job, p, at, n / 32, h) ? n / 32 * 32
                                                          : decode_any(job, d, h, p, at, n);
    if (whole < n) decode_row(job, d, p, at + whole, n - whole, room);
  };
  return for_units(lanes_of(g) * parts, values_of(job), job.threads, 0, unit);
}

#endif

inline void decode_tile(const Job& job, const Decoder& d, const Place& p, int64_t row, int rows,
                 int lanes, Room& room) {
  const ms_geometry& g = job.geometry;
  for (int lane = 0; lane < lanes; ++lane) {
    uint8_t line[kTile];
    const int64_t from = p.x + lane * g.x[job.inner] + row * job.bits / 8;
    unpack(static_cast<const uint8_t*>(job.x) + from, rows, job.bits, line);
    for (int r = 0; r < rows; ++r) room.codes[r * lanes + lane] = line[r];
  }
  const int64_t block = job.block ? job.block : g.length;
  float scale[kBatch];
  int64_t seen = -1;
  for (int r = 0; r < rows; ++r) {
    const int64_t number = (row + r) / block;
    for (int lane = 0; number != seen && lane < lanes; ++lane) {
      const int64_t at = p.scale + lane * g.scale[job.inner] + number * g.scale_axis;
      scale[lane] = scale_at(d, job.scales, at);
    }
    seen = number;
    const int64_t to = p.y + (row + r) * g.y_axis, apart = g.y[job.inner];
    float* out = ::room(job.y, job.y_type, to, apart, room.out);
    decode<true>(d, room.codes + r * lanes, lanes, scale, out);
    store(out, job.y, job.y_type, to, apart, lanes);
  }
}

inline int dequantize(const ms_job* given) {
  Job job = job_of(given, true);
  if (values_of(job) == 0) return MS_OK;
  const Decoder d = decoder_of(given->plan->format, given->tensor_scale);
  job.inner = strip_dimension(job, job.geometry.y, job.geometry.y_axis);
#if defined(__AVX512BW__)
  if (job.inner < 0 && decodes_swiftly(job)) return swift_decode(job, d);
#endif
  if (job.inner < 0) return decode_rows(job, d);
  return for_strips(job, ceil_div(job.geometry.length, kTile),
                    [&](const Place& p, int lanes, int64_t number, Room& room) {
                      const int64_t row = number * kTile;
                      const int rows =
                          static_cast<int>(least<int64_t>(kTile, job.geometry.length - row));
                      decode_tile(job, d, p, row, rows, lanes, room);
                    });
}

}  // namespace

#endif

// Cast, quantize and dequantize. Compiled once for each instruction set; MS_CAST_TABLE names the
// table that this compilation fills.
//
// Blocks of a number of values are done in batches that stay in the first cache: amax of each, the
// scales of all, then the values. Blocks as long as the data take two passes over it.
#include "cast.h"

#include <new>

#include "decode.h"
#include "io.h"
#include "pack.h"
#include "philox.h"
#include "runs.h"
#include "swift.h"
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

// ---------------------------------------------------------------- scales of a batch

void find_scales(const Amax& found, int n, const Rule& rule, Scales& s) {
  int32_t amax[kBatch], poisoned[kBatch];
  settle(found, n, rule, amax, poisoned, s);
  const ms_format& f = rule.plan->format;
  if (f.power_of_two) {
    power_scales(amax, poisoned, n, rule, s);
  } else {
    real_scales(amax, poisoned, n, f.element.largest, rule, s);
    if (rule.of_finite) poison_infinities(found, n, s);
  }
  any_indirect(s, n);
}

// Scales that a searching rule compares: `Moves` candidates for each block of a batch, the first of
// which wins a tie. A block of zeros keeps the scale that zeros have.
struct Search {
  int candidates;
  Scales scales[3];
  double error[3][kBatch];
};

void propose(const Amax& found, int n, const Rule& rule, const Scales& s, Search& search) {
  int32_t amax[kBatch], poisoned[kBatch];
  Scales& first = search.scales[0];
  settle(found, n, rule, amax, poisoned, first);
  const ms_format& f = rule.plan->format;
  search.candidates = f.power_of_two ? 3 : 2;
  for (int c = 0; c < search.candidates; ++c) {
    Scales& to = search.scales[c];
    to = s;
    if (f.power_of_two) {
      for (int i = 0; i < n; ++i) {
        const int32_t moved = amax[i] == 0 ? s.exponent[i] : s.exponent[i] + c - 1;
        const int32_t exponent = least(most(moved, f.scale_low), f.scale_high);
        set_power(to, i, exponent, amax[i], poisoned[i] != 0, rule);
      }
    } else {
      real_scales(amax, poisoned, n, c == 0 ? f.element.largest : 4.0, rule, to);
    }
    for (int i = 0; i < n; ++i) search.error[c][i] = 0.0;
  }
}

void choose(const Amax& found, int n, const Rule& rule, const Search& search, Scales& s) {
  for (int i = 0; i < n; ++i) {
    int best = 0;
    for (int c = 1; c < search.candidates; ++c) {
      if (search.error[c][i] < search.error[best][i]) best = c;
    }
    const Scales& from = search.scales[best];
    s.block[i] = from.block[i], s.divisor[i] = from.divisor[i], s.low[i] = from.low[i];
    s.top[i] = from.top[i], s.exponent[i] = from.exponent[i], s.indirect[i] = from.indirect[i];
  }
  if (!rule.plan->format.power_of_two && rule.of_finite) poison_infinities(found, n, s);
  any_indirect(s, n);
}

// ---------------------------------------------------------------- rows

// Values of a row from element `at` on, which lie in blocks with the scales s.
template <class Out>
void round_blocks(const Job& job, const float* x, Out out, int n, const Scales& s,
                  const uint32_t* words) {
  const Rule& rule = job.rule;
  const Grid g = rule.grid;
  const int block = static_cast<int>(job.block), whole = n / block;
  if (rule.plain && rule.plan->rounding == MS_EVEN && !s.any_indirect && block == 32) {
    for (int i = 0; i < whole; ++i) {
      direct<MS_EVEN, false>(x + 32 * i, Out{out.to + 32 * i}, 32, g, s, i, nullptr);
    }
  } else if (rule.plain && rule.plan->rounding == MS_EVEN && block == 16) {
    const Wishes w = wishes_of(rule);
    for (int i = 0; i < whole; ++i) {
      general<MS_EVEN, false, true>(x + 16 * i, Out{out.to + 16 * i}, 16, g, s, i, nullptr, w);
    }
  } else {
    for (int i = 0; i < whole; ++i) {
      const int at = i * block;
      round_run<false>(x + at, Out{out.to + at}, block, rule, s, i, words + at);
    }
  }
  const int at = whole * block;
  if (at < n) round_run<false>(x + at, Out{out.to + at}, n - at, rule, s, whole, words + at);
}

void find_amax(const Job& job, const float* x, int n, int blocks, Amax& found) {
  const int block = static_cast<int>(job.block);
  reset(found, blocks);
  if (block == 32 && n % 32 == 0 && !job.rule.of_finite) {
    for (int i = 0; i < blocks; ++i) add_row(found, x + 32 * i, 32, i, false);
    return;
  }
  for (int i = 0; i < blocks; ++i) {
    add_row(found, x + i * block, least(block, n - i * block), i, job.rule.of_finite);
  }
}

void search_row(const Job& job, const float* x, int n, int blocks, const Amax& found, Scales& s,
                Room& room) {
  Search search;
  propose(found, blocks, job.rule, s, search);
  const int block = static_cast<int>(job.block);
  for (int c = 0; c < search.candidates; ++c) {
    for (int i = 0; i < blocks; ++i) {
      const int at = i * block, size = least(block, n - at);
      add_errors<false>(x + at, size, job.rule, search.scales[c], i, room.out,
                        &search.error[c][i]);
    }
  }
  choose(found, blocks, job.rule, search, s);
}

void write_codes(const Job& job, const uint8_t* codes, int n, uint8_t* row, int64_t at) {
  uint8_t* to = row + at * job.bits / 8;
  pack(codes, n, job.bits, to);
  if (at + n < job.geometry.length) return;
  uint8_t *end = to + bytes_of(n, job.bits), *whole = row + job.row_bytes;
  if (end < whole) memset(end, 0, static_cast<size_t>(whole - end));
}

void finish_row(const Job& job, const Place& p, int64_t at, const float* x, int n, const Scales& s,
                Room& room) {
  const ms_geometry& g = job.geometry;
  if (job.stochastic) {
    philox_words(job.philox, p.index + at * g.index_axis, g.index_axis, n, room.words);
  }
  if (job.codes) {
    round_blocks(job, x, Codes{room.codes}, n, s, room.words);
    write_codes(job, room.codes, n, static_cast<uint8_t*>(job.y) + p.y, at);
    return;
  }
  const int64_t to = p.y + at * g.y_axis;
  float* out = ::room(job.y, job.y_type, to, g.y_axis, room.out);
  round_blocks(job, x, Values{out}, n, s, room.words);
  store(out, job.y, job.y_type, to, g.y_axis, n);
}

// `blocks` blocks of a row from block `first` on.
void row_batch(const Job& job, const Place& p, int64_t first, int blocks, Room& room) {
  const ms_geometry& g = job.geometry;
  const int64_t at = first * job.block;
  const int n = static_cast<int>(least(blocks * job.block, g.length - at));
  const float* x = load(job.x, job.x_type, p.x + at * g.x_axis, g.x_axis, n, room.in);
  Amax found;
  Scales s;
  find_amax(job, x, n, blocks, found);
  find_scales(found, blocks, job.rule, s);
  if (job.search) search_row(job, x, n, blocks, found, s, room);
  finish_row(job, p, at, x, n, s, room);
  if (!job.scales) return;
  for (int i = 0; i < blocks; ++i) {
    const int64_t to = p.scale + (first + i) * g.scale_axis;
    store_scale(job.scales, to, s, i, job.plan->format);
  }
}

// Blocks in a batch: whole bytes of codes, at most kBatch, about kRun values.
int batch_of(const Job& job) {
  int64_t blocks = least<int64_t>(kRun / job.block, kBatch);
  if (blocks >= 8) return static_cast<int>(blocks / 8 * 8);
  return job.block * job.bits % 8 == 0 ? static_cast<int>(most<int64_t>(blocks, 1)) : 8;
}

// Rows that lie behind each other everywhere and end with a whole block are one row.
void join_rows(Job& job) {
  ms_geometry& g = job.geometry;
  if (job.block == 0 || g.dimensions == 0 || g.length % job.block) return;
  const int d = static_cast<int>(g.dimensions) - 1;
  const int64_t written = job.codes ? g.length * job.bits / 8 : g.length * g.y_axis;
  const int64_t scales = g.length / job.block * g.scale_axis;
  if (g.x[d] != g.length * g.x_axis || g.y[d] != written ||
      g.index[d] != g.length * g.index_axis || (job.scales && g.scale[d] != scales)) {
    return;
  }
  if (job.codes && g.length * job.bits % 8) return;
  g.length *= g.shape[d];
  remove_dimension(g, d);
  job.row_bytes = bytes_of(g.length, job.bits);
  join_rows(job);
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

int64_t values_of(const Job& job) { return lanes_of(job.geometry) * job.geometry.length; }

// ---------------------------------------------------------------- rows of blocks of 32

#if defined(__AVX512BW__)

constexpr int kPages = 8;  // that are written in turns; one would not keep the memory busy
constexpr int64_t kPage = 1024, kChunk = kPages * kPage;  // in values

template <class T>
const T* read_at(const Job& job, int64_t at) {
  return static_cast<const T*>(job.x) + at;
}

template <class T>
T* write_at(const Job& job, int64_t at) {
  return static_cast<T*>(job.y) + at;
}

bool is_on_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

bool is_streamed(const Job& job) {
  return job.given && job.x != job.y && is_on_line(job.y) &&
         values_of(job) * size_of(job.y_type) >= kStreamed;
}

// `blocks` blocks of a row from block `first` on, the odd ones by the general loops.
template <bool Integer, bool Stream, class From, class To>
void cast_part(const Job& job, const Place& p, int64_t first, int64_t blocks, Room& room) {
  const From* x = read_at<From>(job, p.x + 32 * first);
  To* y = write_at<To>(job, p.y + 32 * first);
  const bool streamed = Stream && 32 * blocks == kChunk && is_on_line(y);
  const int64_t pair = streamed ? kPage : 64, apart = streamed ? 2 : kGroup;
  const int64_t ahead = streamed ? 128 : kAhead;
  for (int64_t k = 0; k < blocks; k += kGroup) {
    const int64_t start = k / kGroup * apart;
    const int n = static_cast<int>(least<int64_t>(kGroup, blocks - k));
    const From* from = x + 32 * start;
    To* to = y + 32 * start;
    const bool done =
        streamed ? cast_group<Integer, true, Stream>(from, to, n, pair, ahead, job.rule)
        : n == kGroup ? cast_group<Integer, true, false>(from, to, n, pair, ahead, job.rule)
                      : cast_group<Integer, false, false>(from, to, n, pair, ahead, job.rule);
    for (int b = 0; !done && b < n; b += 2) {
      row_batch(job, p, first + start + block_at(b, pair) / 32, least(2, n - b), room);
    }
  }
  if (streamed) _mm_sfence();
}

template <bool Integer, int Bits, class From>
void quantize_part(const Job& job, const Place& p, int64_t first, int64_t blocks, Room& room) {
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
  const bool streamed = is_streamed(job);
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

int swift_rows(const Job& job, Part part) {
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

int counted_rows(Job& job) {
  join_rows(job);
#if defined(__AVX512BW__)
  if (const Part part = swift_part(job)) return swift_rows(job, part);
#endif
  const ms_geometry& g = job.geometry;
  const int batch = batch_of(job);
  const int64_t blocks = ceil_div(g.length, job.block), batches = ceil_div(blocks, batch);
  const auto unit = [&](int64_t u, Room& room) {
    const int64_t first = u % batches * batch;
    const int count = static_cast<int>(least<int64_t>(batch, blocks - first));
    row_batch(job, place_of(g, u / batches, -1), first, count, room);
  };
  return for_units(lanes_of(g) * batches, values_of(job), job.threads, batch * job.block, unit);
}

// ---------------------------------------------------------------- strips

const float* load_lanes(const Job& job, const Place& p, int64_t row, int lanes, Room& room) {
  const ms_geometry& g = job.geometry;
  return load(job.x, job.x_type, p.x + row * g.x_axis, g.x[job.inner], lanes, room.in);
}

template <class Out>
void round_lanes(const Job& job, const Place& p, int64_t row, int lanes, const Scales& s,
                 bool one_scale, Out out, Room& room) {
  const ms_geometry& g = job.geometry;
  const float* x = load_lanes(job, p, row, lanes, room);
  if (job.stochastic) {
    const int64_t index = p.index + row * g.index_axis;
    philox_words(job.philox, index, g.index[job.inner], lanes, room.words);
  }
  if (one_scale) {
    round_run<false>(x, out, lanes, job.rule, s, 0, room.words);
  } else {
    round_run<true>(x, out, lanes, job.rule, s, 0, room.words);
  }
}

void pack_tile(const Job& job, const Place& p, int64_t row, int rows, int lanes,
               const uint8_t* codes) {
  const int64_t apart = job.geometry.y[job.inner];
  for (int lane = 0; lane < lanes; ++lane) {
    uint8_t line[kTile];
    for (int r = 0; r < rows; ++r) line[r] = codes[r * lanes + lane];
    write_codes(job, line, rows, static_cast<uint8_t*>(job.y) + p.y + lane * apart, row);
  }
}

// Rows `row` to `row + rows` of a strip, with the scales s (one for each lane, or one for all).
void finish_strip(const Job& job, const Place& p, int64_t row, int64_t rows, int lanes,
                  const Scales& s, bool one_scale, Room& room) {
  const ms_geometry& g = job.geometry;
  if (job.codes) {
    for (int64_t done = 0; done < rows; done += kTile) {
      const int part = static_cast<int>(least<int64_t>(kTile, rows - done));
      for (int r = 0; r < part; ++r) {
        round_lanes(job, p, row + done + r, lanes, s, one_scale, Codes{room.codes + r * lanes},
                    room);
      }
      pack_tile(job, p, row + done, part, lanes, room.codes);
    }
    return;
  }
  for (int64_t r = row; r < row + rows; ++r) {
    const int64_t to = p.y + r * g.y_axis, apart = g.y[job.inner];
    float* out = ::room(job.y, job.y_type, to, apart, room.out);
    round_lanes(job, p, r, lanes, s, one_scale, Values{out}, room);
    store(out, job.y, job.y_type, to, apart, lanes);
  }
}

void search_strip(const Job& job, const Place& p, int64_t row, int64_t rows, int lanes,
                  const Amax& found, Scales& s, Room& room) {
  Search search;
  propose(found, lanes, job.rule, s, search);
  for (int64_t r = row; r < row + rows; ++r) {
    const float* x = load_lanes(job, p, r, lanes, room);
    for (int c = 0; c < search.candidates; ++c) {
      add_errors<true>(x, lanes, job.rule, search.scales[c], 0, room.out, search.error[c]);
    }
  }
  choose(found, lanes, job.rule, search, s);
}

void amax_of_strip(const Job& job, const Place& p, int64_t row, int64_t rows, int lanes,
                   Amax& found, Room& room) {
  reset(found, lanes);
  for (int64_t r = row; r < row + rows; ++r) {
    add_lanes(found, load_lanes(job, p, r, lanes, room), lanes, job.rule.of_finite);
  }
}

void strip_block(const Job& job, const Place& p, int64_t number, int lanes, Room& room) {
  const ms_geometry& g = job.geometry;
  const int64_t row = number * job.block, rows = least(job.block, g.length - row);
  Amax found;
  Scales s;
  amax_of_strip(job, p, row, rows, lanes, found, room);
  find_scales(found, lanes, job.rule, s);
  if (job.search) search_strip(job, p, row, rows, lanes, found, s, room);
  finish_strip(job, p, row, rows, lanes, s, false, room);
  if (!job.scales) return;
  for (int i = 0; i < lanes; ++i) {
    const int64_t to = p.scale + i * g.scale[job.inner] + number * g.scale_axis;
    store_scale(job.scales, to, s, i, job.plan->format);
  }
}

// Calls visit(place of a strip's first lane, its lanes, segment along the axis, room).
template <class Visit>
int for_strips(const Job& job, int64_t segments, const Visit& visit) {
  const ms_geometry& g = job.geometry;
  const int64_t lanes = g.shape[job.inner], chunks = ceil_div(lanes, kBatch);
  const int64_t before = lanes_of(g) / lanes;
  const auto unit = [&](int64_t u, Room& room) {
    Place p = place_of(g, u / chunks / segments, job.inner);
    const int64_t first = u % chunks * kBatch;
    move(p, g, job.inner, first);
    visit(p, static_cast<int>(least<int64_t>(kBatch, lanes - first)), u / chunks % segments, room);
  };
  return for_units(before * segments * chunks, values_of(job), job.threads, 0, unit);
}

int counted_strips(const Job& job) {
  return for_strips(job, ceil_div(job.geometry.length, job.block),
                    [&](const Place& p, int lanes, int64_t number, Room& room) {
                      strip_block(job, p, number, lanes, room);
                    });
}

// ---------------------------------------------------------------- blocks as long as the data

void raise(int32_t* to, int32_t value) {
  int32_t seen = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(to, &seen, value, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
}

// Amax and scales of the groups that share one; group k is entry k mod kBatch of batch k / kBatch.
struct Groups {
  Amax* found = nullptr;
  Scales* scales = nullptr;
  int64_t count = 0;

  bool reserve(int64_t groups) {
    count = groups;
    const size_t batches = static_cast<size_t>(ceil_div(groups, kBatch));
    found = new (std::nothrow) Amax[batches];
    scales = new (std::nothrow) Scales[batches];
    if (!found || !scales) return false;
    for (size_t b = 0; b < batches; ++b) reset(found[b], kBatch);
    return true;
  }
  ~Groups() {
    delete[] found;
    delete[] scales;
  }

  void add(int64_t group, const Amax& from, int i, bool of_finite) {
    Amax& to = found[group / kBatch];
    const int at = static_cast<int>(group % kBatch);
    raise(to.all + at, from.all[i]);
    if (!of_finite) return;
    raise(to.finite + at, from.finite[i]);
    raise(to.infinite + at, from.infinite[i]);
  }

  void copy(int64_t group, Scales& s, int i) const {
    const Scales& from = scales[group / kBatch];
    const int at = static_cast<int>(group % kBatch);
    s.block[i] = from.block[at], s.divisor[i] = from.divisor[at], s.flush[i] = from.flush[at];
    s.low[i] = from.low[at], s.top[i] = from.top[at], s.indirect[i] = from.indirect[at];
  }
};

int64_t groups_of(const ms_geometry& g) {
  int64_t last = 0;
  for (int d = 0; d < g.dimensions; ++d) last += (g.shape[d] - 1) * g.scale[d];
  return last + 1;
}

void scales_of_groups(const Job& job, Groups& groups) {
  for (int64_t first = 0; first < groups.count; first += kBatch) {
    const int n = static_cast<int>(least<int64_t>(kBatch, groups.count - first));
    Scales& s = groups.scales[first / kBatch];
    find_scales(groups.found[first / kBatch], n, job.rule, s);
    for (int i = 0; job.scales && i < n; ++i) {
      store_scale(job.scales, first + i, s, i, job.plan->format);
    }
  }
}

// The largest magnitude of the tensor, as its tensor scale sees it, from that of all blocks.
int32_t settled_amax(const Job& job, const Amax& found, int n) {
  int32_t amax[kBatch], poisoned[kBatch], largest = 0;
  Scales unused;
  settle(found, n, job.rule, amax, poisoned, unused);
  for (int i = 0; i < n; ++i) largest = most(largest, amax[i]);
  return largest;
}

void set_outer(Job& job, int32_t largest) {
  job.rule.outer = tensor_scale(largest, job.plan->format);
  if (job.tensor_scale) *job.tensor_scale = job.rule.outer;
}

int whole_rows(Job& job) {
  const ms_geometry& g = job.geometry;
  const int64_t parts = ceil_div(g.length, kRun), units = lanes_of(g) * parts;
  Groups groups;
  if (!groups.reserve(groups_of(g))) return MS_NO_MEMORY;
  const auto part = [&](int64_t u, Room& room, const float** x, int64_t* at, Place* p) {
    *p = place_of(g, u / parts, -1);
    *at = u % parts * kRun;
    const int n = static_cast<int>(least<int64_t>(kRun, g.length - *at));
    *x = load(job.x, job.x_type, p->x + *at * g.x_axis, g.x_axis, n, room.in);
    return n;
  };
  const auto measure = [&](int64_t u, Room& room) {
    const float* x;
    int64_t at;
    Place p;
    const int n = part(u, room, &x, &at, &p);
    Amax found;
    reset(found, 1);
    add_row(found, x, n, 0, job.rule.of_finite);
    groups.add(p.scale, found, 0, job.rule.of_finite);
  };
  for_units(units, values_of(job), job.threads, 0, measure);
  if (job.rule.has_outer) {
    int32_t largest = 0;
    for (int64_t first = 0; first < groups.count; first += kBatch) {
      const int n = static_cast<int>(least<int64_t>(kBatch, groups.count - first));
      largest = most(largest, settled_amax(job, groups.found[first / kBatch], n));
    }
    set_outer(job, largest);
  }
  scales_of_groups(job, groups);
  job.block = kRun;  // every part is one run
  const auto finish = [&](int64_t u, Room& room) {
    const float* x;
    int64_t at;
    Place p;
    const int n = part(u, room, &x, &at, &p);
    Scales s;
    groups.copy(p.scale, s, 0);
    s.any_indirect = s.indirect[0];
    finish_row(job, p, at, x, n, s, room);
  };
  return for_units(units, values_of(job), job.threads, 0, finish);
}

int whole_strips(Job& job) {
  const ms_geometry& g = job.geometry;
  const int64_t rows_of_measure = 1024, apart = g.scale[job.inner];
  Groups groups;
  if (!groups.reserve(groups_of(g))) return MS_NO_MEMORY;
  for_strips(job, ceil_div(g.length, rows_of_measure),
             [&](const Place& p, int lanes, int64_t number, Room& room) {
               const int64_t row = number * rows_of_measure;
               Amax found;
               amax_of_strip(job, p, row, least(rows_of_measure, g.length - row), lanes, found,
                             room);
               for (int i = 0; i < lanes; ++i) {
                 groups.add(p.scale + i * apart, found, i, job.rule.of_finite);
               }
             });
  if (job.rule.has_outer) {
    int32_t largest = 0;
    for (int64_t first = 0; first < groups.count; first += kBatch) {
      const int n = static_cast<int>(least<int64_t>(kBatch, groups.count - first));
      largest = most(largest, settled_amax(job, groups.found[first / kBatch], n));
    }
    set_outer(job, largest);
  }
  scales_of_groups(job, groups);
  return for_strips(job, ceil_div(g.length, kTile),
                    [&](const Place& p, int lanes, int64_t number, Room& room) {
                      const int64_t row = number * kTile;
                      Scales s;
                      for (int i = 0; i < (apart ? lanes : 1); ++i) {
                        groups.copy(p.scale + i * apart, s, i);
                      }
                      any_indirect(s, apart ? lanes : 1);
                      finish_strip(job, p, row, least<int64_t>(kTile, g.length - row), lanes, s,
                                   apart == 0, room);
                    });
}

// ---------------------------------------------------------------- tensor scale of counted blocks

int measure_tensor(const Job& given, int32_t* largest) {
  Job job = given;
  job.codes = false;
  job.scales = nullptr;
  *largest = 0;
  if (job.inner >= 0) {
    return for_strips(job, ceil_div(job.geometry.length, job.block),
                      [&](const Place& p, int lanes, int64_t number, Room& room) {
                        const int64_t row = number * job.block;
                        Amax found;
                        amax_of_strip(job, p, row, least(job.block, job.geometry.length - row),
                                      lanes, found, room);
                        raise(largest, settled_amax(job, found, lanes));
                      });
  }
  const ms_geometry& g = job.geometry;
  const int batch = batch_of(job);
  const int64_t blocks = ceil_div(g.length, job.block), batches = ceil_div(blocks, batch);
  const auto unit = [&](int64_t u, Room& room) {
    const Place p = place_of(g, u / batches, -1);
    const int64_t first = u % batches * batch, at = first * job.block;
    const int count = static_cast<int>(least<int64_t>(batch, blocks - first));
    const int n = static_cast<int>(least(count * job.block, g.length - at));
    Amax found;
    const float* x = load(job.x, job.x_type, p.x + at * g.x_axis, g.x_axis, n, room.in);
    find_amax(job, x, n, count, found);
    raise(largest, settled_amax(job, found, count));
  };
  return for_units(lanes_of(g) * batches, values_of(job), job.threads, batch * job.block, unit);
}

// ---------------------------------------------------------------- calls

// Strips where neighbouring lanes are closer than neighbours along the axis.
int strip_dimension(const Job& job, const int64_t* strides, int64_t axis_stride) {
  const ms_geometry& g = job.geometry;
  const int inner = nearest_lanes(g, strides);
  if (inner < 0) return -1;
  const bool aligned = !job.codes || job.block == 0 || job.block * job.bits % 8 == 0;
  const bool near = strides[inner] < axis_stride && g.shape[inner] >= 8;
  const bool short_axis = g.length < 8 && g.shape[inner] > g.length;
  return aligned && (near || short_axis) ? inner : -1;
}

Job job_of(const ms_job* given, bool codes) {
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
  job.search = f.rule == MS_MSE || f.rule == MS_FOUR_OVER_SIX;
  return job;
}

int run(const ms_job* given, bool codes) {
  Job job = job_of(given, codes);
  if (values_of(job) == 0) return MS_OK;
  job.stochastic = given->plan->rounding == MS_STOCHASTIC;
  if (job.stochastic) {
    if (!given->seed) return MS_NO_SEED;
    job.philox = philox_of(given->seed);
  }
  job.inner = strip_dimension(job, job.geometry.x, job.geometry.x_axis);
  if (job.block == 0) return job.inner < 0 ? whole_rows(job) : whole_strips(job);
  if (job.rule.has_outer) {
    int32_t largest;
    const int status = measure_tensor(job, &largest);
    if (status) return status;
    set_outer(job, largest);
  }
  return job.inner < 0 ? counted_rows(job) : counted_strips(job);
}

int cast(const ms_job* job) { return run(job, false); }

int quantize(const ms_job* job) { return run(job, true); }

// ---------------------------------------------------------------- dequantize

void decode_row(const Job& job, const Decoder& d, const Place& p, int64_t at, int n, Room& room) {
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

int decode_rows(const Job& job, const Decoder& d) {
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
  bool streamed = is_streamed(job);
  const ms_geometry& g = job.geometry;
  for (int d = 0; d < g.dimensions; ++d) streamed &= g.y[d] * size_of(job.y_type) % 64 == 0;
  if (job.y_type == MS_FLOAT32) {
    return streamed ? decode_part_of<Bits, Integer, true, float>
                    : decode_part_of<Bits, Integer, false, float>;
  }
  return streamed ? decode_part_of<Bits, Integer, true, uint16_t>
                  : decode_part_of<Bits, Integer, false, uint16_t>;
}

// The swift decoder of a job, or null where there is none.
DecodePart swift_decoder(const Job& job) {
  const ms_geometry& g = job.geometry;
  const bool near = g.y_axis == 1 && g.scale_axis == 1 && job.y_type != MS_FLOAT16;
  if (!near || !decodes_swiftly(job.plan->format)) return nullptr;
  if (job.bits == 4) return decode_part_with<4, false>(job);
  if (job.bits == 6) return decode_part_with<6, false>(job);
  return job.rule.grid.is_integer ? decode_part_with<8, true>(job)
                                  : decode_part_with<8, false>(job);
}

int swift_decode(const Job& job, const Decoder& d, DecodePart part) {
  const ms_geometry& g = job.geometry;
  const Halves h(job.plan->format.element);
  const int64_t parts = ceil_div(g.length, kRun);
  const auto unit = [&](int64_t u, Room& room) {
    const Place p = place_of(g, u / parts, -1);
    const int64_t at = u % parts * kRun;
    const int n = static_cast<int>(least<int64_t>(kRun, g.length - at));
    const int whole = part(job, p, at, n / 32, h) ? n / 32 * 32 : 0;
    if (whole < n) decode_row(job, d, p, at + whole, n - whole, room);
  };
  return for_units(lanes_of(g) * parts, values_of(job), job.threads, 0, unit);
}

#endif

void decode_tile(const Job& job, const Decoder& d, const Place& p, int64_t row, int rows,
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

int dequantize(const ms_job* given) {
  Job job = job_of(given, true);
  if (values_of(job) == 0) return MS_OK;
  const Decoder d = decoder_of(given->plan->format, given->tensor_scale);
  job.inner = strip_dimension(job, job.geometry.y, job.geometry.y_axis);
#if defined(__AVX512BW__)
  const DecodePart part = job.inner < 0 ? swift_decoder(job) : nullptr;
  if (part) return swift_decode(job, d, part);
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

extern const ms_cast_table MS_CAST_TABLE;
const ms_cast_table MS_CAST_TABLE = {cast, quantize, dequantize};

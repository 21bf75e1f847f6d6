// Scratch memory on cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Null if there is no memory. A cache line more than asked for, so that whole vectors may be read.
template <class T>
Buffer<T> allocate(int64_t n) {
  const size_t bytes = (size_t(n) * sizeof(T) + 127) / 64 * 64;
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}

// What each thread has for itself: `each` values, rounded up to cache lines.
template <class T>
class PerThread {
  int64_t each_;
  Buffer<T> all_;

  public:
  PerThread(int threads, int64_t each)
    : each_((each * int64_t(sizeof(T)) + 127) / 64 * 64 / int64_t(sizeof(T))),
          all_(allocate<T>(each_ * threads)) {}
  explicit operator bool() const { return bool(all_); }
  T* operator[](int thread) const { return all_.get() + thread * each_; }
};

}  // namespace

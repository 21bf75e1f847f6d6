// Makes recorded calls of the compiled core again, on whatever processor this runs: for each call
// of the first file the memory that it works on is laid out anew, pointers into it are put right,
// and what the memory holds afterwards goes to the second file. tests/native_calls.py says how the
// first file looks; all numbers are int64, little-endian.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

typedef int64_t (*Call)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);

extern "C" {
int ms_cast(), ms_quantize(), ms_dequantize(), ms_linear(), ms_linear_packed();
}

namespace {

const Call kCalls[] = {(Call)ms_cast, (Call)ms_quantize, (Call)ms_dequantize, (Call)ms_linear,
                       (Call)ms_linear_packed};
FILE* input;

int64_t number() {
  int64_t value = 0;
  if (fread(&value, sizeof value, 1, input) != 1) exit(2);
  return value;
}

struct Region {
  int64_t size, misaligned, written;
  char* data;
};

Region region() {
  Region r{number(), number(), number(), nullptr};
  // Exactly as far from a cache line as it was, so that the same loops run.
  r.data = (char*)aligned_alloc(64, (r.size + 128) / 64 * 64) + r.misaligned;
  if (r.size && fread(r.data, size_t(r.size), 1, input) != 1) exit(2);
  return r;
}

}  // namespace

int main(int, char** names) {
  input = fopen(names[1], "rb");
  FILE* output = fopen(names[2], "wb");
  if (!input || !output) return 3;
  for (int64_t calls = number(); calls > 0; --calls) {
    const Call call = kCalls[number()];
    const int64_t count = number();
    std::vector<Region> regions(static_cast<size_t>(count));
    for (Region& r : regions) r = region();
    for (int64_t pointers = number(); pointers > 0; --pointers) {
      const int64_t from = number(), offset = number(), to = number(), there = number();
      *(char**)(regions[size_t(from)].data + offset) = regions[size_t(to)].data + there;
    }
    int64_t arguments[8];
    for (int64_t& a : arguments) {
      const int64_t of = number(), value = number();
      a = of < 0 ? value : (int64_t)(regions[size_t(of)].data + value);
    }
    const int32_t status = (int32_t)call(arguments[0], arguments[1], arguments[2], arguments[3],
                                         arguments[4], arguments[5], arguments[6], arguments[7]);
    fwrite(&status, sizeof status, 1, output);
    for (Region& r : regions) {
      if (r.written) fwrite(r.data, 1, size_t(r.size), output);
      free(r.data - r.misaligned);
    }
  }
  return fclose(output);
}

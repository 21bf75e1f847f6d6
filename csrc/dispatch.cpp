// The choice of the instruction set, made once.
#include "isa.h"

#include <atomic>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

const char* const kNames[MS_ISAS] = {"baseline", "avx2", "avx512", "avx512_vnni", "amx"};

#if defined(__x86_64__)

// Linux lets a process use the tile registers only after it asked (arch_prctl, ARCH_REQ_XCOMP_PERM).
bool tiles_permitted() {
#if defined(__linux__)
  const long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// GCC 12 knows no name for AMX here: leaf 7 says BF16 in bit 22, TILE in 24, INT8 in 25 of EDX.
bool has_amx() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const unsigned all = 1u << 22 | 1u << 24 | 1u << 25;
  return (d & all) == all && tiles_permitted();
}

bool usable(int isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                    __builtin_cpu_supports("avx512bf16");
  const bool found[MS_ISAS] = {true, avx2, avx512, vnni, vnni && has_amx()};
  return found[isa];
}

#else

bool usable(int isa) { return isa == MS_BASELINE; }

#endif

int best() {
  int isa = MS_ISAS - 1;
  while (!ms_isa_usable(isa)) --isa;
  return isa;
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa{best()};
  return isa;
}

}  // namespace

extern "C" {

const char* ms_isa_name(int isa) { return isa >= 0 && isa < MS_ISAS ? kNames[isa] : nullptr; }

int ms_isa_usable(int isa) { return isa >= 0 && isa < MS_ISAS && usable(isa); }

int ms_isa(void) { return chosen().load(std::memory_order_relaxed); }

int ms_set_isa(int isa) {
  if (!ms_isa_usable(isa)) return -1;
  chosen().store(isa, std::memory_order_relaxed);
  return 0;
}

}  // extern "C"

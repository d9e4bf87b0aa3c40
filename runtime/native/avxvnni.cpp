// AVX2 with its VNNI: Alder Lake, Zen 5 and later, where AVX-512 is left out or switched off.
#include "weight.h"
#if defined(SFX_AVXVNNI)
#include <cpuid.h>
#include <immintrin.h>

static bool runs_here() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("popcnt") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,popcnt")
#endif
#define SFX_ISA avxvnni
#define SFX_VNNI
#include "vec_avx2.h"
#include "multiply.h"
#include "activate.h"
#include "norm.h"

namespace sfx {
const Isa kAvxVnni = {"avxvnni", runs_here, no_slices, nullptr, avxvnni::quantize,
                      avxvnni::multiply, avxvnni::activate, avxvnni::norm, avxvnni::rotate};
} // namespace sfx
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

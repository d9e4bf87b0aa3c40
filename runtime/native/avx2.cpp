// AVX2 with FMA and F16C: Haswell, Zen and later.
#if defined(__x86_64__)
#include <immintrin.h>

#include "weight.h"

static bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("popcnt");
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,popcnt")
#endif
#define SFX_ISA avx2
#include "vec_avx2.h"
#include "multiply.h"
#include "activate.h"
#include "norm.h"

namespace sfx {
const Isa kAvx2 = {"avx2", runs_here, no_slices, nullptr, avx2::quantize, avx2::multiply,
                  avx2::activate,
                  avx2::norm, avx2::rotate};
} // namespace sfx
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// AVX-512 with VNNI and VBMI2: Ice Lake, Sapphire Rapids, Zen 4 and later.
#if defined(__x86_64__)
#include <immintrin.h>

#include "weight.h"

static bool runs_here() { // for every processor, hence above the pragmas
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi2");
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2,f16c,fma,avx2,bmi2,popcnt"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2,f16c,fma,avx2,bmi2,popcnt")
#endif
#define SFX_ISA avx512
#include "vec_avx512.h"
#include "multiply.h"
#include "activate.h"
#include "norm.h"

namespace sfx {
const Isa kAvx512 = {"avx512", runs_here, no_slices, nullptr, avx512::quantize, avx512::multiply,
                    avx512::activate,
                    avx512::norm, avx512::rotate};
} // namespace sfx
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

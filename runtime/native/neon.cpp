// NEON with dot products: ARMv8.2 and later, Apple M1 and later.
#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "weight.h"

static bool runs_here() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1 << 20; // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProducts;
#else
  return true;
#endif
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define SFX_ISA neon
#include "vec_neon.h"
#include "multiply.h"
#include "activate.h"
#include "norm.h"

namespace sfx {
const Isa kNeon = {"neon", runs_here, no_slices, nullptr, neon::quantize, neon::multiply,
                  neon::activate,
                  neon::norm, neon::rotate};
} // namespace sfx
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// NEON with dot products: ARMv8.2 and later, Apple M1 and later.
#if defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "weight.h"

#if !defined(__ARM_FEATURE_DOTPROD)
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define SFX_ISA neon
#include "vec_neon.h"
#include "multiply.h"

namespace sfx {
static bool runs_here() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1 << 20; // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProducts;
#else
  return true;
#endif
}
const Isa kNeon = {"neon", runs_here, no_slices, nullptr, neon::quantize, neon::multiply};
} // namespace sfx
#endif

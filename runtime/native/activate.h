// The activations of an epilogue. Included once per instruction set, which names itself SFX_ISA:
// the loops have no branches and no calls, so that they vectorise.
#pragma once

#include <cmath>

#include "floats.h"

namespace sfx {
namespace SFX_ISA {

// e^x to 2 ulp: 2^n · e^r with |r| ≤ ln 2 / 2 and a degree-6 Taylor sum.
static inline float fast_exp(float x) {
  const float clamped = x > 88.3f ? 88.3f : x < -87.3f ? -87.3f : x;
  const float n = std::nearbyint(clamped * 1.44269504f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const float scaled = e * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x == x ? scaled : x;
}

// The share of a normal distribution beyond |x|: erfc(|x| / √2) / 2, by the Chebyshev fit of Press
// et al., Numerical Recipes, 6.2 (relative error 1.2e-7, and what rounding the exponent adds).
static inline float tail(float x) {
  const float reach = std::fabs(x) * 0.70710678118654752f;
  const float z = reach > 9 ? 9.0f : reach; // 2e-37: beyond, floats are subnormal, which is slow
  const float t = 1 / (1 + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float beyond = 0.5f * t * fast_exp(p - z * z);
  return reach > 9 ? 0.0f : beyond;
}

static void activate(float *v, int64_t count, int activation) {
  switch (activation) {
  case SFX_RELU:
    for (int64_t i = 0; i < count; ++i) v[i] = v[i] < 0 ? 0.0f : v[i];
    break;
  case SFX_SILU:
    for (int64_t i = 0; i < count; ++i) v[i] = v[i] / (1 + fast_exp(-v[i]));
    break;
  case SFX_GELU:
    for (int64_t i = 0; i < count; ++i) {
      const float beyond = tail(v[i]), below = 1 - beyond;
      v[i] = v[i] * (v[i] > 0 ? below : beyond);
    }
    break;
  case SFX_GELU_TANH:
    // 0.5 (1 + tanh u) = 1 / (1 + e^(-2u))
    for (int64_t i = 0; i < count; ++i) {
      const float u = 0.79788456080286536f * (v[i] + 0.044715f * v[i] * v[i] * v[i]);
      v[i] = v[i] / (1 + fast_exp(-2 * u));
    }
    break;
  default: break;
  }
}

} // namespace SFX_ISA
} // namespace sfx

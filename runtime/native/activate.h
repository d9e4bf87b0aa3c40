// The activations of an epilogue. Included once per instruction set, which names itself SFX_ISA,
// behind its vec_*.h: the loops have no branches and no calls, so that they vectorise.
#pragma once

#include <cmath>

#include "floats.h"

namespace sfx {
namespace SFX_ISA {

// e^x to 2 ulp: 2^n · e^r with |r| ≤ ln 2 / 2 and a degree-6 Taylor sum.
static inline float fast_exp(float x) {
  const float clamped = x > 88.3f ? 88.3f : x < -87.3f ? -87.3f : x;
  const float n = std::nearbyint(clamped * 1.44269504f);
  const float r = V::fma(n, 2.12194440e-4f, V::fma(n, -0.693359375f, clamped));
  float e = 1.0f / 720;
  e = V::fma(e, r, 1.0f / 120);
  e = V::fma(e, r, 1.0f / 24);
  e = V::fma(e, r, 1.0f / 6);
  e = V::fma(e, r, 0.5f);
  e = V::fma(e, r, 1.0f);
  e = V::fma(e, r, 1.0f);
  const float scaled = e * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x == x ? scaled : x;
}

// erf(x / √2) for |x| ≤ kFar, as x · P(x²) / Q(x²): a minimax fit, 0.3 · 2^-24 off, evaluated to
// 6 · 2^-24. Farther out the share of a normal distribution beyond |x| is below 2^-25.
constexpr float kFar = 5.5f;
static inline float normal_erf(float x) {
  const float near = x > kFar ? kFar : x < -kFar ? -kFar : x;
  const float t = near * near;
  float p = 4.58626154e-08f, q = 1.19901267e-06f;
  p = V::fma(p, t, 1.2602633e-05f);
  q = V::fma(q, t, 7.21607757e-05f);
  p = V::fma(p, t, 3.29113426e-04f);
  q = V::fma(q, t, 1.86054924e-03f);
  p = V::fma(p, t, 9.30274948e-03f);
  q = V::fma(q, t, 2.84152342e-02f);
  p = V::fma(p, t, 6.69147928e-02f);
  q = V::fma(q, t, 2.50531658e-01f);
  p = V::fma(p, t, 7.97884548e-01f);
  q = V::fma(q, t, 1.0f);
  return near * p / q;
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
      const float half = 0.5f * v[i], far = v[i] * (v[i] > 0 ? 1.0f : 0.0f);
      const float near = V::fma(half, normal_erf(v[i]), half);
      v[i] = std::fabs(v[i]) > kFar ? far : near;
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

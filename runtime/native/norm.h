// A row of RMS norm or LayerNorm, and one of rotary embedding. Included once per instruction set,
// which names itself SFX_ISA, behind its vec_*.h.
#pragma once

#include <cmath>

#include "readers.h"

namespace sfx {
namespace SFX_ISA {

// The sum of all lanes of four vectors, halves added to halves.
static SFX_INLINE float sum_lanes(const F *parts) {
  float lanes[16];
  V::storef(lanes, V::addf(V::addf(parts[0], parts[1]), V::addf(parts[2], parts[3])));
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Calls each(i, lanes, chain) for every 16 numbers of k, `lanes` of which there are; four chains of
// sums take turns, so that a sum has at most k / 64 + 7 roundings.
template <class Each> static SFX_INLINE void by_lanes(int64_t k, Each each) {
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    each(i, 16, 0);
    each(i + 16, 16, 1);
    each(i + 32, 16, 2);
    each(i + 48, 16, 3);
  }
  for (; i < k; i += 16) each(i, k - i < 16 ? static_cast<int>(k - i) : 16, 0);
}

// `count` of 16 numbers, and `rest` for the others.
static SFX_INLINE F load_some(const float *p, int count, float rest = 0) {
  if (count == 16) return V::loadf(p);
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i < count ? p[i] : rest;
  return V::loadf(lanes);
}
static SFX_INLINE void store_some(float *p, F v, int count) {
  if (count == 16) return V::storef(p, v);
  float lanes[16];
  V::storef(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

static void norm(const NormRow &row) {
  const float *s = row.x;
  const int64_t k = row.k;
  F sums[4] = {V::zerof(), V::zerof(), V::zerof(), V::zerof()};
  if (row.residual) {
    by_lanes(k, [&](int64_t i, int lanes, int) SFX_INLINE_LAMBDA {
      const F v = V::addf(load_some(row.x + i, lanes), load_some(row.residual + i, lanes));
      store_some(row.sum + i, v, lanes);
    });
    s = row.sum;
  }
  float mean = 0;
  if (row.centred) {
    by_lanes(k, [&](int64_t i, int lanes, int chain) SFX_INLINE_LAMBDA {
      sums[chain] = V::addf(sums[chain], load_some(s + i, lanes));
    });
    mean = sum_lanes(sums) / k;
    for (F &sum : sums) sum = V::zerof();
  }
  const F centre = V::setf(mean);
  by_lanes(k, [&](int64_t i, int lanes, int chain) SFX_INLINE_LAMBDA {
    const F v = V::subf(load_some(s + i, lanes, mean), centre);
    sums[chain] = V::fma(v, v, sums[chain]);
  });
  const F scale = V::setf(1 / std::sqrt(sum_lanes(sums) / k + row.eps));
  by_lanes(k, [&](int64_t i, int lanes, int) SFX_INLINE_LAMBDA {
    F v = V::mulf(V::subf(load_some(s + i, lanes), centre), scale);
    if (row.weight) v = V::mulf(v, load_some(row.weight + i, lanes));
    if (row.bias) v = V::addf(v, load_some(row.bias + i, lanes));
    store_some(row.y + i, v, lanes);
  });
}

// y = x ⊙ cos + (-x₁, x₀) ⊙ sin, x₀ and x₁ the halves of x (2 · half).
static void rotate(const float *__restrict x, const float *__restrict cos,
                   const float *__restrict sin, float *__restrict y, int64_t half) {
  for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cos[i] - x[half + i] * sin[i];
  for (int64_t i = 0; i < half; ++i)
    y[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
}

} // namespace SFX_ISA
} // namespace sfx

// Kernels over one vector type V. Included once per instruction set, which names itself SFX_ISA.
//
// Few rows: codes are decoded in registers and multiplied at once (direct). More rows: a segment is
// decoded into cache and multiplied by all of them (blocked).
#pragma once

#include "readers.h"

// Loops over registers must vanish, or the compiler keeps the registers in memory.
#define SFX_UNROLL _Pragma("GCC unroll 24")

namespace sfx {
namespace SFX_ISA {

template <int kValue> struct Constant { static constexpr int value = kValue; };

// One multiply-accumulate: of codes in int32, V::kBias taken off wide ones; of floats in float32.
template <bool kCodes, bool kWide> struct Mac;
template <bool kWide> struct Mac<true, kWide> {
  using Acc = I;
  static SFX_INLINE Acc zero() { return V::zero(); }
  static SFX_INLINE Acc load(const uint8_t *p) { return V::load(p); }
  static SFX_INLINE Acc add(Acc a, Acc b) { return V::add(a, b); }
  static SFX_INLINE Acc mac(Acc acc, I w, const char *x) { return mac(acc, w, V::broadcast(x)); }
  static SFX_INLINE Acc mac(Acc acc, I w, I x) { return V::dot<kWide>(acc, w, x); }
  static SFX_INLINE I spread(const char *x) { return V::broadcast(x); }
};
template <> struct Mac<false, false> {
  using Acc = F;
  static SFX_INLINE Acc zero() { return V::zerof(); }
  static SFX_INLINE Acc load(const uint8_t *p) {
    return V::loadf(reinterpret_cast<const float *>(p));
  }
  static SFX_INLINE Acc add(Acc a, Acc b) { return V::addf(a, b); }
  static SFX_INLINE Acc mac(Acc acc, F w, const char *x) {
    return V::fma(w, V::broadcastf(x), acc);
  }
  static SFX_INLINE Acc mac(Acc acc, F w, F x) { return V::fma(w, x, acc); }
  static SFX_INLINE F spread(const char *x) { return V::broadcastf(x); }
};

// Whether a reader's codes are wide, if dot cares.
template <class Reader, bool kCodes>
constexpr bool is_wide = kCodes && V::kBias && Reader::kColumnsPerStep == step_columns(kCode8);

// The scales and zero points of one panel, and how a segment's sums enter the result.
struct Scaling {
  const Weight *w;
  const uint8_t *panel, *next;
  F scale;
  I zero;

  void start(const Weight &weight, int64_t p) {
    w = &weight;
    panel = weight.at(p);
    next = weight.at(p + 1);
    scale = V::setf(1.0f);
    zero = V::set(weight.zero);
  }
  SFX_INLINE void begin(int s) {
    if (is_float(w->kind)) return;
    scale = V::load_half(panel + 32 * s);
    V::prefetch(next + 32 * s);
    if (w->zero_points) zero = V::load_bytes(panel + w->zeros_at + kRows * s);
  }
  SFX_INLINE F finish(F result, F acc, int32_t, float) const {
    return V::fma(acc, scale, result);
  }
  SFX_INLINE F finish(F result, I acc, int32_t sum, float x_scale) const {
    const int32_t bias = w->kind == kCode8 ? V::kBias : 0;
    I offset = w->zero_points ? V::mul(V::sub(zero, V::set(bias)), V::set(sum))
                              : V::set((w->zero - bias) * sum);
    return V::fma(V::to_float(V::sub(acc, offset)), V::mulf(scale, V::setf(x_scale)), result);
  }
};

// Where the reading of a panel goes on.
struct Cursor {
  const uint8_t *codes = nullptr, *masks;
  int64_t last; // bytes of codes read since it was saved before
  template <class Reader> void save(const Reader &reader) {
    last = codes ? reader.codes - codes : 0;
    codes = reader.codes;
    masks = reader.masks;
  }
  template <class Reader> void restore(Reader &reader) const {
    reader.codes = codes;
    reader.masks = masks;
  }
};

// Rows of activations that a block of `direct` or `block` multiplies; codes or floats.
struct Rows {
  const char *x;
  int64_t stride;
  const int32_t *sums;
  int64_t sums_stride;
  const float *scales;
  int64_t scales_stride;

  SFX_INLINE int32_t sum(int r, int s) const { return sums ? sums[r * sums_stride + s] : 0; }
  SFX_INLINE float scale(int r, int s) const { return scales ? scales[r * scales_stride + s] : 1; }
  Rows from(int r) const {
    return {x + r * stride,
            stride,
            sums ? sums + r * sums_stride : nullptr,
            sums_stride,
            scales ? scales + r * scales_stride : nullptr,
            scales_stride};
  }
};

template <class Reader, bool kCodes, int kM>
void direct(const Weight &w, int64_t p, Rows x, float *tile, int64_t tile_stride) {
  using M = Mac<kCodes, is_wide<Reader, kCodes>>;
  constexpr int kChains = kM == 1 ? 4 : 1;
  const uint8_t *panel = w.at(p);
  Reader reader(w, panel);
  Scaling scaling;
  scaling.start(w, p);
  const uint32_t *counts =
      w.family == kColumns ? reinterpret_cast<const uint32_t *>(panel + w.counts_at) : nullptr;
  const char *at[kM];
  F result[kM];
  SFX_UNROLL for (int r = 0; r < kM; ++r) {
    at[r] = x.x + r * x.stride;
    result[r] = V::loadf(tile + r * tile_stride);
  }
  int segments = w.segment_count;
  for (int s = 0; s < segments; ++s) {
    scaling.begin(s);
    reader.begin(scaling.zero);
    typename M::Acc acc[kM][kChains];
    SFX_UNROLL for (int r = 0; r < kM; ++r)
      SFX_UNROLL for (int c = 0; c < kChains; ++c) acc[r][c] = M::zero();
    int steps = counts ? static_cast<int>(counts[s]) : w.segments[s].steps;
    auto step = [&](int chain) SFX_INLINE_LAMBDA {
      reader.next();
    SFX_UNROLL for (int j = 0; j < Reader::kUnits; ++j) {
        if constexpr (kCodes) {
          I unit = reader.unit(j);
          SFX_UNROLL for (int r = 0; r < kM; ++r) {
            auto &a = acc[r][(chain + j) % kChains];
            a = M::mac(a, unit, at[r] + 4 * j);
          }
        } else {
          constexpr int kValues = Reader::kColumnsPerStep / Reader::kUnits;
    SFX_UNROLL for (int i = 0; i < kValues; ++i) {
            F value = reader.value(j, i);
            SFX_UNROLL for (int r = 0; r < kM; ++r) {
              auto &a = acc[r][(chain + kValues * j + i) % kChains];
              a = M::mac(a, value, at[r] + 4 * (kValues * j + i));
            }
          }
        }
      }
      SFX_UNROLL for (int r = 0; r < kM; ++r) at[r] += Reader::kColumnsPerStep * (kCodes ? 1 : 4);
    };
    // Two steps at once where one leaves registers idle.
    constexpr int kMacs = V::kParts * (kCodes ? Reader::kUnits : Reader::kColumnsPerStep);
    int i = 0;
    if constexpr (V::kParts == 1 || kMacs <= 4) {
      for (; i + 2 <= steps; i += 2) {
        step(0);
        step(2);
      }
      if (i < steps) step(0);
    } else {
      for (; i < steps; ++i) step(0);
    }
    SFX_UNROLL for (int r = 0; r < kM; ++r) {
      SFX_UNROLL for (int c = 1; c < kChains; ++c) acc[r][0] = M::add(acc[r][0], acc[r][c]);
      result[r] = scaling.finish(result[r], acc[r][0], x.sum(r, s),
                                 x.scale(r, w.segments[s].scale));
    }
  }
  SFX_UNROLL for (int r = 0; r < kM; ++r) V::storef(tile + r * tile_stride, result[r]);
}

// Decodes `steps` steps into units: bytes for code activations, floats for float ones.
template <class Reader, bool kCodes> uint8_t *decode(Reader &reader, int steps, uint8_t *out) {
  for (int i = 0; i < steps; ++i) {
    reader.next();
    SFX_UNROLL for (int j = 0; j < Reader::kUnits; ++j) {
      if constexpr (kCodes) {
        V::store(out, reader.unit(j));
        out += kUnit;
      } else {
        constexpr int kValues = Reader::kColumnsPerStep / Reader::kUnits;
    SFX_UNROLL for (int c = 0; c < kValues; ++c) {
          V::storef(out, reader.value(j, c));
          out += kUnit;
        }
      }
    }
  }
  return out;
}

// tile (kM, kN · 16) += kM rows of x times the decoded units of kN panels, scaled.
template <bool kCodes, bool kWide, int kM, int kN>
void block(const Scaling *scaling, const uint8_t *units, int64_t panel_bytes, int count, Rows x,
           int sum, int scale, float *tile, int64_t tile_stride) {
  using M = Mac<kCodes, kWide>;
  typename M::Acc acc[kM][kN];
  SFX_UNROLL for (int r = 0; r < kM; ++r)
    SFX_UNROLL for (int q = 0; q < kN; ++q) acc[r][q] = M::zero();
  const char *at = x.x;
  for (int u = 0; u < count; ++u, at += 4, units += kUnit) {
    typename M::Acc w[kN];
    SFX_UNROLL for (int q = 0; q < kN; ++q) w[q] = M::load(units + q * panel_bytes);
    SFX_UNROLL for (int r = 0; r < kM; ++r) {
      auto b = M::spread(at + r * x.stride);
      SFX_UNROLL for (int q = 0; q < kN; ++q) acc[r][q] = M::mac(acc[r][q], w[q], b);
    }
  }
  SFX_UNROLL for (int r = 0; r < kM; ++r)
    SFX_UNROLL for (int q = 0; q < kN; ++q) {
      float *to = tile + r * tile_stride + kRows * q;
      V::storef(to, scaling[q].finish(V::loadf(to), acc[r][q], x.sum(r, sum), x.scale(r, scale)));
    }
}

// Has the lines of results [r, r + rows) of some panels on the way.
inline void fetch(const Target &target, int r, int rows, int panels) {
  const int64_t bytes = panels * kRows * target.size;
  for (int i = r; i < r + rows; ++i)
    for (int64_t at = 0; at < bytes; at += kUnit)
      V::prefetch_write(target.y + i * target.stride + at);
}

// As block, for any number of rows.
template <bool kCodes, bool kWide, int kN>
void blocks(const Scaling *scaling, const uint8_t *units, int64_t panel_bytes, int count, Rows x,
            int rows, int sum, int scale, float *tile, int64_t tile_stride, Target target) {
  constexpr int kMost = V::kBlock / kN;
  int r = 0;
  auto run = [&](auto size) {
    constexpr int kM = decltype(size)::value;
    for (; r + kM <= rows; r += kM) {
      if (target.y) fetch(target, r, kM, kN);
      block<kCodes, kWide, kM, kN>(scaling, units, panel_bytes, count, x.from(r), sum, scale,
                                   tile + r * tile_stride, tile_stride);
    }
  };
  run(Constant<kMost>());
  run(Constant<(kMost > 4 ? 4 : 2)>());
  run(Constant<1>());
}

} // namespace SFX_ISA
} // namespace sfx

// 16 lanes of 32 bits in four NEON registers.
#pragma once

#include <arm_neon.h>

#include "tables.h"

namespace sfx {
namespace SFX_ISA {

// For four bits of mask, what kBitTables has, as bytes of 32-bit lanes.
struct LaneTables {
  uint8_t expand[16][16];
  uint8_t compress[16][16];

  constexpr LaneTables() : expand(), compress() {
    for (int mask = 0; mask < 16; ++mask)
      for (int i = 0; i < 16; ++i) {
        const int to = kBitTables.low[mask][i / 4], from = kBitTables.compress[mask][i / 4];
        expand[mask][i] = static_cast<uint8_t>(to & 0x80 ? 0x80 : 4 * to + i % 4);
        compress[mask][i] = static_cast<uint8_t>(from & 0x80 ? 0x80 : 4 * from + i % 4);
      }
  }
};
alignas(64) static constexpr LaneTables kLaneTables;

struct V {
  struct I {
    uint32x4_t v[4];
  };
  struct F {
    float32x4_t v[4];
  };
  static constexpr int kParts = 4;
  static constexpr int kFewRows = 4;
  static constexpr bool kEights = false;
  static constexpr bool kLookup = false;
  static constexpr bool kExpandsMemory = true;
  static constexpr int kBias = 128;
  static constexpr int kPanels = 2;
  static constexpr int kBlock = 6;

  template <class T, class Part> static T four(Part part) {
    return {{part(0), part(1), part(2), part(3)}};
  }
  template <class T> static T read(const void *p) {
    T out;
    __builtin_memcpy(&out, p, sizeof out);
    return out;
  }
  static const char *bytes(const void *p) { return static_cast<const char *>(p); }

  static void prefetch(const void *p) { // not __builtin_prefetch, as in vec_avx512.h
    __asm__ volatile("prfm pldl1keep, %0" : : "Q"(*bytes(p)));
  }
  static void prefetch_write(const void *p) {
    __asm__ volatile("prfm pstl1keep, %0" : : "Q"(*bytes(p)));
  }
  static I load(const void *p) {
    return four<I>([&](int i) { return read<uint32x4_t>(bytes(p) + 16 * i); });
  }
  static void store(void *p, I v) { __builtin_memcpy(p, &v, sizeof v); }
  static F loadf(const float *p) {
    return four<F>([&](int i) { return read<float32x4_t>(p + 4 * i); });
  }
  static void storef(void *p, F v) { __builtin_memcpy(p, &v, sizeof v); }
  static I zero() { return set(0); }
  static F zerof() { return setf(0); }
  static I set(int32_t v) {
    return four<I>([&](int) { return vdupq_n_u32(static_cast<uint32_t>(v)); });
  }
  static F setf(float v) {
    return four<F>([&](int) { return vdupq_n_f32(v); });
  }
  static I broadcast(const char *p) { return set(read<int32_t>(p)); }
  static F broadcastf(const char *p) { return setf(read<float>(p)); }
  static F as_float(I a) {
    return four<F>([&](int i) { return vreinterpretq_f32_u32(a.v[i]); });
  }
  static I add(I a, I b) {
    return four<I>([&](int i) { return vaddq_u32(a.v[i], b.v[i]); });
  }
  static I sub(I a, I b) {
    return four<I>([&](int i) { return vsubq_u32(a.v[i], b.v[i]); });
  }
  static I mul(I a, I b) {
    return four<I>([&](int i) { return vmulq_u32(a.v[i], b.v[i]); });
  }
  static I bits_and(I a, I b) {
    return four<I>([&](int i) { return vandq_u32(a.v[i], b.v[i]); });
  }
  static I shift_right(I a, int s) {
    return four<I>([&](int i) { return vshlq_u32(a.v[i], vdupq_n_s32(-s)); });
  }
  static I shift_left(I a, int s) {
    return four<I>([&](int i) { return vshlq_u32(a.v[i], vdupq_n_s32(s)); });
  }
  // mask ? a : b, bit by bit
  static I select(I mask, I a, I b) {
    return four<I>([&](int i) { return vbslq_u32(mask.v[i], a.v[i], b.v[i]); });
  }
  // acc + the four products of bytes w and signed bytes x in each lane. Products are of signed
  // bytes: w is below 128, or kWide and 128 is taken off it.
  template <bool kWide> static I dot(I acc, I w, I x) {
    return four<I>([&](int i) {
      const uint8x16_t codes = vreinterpretq_u8_u32(w.v[i]);
      const uint8x16_t fit = kWide ? veorq_u8(codes, vdupq_n_u8(128)) : codes;
      return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(acc.v[i]),
                                             vreinterpretq_s8_u8(fit),
                                             vreinterpretq_s8_u32(x.v[i])));
    });
  }
  static F fma(F a, F b, F c) {
    return four<F>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static F addf(F a, F b) {
    return four<F>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
  }
  static F subf(F a, F b) {
    return four<F>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
  }
  static F mulf(F a, F b) {
    return four<F>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  static F to_float(I a) {
    return four<F>([&](int i) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a.v[i])); });
  }

  static float32x4_t half_at(const void *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(read<uint16x4_t>(p)));
  }
  static float32x4_t bfloat_at(const void *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(read<uint16x4_t>(p), 16));
  }
  static F load_half(const void *p) {
    return four<F>([&](int i) { return half_at(bytes(p) + 8 * i); });
  }
  static F load_bfloat(const void *p) {
    return four<F>([&](int i) { return bfloat_at(bytes(p) + 8 * i); });
  }
  static I load_bytes(const void *p) { // 16 bytes to 16 lanes
    const uint8x16_t v = read<uint8x16_t>(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_u8(vget_high_u8(v));
    return {{vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)),
             vmovl_u16(vget_low_u16(high)), vmovl_u16(vget_high_u16(high))}};
  }

  // Lanes of `mask` take successive lanes of v, the others those of rest.
  static uint32x4_t expand(uint32x4_t rest, int mask, uint32x4_t v) {
    return vreinterpretq_u32_u8(vqtbx1q_u8(vreinterpretq_u8_u32(rest), vreinterpretq_u8_u32(v),
                                           vld1q_u8(kLaneTables.expand[mask])));
  }
  static int part(uint64_t mask, int i) { return static_cast<int>(mask >> 4 * i & 15); }
  // The lanes (bytes) of `mask` take successive lanes (bytes) at p, the others those of rest.
  static I expand_lanes(I rest, uint16_t mask, const void *p) {
    const char *at = bytes(p);
    return four<I>([&](int i) {
      const uint32x4_t v = read<uint32x4_t>(at);
      at += 4 * kBitTables.ones[part(mask, i)];
      return expand(rest.v[i], part(mask, i), v);
    });
  }
  template <class At> static F expand_floats(uint16_t mask, const void *p, At from) {
    const char *at = bytes(p);
    return four<F>([&](int i) {
      const uint32x4_t v = vreinterpretq_u32_f32(from(at));
      at += 2 * kBitTables.ones[part(mask, i)];
      return vreinterpretq_f32_u32(expand(vdupq_n_u32(0), part(mask, i), v));
    });
  }
  static F expand_half(uint16_t mask, const void *p) { return expand_floats(mask, p, half_at); }
  static F expand_bfloat(uint16_t mask, const void *p) { return expand_floats(mask, p, bfloat_at); }
  static I expand_bytes(I rest, uint64_t mask, const void *p) {
    const char *at = bytes(p);
    return four<I>([&](int i) {
      const int low = mask >> 16 * i & 255, high = mask >> (16 * i + 8) & 255;
      const uint8x16_t from = vaddq_u8(vld1q_u8(kBitTables.low[low]), vld1q_u8(kBitTables.high[high]));
      const uint8x16_t v = read<uint8x16_t>(at);
      at += kBitTables.ones[low] + kBitTables.ones[high];
      return vreinterpretq_u32_u8(vqtbx1q_u8(vreinterpretq_u8_u32(rest.v[i]), v, from));
    });
  }
  // The bytes (floats) of x under `mask`, side by side; at most 64 are written. Returns those bytes
  // in any order among zeros.
  static I compact_bytes(char *out, uint64_t mask, const char *x) {
    auto eight = [&](int i) {
      const int part = mask >> 8 * i & 255;
      const uint8x8_t kept = vtbl1_u8(read<uint8x8_t>(x + 8 * i), vld1_u8(kBitTables.compress[part]));
      __builtin_memcpy(out, &kept, sizeof kept);
      out += kBitTables.ones[part];
      return kept;
    };
    return four<I>([&](int i) {
      const uint8x8_t low = eight(2 * i);
      return vreinterpretq_u32_u8(vcombine_u8(low, eight(2 * i + 1)));
    });
  }
  static void compact_floats(char *out, uint64_t mask, const char *x) {
    for (int i = 0; i < 16; ++i) {
      const uint8x16_t from = vld1q_u8(kLaneTables.compress[part(mask, i)]);
      const uint8x16_t kept = vqtbl1q_u8(read<uint8x16_t>(x + 16 * i), from);
      __builtin_memcpy(out, &kept, sizeof kept);
      out += 4 * kBitTables.ones[part(mask, i)];
    }
  }
  static int32_t sum(I a) {
    const uint32x4_t low = vaddq_u32(a.v[0], a.v[1]), high = vaddq_u32(a.v[2], a.v[3]);
    return static_cast<int32_t>(vaddvq_u32(vaddq_u32(low, high)));
  }
};

} // namespace SFX_ISA
} // namespace sfx

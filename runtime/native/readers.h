// Readers: how the codes of a panel become units. Included once per instruction set.
#pragma once

#include "weight.h"

#define SFX_INLINE inline __attribute__((always_inline))
#define SFX_INLINE_LAMBDA __attribute__((always_inline))

namespace sfx {
namespace SFX_ISA {

constexpr int kAhead = 4096;      // bytes from the codes that are decoded to those fetched
constexpr int kMasksAhead = 2048; // and of their masks

using I = V::I;
using F = V::F;

constexpr int code_bits(Kind kind) {
  return kind == kCode2 ? 2 : kind == kCode3 ? 3 : kind == kCode4 ? 4 : 8;
}
// A byte repeated 8 / bits times in itself, four times over: 0x55555555 for 2 bits.
constexpr int32_t repeat_code(int bits) {
  return bits == 2 ? 0x55555555 : bits == 4 ? 0x11111111 : 0x01010101;
}

// V, in which names are looked up only where they are used.
template <int> struct Late { using type = V; };

// Codes of kDense (and kColumns), kLanes or kBytes. After next(), unit(j) holds columns 4j…4j+3 of
// the step as unsigned bytes and value(j, i) column 4j+i as floats, zero points subtracted.
template <Family kFamily, Kind kKind, bool kZeros> struct Codes {
  using Vec = typename Late<kKind>::type;
  static constexpr int kBits = code_bits(kKind);
  static constexpr int kUnits = step_columns(kKind) / 4;
  static constexpr int kColumnsPerStep = step_columns(kKind);
  const uint8_t *codes, *masks, *shared;
  I raw[kKind == kCode3 ? 3 : 1];
  I rest;  // what a position that is not stored decodes from: the zero point
  F table; // value of a code
  F zeros; // zero points as floats

  Codes(const Weight &w, const uint8_t *panel)
      : codes(panel + w.codes_at), masks(panel + w.masks_at) {
    float values[16];
    for (int c = 0; c < 16; ++c)
      values[c] = static_cast<float>((c & ((1 << kBits) - 1)) - (kZeros ? 0 : w.zero));
    table = V::loadf(values);
  }
  SFX_INLINE void begin(I zero) {
    constexpr bool kUnpacked = kFamily == kBytes && !V::kExpandsMemory;
    rest = V::mul(zero, V::set(kUnpacked ? 0x01010101 : repeat_code(kBits)));
    zeros = V::to_float(zero);
  }
  SFX_INLINE void next() {
    V::prefetch(codes + kAhead);
    if constexpr (kFamily == kLanes || kFamily == kBytes) V::prefetch(masks + kMasksAhead);
    if constexpr (kFamily == kLanes) {
      uint16_t mask;
      __builtin_memcpy(&mask, masks, 2);
      masks += 2;
      raw[0] = V::expand_lanes(rest, mask, codes);
      codes += 4 * __builtin_popcount(mask);
    } else if constexpr (kFamily == kBytes) {
      if constexpr (V::kExpandsMemory) shared = codes;
      else raw[0] = V::load(codes);
      int longest = 0;
#pragma GCC unroll 8
      for (int j = 0; j < kUnits; ++j) {
        int kept = __builtin_popcountll(mask_of(j));
        longest = kept > longest ? kept : longest;
      }
      codes += longest;
      masks += 8 * kUnits;
    } else {
#pragma GCC unroll 3
      for (int i = 0; i < step_bytes(kKind) / kUnit; ++i) raw[i] = V::load(codes + kUnit * i);
      codes += step_bytes(kKind);
    }
  }
  SFX_INLINE uint64_t mask_of(int j) const {
    uint64_t mask;
    __builtin_memcpy(&mask, masks + 8 * j, 8);
    return mask;
  }
  SFX_INLINE I unit(int j) const {
    if constexpr (kKind == kCode3) {
      I low = V::shift_right(raw[j / 4], 2 * (j % 4));
      I high = j < 2 ? V::shift_left(raw[2], 2 - j) : V::shift_right(raw[2], j - 2);
      return V::bits_and(V::select(V::set(0x03030303), low, high), V::set(0x07070707));
    } else {
      if constexpr (kFamily != kBytes) return field(raw[0], j);
      else if constexpr (V::kExpandsMemory)
        return field(Vec::expand_bytes(rest, mask_of(j - kUnits), shared), j);
      else return Vec::expand_bytes(rest, mask_of(j - kUnits), field(raw[0], j));
    }
  }
  SFX_INLINE static I field(I v, int j) {
    constexpr int32_t kMask = static_cast<int32_t>(((1u << kBits) - 1) * 0x01010101u);
    return kBits == 8 ? v : V::bits_and(V::shift_right(v, kBits * j), V::set(kMask));
  }
  SFX_INLINE F value(int j, int i) const {
    constexpr bool kClean = kKind == kCode3 || kFamily == kBytes;
    I v = kClean ? V::shift_right(unit(j), 8 * i) : V::shift_right(raw[0], 8 * i + kBits * j);
    if constexpr (kBits == 8 || !V::kLookup) {
      return V::subf(V::to_float(V::bits_and(v, V::set((1 << kBits) - 1))), zeros);
    } else {
      F f = Vec::lookup(table, v);
      return kZeros ? V::subf(f, zeros) : f;
    }
  }
};

// Float values of kDense (and kColumns) or kLanes; a step is one column.
template <Family kFamily, Kind kKind> struct Floats {
  static constexpr int kUnits = 1;
  static constexpr int kColumnsPerStep = 1;
  static constexpr int kBytesPerValue = kKind == kFloat32 ? 4 : 2;
  const uint8_t *codes, *masks;
  F now;

  Floats(const Weight &w, const uint8_t *panel)
      : codes(panel + w.codes_at), masks(panel + w.masks_at) {}
  SFX_INLINE void begin(I) {}
  SFX_INLINE void next() {
    V::prefetch(codes + kAhead);
    int kept = kRows;
    if constexpr (kFamily == kLanes) {
      uint16_t mask;
      __builtin_memcpy(&mask, masks, 2);
      masks += 2;
      kept = __builtin_popcount(mask);
      if constexpr (kKind == kFloat32)
        now = V::as_float(V::expand_lanes(V::zero(), mask, codes));
      else
        now = kKind == kFloat16 ? V::expand_half(mask, codes) : V::expand_bfloat(mask, codes);
    } else if constexpr (kKind == kFloat32) {
      now = V::loadf(reinterpret_cast<const float *>(codes));
    } else {
      now = kKind == kFloat16 ? V::load_half(codes) : V::load_bfloat(codes);
    }
    codes += kBytesPerValue * kept;
  }
  SFX_INLINE F value(int, int) const { return now; }
  SFX_INLINE I unit(int) const { return V::zero(); }
};

} // namespace SFX_ISA
} // namespace sfx

// 16 lanes of 32 bits in the compiler's own vectors, which it cuts to what the machine has.
#pragma once

#include "floats.h"
#include "weight.h"

namespace sfx {
namespace SFX_ISA {

struct V {
  using I = uint32_t __attribute__((vector_size(64)));
  using F = float __attribute__((vector_size(64)));
  using Signed = int32_t __attribute__((vector_size(64)));
  using Short = int16_t __attribute__((vector_size(64)));
  static constexpr int kParts = 4;
  static constexpr int kFewRows = 0;
  static constexpr bool kEights = false;
  static constexpr bool kLookup = false;
  static constexpr bool kExpandsMemory = true;
  static constexpr int kBias = 0;
  static constexpr int kPanels = 2;
  static constexpr int kBlock = 2;

  template <class T> static T read(const void *p) {
    T out;
    __builtin_memcpy(&out, p, sizeof out);
    return out;
  }
  template <class T, class Lane> static T lanes(Lane lane) {
    T out;
    for (int i = 0; i < 16; ++i) out[i] = lane(i);
    return out;
  }

  static void prefetch_write(const void *) {}
  static void prefetch(const void *) {}
  static I load(const void *p) { return read<I>(p); }
  static void store(void *p, I v) { __builtin_memcpy(p, &v, sizeof v); }
  static F loadf(const float *p) { return read<F>(p); }
  static void storef(void *p, F v) { __builtin_memcpy(p, &v, sizeof v); }
  static I zero() { return I{}; }
  static F zerof() { return F{}; }
  static I set(int32_t v) { return static_cast<uint32_t>(v) - I{}; }
  static F setf(float v) { return v - F{}; }
  static I broadcast(const char *p) { return set(read<int32_t>(p)); }
  static F broadcastf(const char *p) { return setf(read<float>(p)); }
  static F as_float(I v) { return (F)v; }
  static I add(I a, I b) { return a + b; }
  static I sub(I a, I b) { return a - b; }
  static I mul(I a, I b) { return a * b; }
  static I bits_and(I a, I b) { return a & b; }
  static I shift_right(I a, int s) { return a >> s; }
  static I shift_left(I a, int s) { return a << s; }
  static I select(I mask, I a, I b) { return (mask & a) | (~mask & b); }
  // The low bytes of 16-bit lanes times each other: products fit. Pairs of them are added in 32.
  static I pairs(I w, I x) {
    const Signed p = (Signed)((Short)w * (((Short)x << 8) >> 8));
    return (I)(((p << 16) >> 16) + (p >> 16));
  }
  template <bool> static I dot(I acc, I w, I x) {
    const I low = set(0x00ff00ff);
    return acc + pairs(w & low, x) + pairs(w >> 8 & low, x >> 8);
  }
  static F fma(F a, F b, F c) { return a * b + c; }
  static float fma(float a, float b, float c) { return a * b + c; }
  static F addf(F a, F b) { return a + b; }
  static F subf(F a, F b) { return a - b; }
  static F mulf(F a, F b) { return a * b; }
  static F to_float(I v) { return __builtin_convertvector((Signed)v, F); }

  static uint16_t half_at(const void *p, int i) {
    return read<uint16_t>(static_cast<const char *>(p) + 2 * i);
  }
  static F load_half(const void *p) {
    return lanes<F>([=](int i) { return from_half(half_at(p, i)); });
  }
  static F load_bfloat(const void *p) {
    return lanes<F>([=](int i) { return from_bfloat(half_at(p, i)); });
  }
  static I load_bytes(const void *p) { // 16 bytes to 16 lanes
    return lanes<I>([=](int i) { return static_cast<const uint8_t *>(p)[i]; });
  }
  // The lanes (bytes) of `mask` take successive lanes (bytes) at p, the others those of rest.
  static I expand_lanes(I rest, uint16_t mask, const void *p) {
    uint32_t out[16];
    store(out, rest);
    const char *from = static_cast<const char *>(p);
    for (; mask; mask &= mask - 1, from += 4) 
      __builtin_memcpy(out + __builtin_ctz(mask), from, 4);
    return load(out);
  }
  template <class T> static F expand_to(uint16_t mask, const void *p, T to_float) {
    float out[16] = {};
    for (int i = 0; mask; mask &= mask - 1) out[__builtin_ctz(mask)] = to_float(half_at(p, i++));
    return loadf(out);
  }
  static F expand_half(uint16_t mask, const void *p) { return expand_to(mask, p, from_half); }
  static F expand_bfloat(uint16_t mask, const void *p) { return expand_to(mask, p, from_bfloat); }
  static I expand_bytes(I rest, uint64_t mask, const void *p) {
    uint8_t out[64];
    store(out, rest);
    const uint8_t *from = static_cast<const uint8_t *>(p);
    for (; mask; mask &= mask - 1) out[__builtin_ctzll(mask)] = *from++;
    return load(out);
  }
  // The bytes (floats) of x under `mask`, side by side. Returns those bytes among zeros.
  static I compact_bytes(char *out, uint64_t mask, const char *x) {
    char kept[64] = {};
    int count = 0;
    for (; mask; mask &= mask - 1) kept[count++] = x[__builtin_ctzll(mask)];
    __builtin_memcpy(out, kept, sizeof kept);
    return load(kept);
  }
  static void compact_floats(char *out, uint64_t mask, const char *x) {
    for (; mask; mask &= mask - 1, out += 4) __builtin_memcpy(out, x + 4 * __builtin_ctzll(mask), 4);
  }
  static int32_t sum(I v) {
    uint32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += v[i];
    return static_cast<int32_t>(sum);
  }
};

} // namespace SFX_ISA
} // namespace sfx

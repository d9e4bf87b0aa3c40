// 16 lanes of 32 bits in two AVX2 registers.
#pragma once

#include <immintrin.h>

#include "tables.h"

namespace sfx {
namespace SFX_ISA {

struct V {
  struct I {
    __m256i a, b;
  };
  struct F {
    __m256 a, b;
  };
  static constexpr int kParts = 2;
  static constexpr int kFewRows = 4;
  static constexpr bool kEights = false;
  static constexpr bool kLookup = false;      // converting is faster than a table
  static constexpr bool kExpandsMemory = true; // not registers
  static constexpr int kBlock = 6;
#if defined(SFX_VNNI)
  static constexpr int kBias = 0; // what dot<true>, for codes of 5 to 8 bits, takes off codes
  static constexpr int kPanels = 1;
#else
  static constexpr int kBias = 128;
  static constexpr int kPanels = 2;
#endif

  static const __m256i *as(const void *p) { return static_cast<const __m256i *>(p); }
  static const __m128i *half(const void *p) { return static_cast<const __m128i *>(p); }
  static const char *bytes(const void *p) { return static_cast<const char *>(p); }

  static void prefetch(const void *p) { // not _mm_prefetch, as in vec_avx512.h
    __asm__ volatile("prefetcht0 %0" : : "m"(*bytes(p)));
  }
  static void prefetch_write(const void *p) { __asm__ volatile("prefetchw %0" : : "m"(*bytes(p))); }
  static I load(const void *p) { return {_mm256_loadu_si256(as(p)), _mm256_loadu_si256(as(p) + 1)}; }
  static void store(void *p, I v) {
    _mm256_storeu_si256(static_cast<__m256i *>(p), v.a);
    _mm256_storeu_si256(static_cast<__m256i *>(p) + 1, v.b);
  }
  static F loadf(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void storef(void *p, F v) {
    _mm256_storeu_ps(static_cast<float *>(p), v.a);
    _mm256_storeu_ps(static_cast<float *>(p) + 8, v.b);
  }
  static I both(__m256i v) { return {v, v}; }
  static I zero() { return both(_mm256_setzero_si256()); }
  static F zerof() { return setf(0); }
  static I set(int32_t v) { return both(_mm256_set1_epi32(v)); }
  static F setf(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static I broadcast(const char *p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return set(v);
  }
  static F broadcastf(const char *p) {
    float v;
    __builtin_memcpy(&v, p, 4);
    return setf(v);
  }
  static F as_float(I v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
  static I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static I mul(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
  static I bits_and(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static I bits_or(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static I shift_right(I v, int s) { return {_mm256_srli_epi32(v.a, s), _mm256_srli_epi32(v.b, s)}; }
  static I shift_left(I v, int s) { return {_mm256_slli_epi32(v.a, s), _mm256_slli_epi32(v.b, s)}; }
  // mask ? x : y, bit by bit
  static I select(I mask, I x, I y) {
    return bits_or(bits_and(mask, x), {_mm256_andnot_si256(mask.a, y.a),
                                       _mm256_andnot_si256(mask.b, y.b)});
  }
#if defined(SFX_VNNI)
  // acc + the four products of unsigned bytes w and signed bytes x in each lane
  template <bool> static __m256i dot(__m256i acc, __m256i w, __m256i x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x)); // as in vec_avx512.h
    return acc;
  }
#else
  // The same of x ≥ -127. Sums of two products must fit 16 bits: w is below 128, or kWide and 128
  // is taken off it.
  template <bool kWide> static __m256i dot(__m256i acc, __m256i w, __m256i x) {
    if constexpr (kWide) {
      w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
      x = _mm256_sign_epi8(x, w);
      w = _mm256_abs_epi8(w);
    }
    __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
    return _mm256_add_epi32(acc, sums);
  }
#endif
  template <bool kWide> static I dot(I acc, I w, I x) {
    return {dot<kWide>(acc.a, w.a, x.a), dot<kWide>(acc.b, w.b, x.b)};
  }
  static F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static F addf(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F subf(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mulf(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }

  static __m256 half_at(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(half(p))); }
  static __m256 bfloat_at(const void *p) {
    __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128(half(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
  }
  static F load_half(const void *p) { return {half_at(p), half_at(bytes(p) + 16)}; }
  static F load_bfloat(const void *p) { return {bfloat_at(p), bfloat_at(bytes(p) + 16)}; }
  static I load_bytes(const void *p) { // 16 bytes to 16 lanes
    __m128i v = _mm_loadu_si128(half(p));
    return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
  }

  static __m128i row(const uint8_t *table) { return _mm_loadl_epi64(half(table)); }
  // Lanes of `mask` take successive lanes of v, the others those of rest.
  static __m256 expand(__m256 rest, uint8_t mask, __m256 v) {
    __m256i from = _mm256_cvtepi8_epi32(row(kBitTables.low[mask]));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(v, from), rest, _mm256_castsi256_ps(from));
  }
  static uint8_t low(uint16_t mask) { return static_cast<uint8_t>(mask); }
  static uint8_t high(uint16_t mask) { return static_cast<uint8_t>(mask >> 8); }
  static const char *behind(const void *p, uint16_t mask, int size) {
    return bytes(p) + size * __builtin_popcount(low(mask));
  }
  // The lanes (bytes) of `mask` take successive lanes (bytes) at p, the others those of rest.
  static I expand_lanes(I rest, uint16_t mask, const void *p) {
    const __m256 v = _mm256_castsi256_ps(_mm256_loadu_si256(as(p)));
    const __m256 w = _mm256_castsi256_ps(_mm256_loadu_si256(as(behind(p, mask, 4))));
    const F f = as_float(rest);
    return {_mm256_castps_si256(expand(f.a, low(mask), v)),
            _mm256_castps_si256(expand(f.b, high(mask), w))};
  }
  static F expand_half(uint16_t mask, const void *p) {
    const F rest = zerof();
    return {expand(rest.a, low(mask), half_at(p)),
            expand(rest.b, high(mask), half_at(behind(p, mask, 2)))};
  }
  static F expand_bfloat(uint16_t mask, const void *p) {
    const F rest = zerof();
    return {expand(rest.a, low(mask), bfloat_at(p)),
            expand(rest.b, high(mask), bfloat_at(behind(p, mask, 2)))};
  }
  static __m256i expand_bytes(__m256i rest, uint32_t mask, const char *p) { // 16 at a time
    __m128i order[2], v[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i, mask >>= 16) {
      const __m128i first = _mm_load_si128(half(kBitTables.low[mask & 255]));
      order[i] = _mm_add_epi8(first, _mm_load_si128(half(kBitTables.high[mask >> 8 & 255])));
      v[i] = _mm_loadu_si128(half(p));
      p += __builtin_popcount(mask & 0xffff);
    }
    const __m256i from = _mm256_set_m128i(order[1], order[0]);
    const __m256i kept = _mm256_shuffle_epi8(_mm256_set_m128i(v[1], v[0]), from);
    return _mm256_blendv_epi8(kept, rest, from);
  }
  static I expand_bytes(I rest, uint64_t mask, const void *p) {
    const uint32_t low = static_cast<uint32_t>(mask);
    return {expand_bytes(rest.a, low, bytes(p)),
            expand_bytes(rest.b, mask >> 32, bytes(p) + __builtin_popcount(low))};
  }
  // The bytes (floats) of x under `mask`, side by side; at most 64 are written. Returns those bytes
  // in any order among zeros.
  static I compact_bytes(char *out, uint64_t mask, const char *x) {
    __m128i kept[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const uint8_t part = static_cast<uint8_t>(mask >> 8 * i);
      kept[i] = _mm_loadl_epi64(half(x + 8 * i));
      kept[i] = _mm_shuffle_epi8(kept[i], row(kBitTables.compress[part]));
      _mm_storel_epi64(reinterpret_cast<__m128i *>(out), kept[i]);
      out += __builtin_popcount(part);
    }
    const __m128i a = _mm_unpacklo_epi64(kept[0], kept[1]), b = _mm_unpacklo_epi64(kept[2], kept[3]);
    const __m128i c = _mm_unpacklo_epi64(kept[4], kept[5]), d = _mm_unpacklo_epi64(kept[6], kept[7]);
    return {_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)};
  }
  static void compact_floats(char *out, uint64_t mask, const char *x) {
    for (int i = 0; i < 8; ++i, mask >>= 8, x += 32) {
      const uint8_t part = static_cast<uint8_t>(mask);
      const __m256i from = _mm256_cvtepi8_epi32(row(kBitTables.compress[part]));
      __m256i v = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(as(x)), from);
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), v);
      out += 4 * __builtin_popcount(part);
    }
  }
  static int32_t sum(I v) {
    const __m256i both = _mm256_add_epi32(v.a, v.b);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
  }
};

} // namespace SFX_ISA
} // namespace sfx

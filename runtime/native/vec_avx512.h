// 16 lanes of 32 bits in one AVX-512 register. The other vec_*.h offer the same names.
#pragma once

#include <immintrin.h>

namespace sfx {
namespace SFX_ISA {

struct V {
  using I = __m512i;
  using F = __m512;
  static constexpr int kParts = 1;      // registers per vector
  static constexpr int kFewRows = 4;    // up to here decode in registers, not into cache; 0 to 4
  static constexpr bool kEights = true; // registers for eight rows at a time
  static constexpr int kPanels = 4;     // most of a block
  static constexpr int kBlock = 24;     // accumulators of a block
  static constexpr bool kLookup = true; // of a code's value in a table, else by conversion
  static constexpr bool kExpandsMemory = false; // expand_bytes takes a pointer, not a register
  static constexpr int kBias = 0; // what dot<true>, for codes of 5 to 8 bits, takes off codes

  // Not _mm_prefetch: GCC takes a function of nothing else for one without effect and drops it.
  static void prefetch(const void *p) {
    __asm__ volatile("prefetcht0 %0" : : "m"(*static_cast<const char *>(p)));
  }
  static void prefetch_write(const void *p) {
    __asm__ volatile("prefetchw %0" : : "m"(*static_cast<const char *>(p)));
  }
  static I load(const void *p) { return _mm512_loadu_si512(p); }
  static void store(void *p, I v) { _mm512_storeu_si512(p, v); }
  static F loadf(const float *p) { return _mm512_loadu_ps(p); }
  static void storef(void *p, F v) { _mm512_storeu_ps(static_cast<float *>(p), v); }
  static I zero() { return _mm512_setzero_si512(); }
  static F zerof() { return _mm512_setzero_ps(); }
  static I set(int32_t v) { return _mm512_set1_epi32(v); }
  static F setf(float v) { return _mm512_set1_ps(v); }
  static I broadcast(const char *p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }
  static F broadcastf(const char *p) {
    float v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_ps(v);
  }
  static F as_float(I v) { return _mm512_castsi512_ps(v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I bits_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I shift_right(I a, int s) { return _mm512_srli_epi32(a, s); }
  static I shift_left(I a, int s) { return _mm512_slli_epi32(a, s); }
  // mask ? a : b, bit by bit
  static I select(I mask, I a, I b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }
  // acc + the four products of unsigned bytes w and signed bytes x in each lane
  template <bool> static I dot(I acc, I w, I x) {
    // Not _mm512_dpbusd_epi32: GCC 12 copies every accumulator of a loop before and after it.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static F addf(F a, F b) { return _mm512_add_ps(a, b); }
  static F subf(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mulf(F a, F b) { return _mm512_mul_ps(a, b); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  // table[lane mod 16]
  static F lookup(F table, I v) { return _mm512_permutexvar_ps(v, table); }
  static F load_half(const void *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(p)));
  }
  static F load_bfloat(const void *p) {
    __m256i v = _mm256_loadu_si256(static_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static I load_bytes(const void *p) { // 16 bytes to 16 lanes
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p)));
  }
  // The lanes (bytes) of `mask` take successive lanes (bytes) of p or v, the others those of rest.
  static I expand_lanes(I rest, uint16_t mask, const void *p) {
    return _mm512_mask_expand_epi32(rest, mask, _mm512_loadu_si512(p));
  }
  static I expand_bytes(I rest, uint64_t mask, I v) {
    return _mm512_mask_expand_epi8(rest, mask, v);
  }
  static F expand_half(uint16_t mask, const void *p) {
    __m256i v = _mm256_loadu_si256(static_cast<const __m256i *>(p));
    return _mm512_cvtph_ps(_mm256_maskz_expand_epi16(mask, v));
  }
  static F expand_bfloat(uint16_t mask, const void *p) {
    __m256i v = _mm256_loadu_si256(static_cast<const __m256i *>(p));
    v = _mm256_maskz_expand_epi16(mask, v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  // The bytes (floats) of x under `mask`, side by side, zero behind; 64 of them are written.
  static I compact_bytes(char *out, uint64_t mask, const char *x) {
    const I kept = _mm512_maskz_compress_epi8(mask, load(x));
    store(out, kept);
    return kept;
  }
  static void compact_floats(char *out, uint64_t mask, const char *x) {
    const float *from = reinterpret_cast<const float *>(x);
    float *to = reinterpret_cast<float *>(out);
    for (int i = 0; i < 4; ++i, mask >>= 16) {
      __mmask16 part = static_cast<__mmask16>(mask);
      storef(to, _mm512_maskz_compress_ps(part, loadf(from + 16 * i)));
      to += __builtin_popcount(part);
    }
  }
  static int32_t sum(I v) { return _mm512_reduce_add_epi32(v); }
};

} // namespace SFX_ISA
} // namespace sfx

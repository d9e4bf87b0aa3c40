// float16 and bfloat16 to and from float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "sparsefx.h"

namespace sfx {

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline float from_bfloat(uint16_t h) { return float_of(uint32_t(h) << 16); }
inline uint16_t to_bfloat(float v) {
  const uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Subnormals scale exactly: 2^112 moves half's exponents to float's.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}
inline uint16_t to_half(float v) {
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000;
  const uint32_t size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 0x38800000) { // subnormal half: adding 0.5 rounds at 2^-24
    const uint32_t rounded = bits_of(float_of(size) + 0.5f);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((size + 0xc8000fff + (size >> 13 & 1)) >> 13));
}

inline int64_t size_of(int type) { return type == SFX_F32 ? 4 : 2; }

inline void read(float *to, const void *from, int64_t start, int64_t count, int type) {
  if (type == SFX_F32) {
    std::memcpy(to, static_cast<const float *>(from) + start, count * 4);
    return;
  }
  const uint16_t *half = static_cast<const uint16_t *>(from) + start;
  for (int64_t i = 0; i < count; ++i)
    to[i] = type == SFX_F16 ? from_half(half[i]) : from_bfloat(half[i]);
}
inline void write(void *to, int64_t start, const float *from, int64_t count, int type) {
  if (type == SFX_F32) {
    std::memcpy(static_cast<float *>(to) + start, from, count * 4);
    return;
  }
  uint16_t *half = static_cast<uint16_t *>(to) + start;
  for (int64_t i = 0; i < count; ++i)
    half[i] = type == SFX_F16 ? to_half(from[i]) : to_bfloat(from[i]);
}

} // namespace sfx

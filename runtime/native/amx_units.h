// Segments of a panel as what tiles are loaded from: units of signed bytes or of bfloat16, 16 to a
// tile. Included by amx.cpp alone.
#pragma once

#include "kernels.h"

namespace sfx {
namespace amx {

constexpr int kStretch = 16; // segments decoded at a time, of kMaxSegment columns together

// The segment's units as signed bytes, `words` × 16 of them, zero behind the last column.
template <class Reader>
int decode_bytes(Reader &reader, I zero, int steps, uint8_t *out) {
  const I offset = V::mul(zero, V::set(0x01010101));
  uint8_t *at = out;
  for (int i = 0; i < steps; ++i) {
    reader.next();
#pragma GCC unroll 8
    for (int j = 0; j < Reader::kUnits; ++j, at += kUnit)
      V::store(at, _mm512_sub_epi8(reader.unit(j), offset));
  }
  const int words = (steps * Reader::kUnits + 15) / 16;
  for (uint8_t *end = out + words * kTileBytes; at < end; at += kUnit) V::store(at, V::zero());
  return words;
}

// Byte shuffles that put the first bytes of a lane where a mask of 4 columns has its ones.
struct Spread {
  alignas(64) uint8_t control[16][64];
  constexpr Spread() : control() {
    for (int mask = 0; mask < 16; ++mask)
      for (int i = 0; i < 64; ++i) {
        const int before = __builtin_popcount(mask & ((1 << (i % 4)) - 1));
        control[mask][i] =
            mask >> (i % 4) & 1 ? static_cast<uint8_t>(i / 4 % 4 * 4 + before) : uint8_t(0x80);
      }
  }
};
constexpr Spread kSpread; // not built at run time, with instructions that the processor may lack

// Units of the columns that a panel keeps, side by side, to units of all columns.
void spread(const uint8_t *masks, int words, const uint8_t *from, uint8_t *to) {
  int column = 0;
  for (int i = 0; i < words; ++i) {
    uint64_t mask;
    __builtin_memcpy(&mask, masks + 8 * i, 8);
    for (int j = 0; j < 16; ++j, mask >>= 4, to += kUnit) {
      const uint8_t *at = from + column / 4 * kUnit;
      const I shift = V::set(8 * (column % 4));
      const I lane = _mm512_shrdv_epi32(V::load(at), V::load(at + kUnit), shift);
      V::store(to, _mm512_shuffle_epi8(lane, V::load(kSpread.control[mask & 15])));
      column += __builtin_popcount(static_cast<unsigned>(mask & 15));
    }
  }
}

// A segment of bfloat16 values, 2 columns to a lane.
template <class Reader> int decode_floats(Reader &reader, int columns, uint8_t *out) {
  const int words = (columns + 63) / 64;
  const I upper = V::set(static_cast<int32_t>(0xffff0000));
  uint8_t *at = out;
  for (int i = 0; i < columns; i += 2, at += kUnit) {
    reader.next();
    const I low = V::shift_right(_mm512_castps_si512(reader.now), 16);
    I high = V::zero();
    if (i + 1 < columns) {
      reader.next();
      high = _mm512_castps_si512(reader.now);
    }
    V::store(at, V::select(upper, high, low));
  }
  for (uint8_t *end = out + 2 * words * kTileBytes; at < end; at += kUnit) V::store(at, V::zero());
  return words;
}

// Signed bytes, 4 columns to a lane, to bfloat16, 2 columns to a lane.
void widen(const uint8_t *from, int units, uint8_t *to) {
  for (int i = 0; i < units; ++i, from += kUnit) {
    const I v = V::load(from);
    for (int half = 0; half < 2; ++half, to += kUnit) {
      const I low = _mm512_srai_epi32(V::shift_left(v, 24 - 16 * half), 24);
      const I high = _mm512_srai_epi32(V::shift_left(v, 16 - 16 * half), 24);
      const I l = _mm512_castps_si512(V::to_float(low));
      const I h = _mm512_castps_si512(V::to_float(high));
      V::store(to, V::select(V::set(static_cast<int32_t>(0xffff0000)), h, V::shift_right(l, 16)));
    }
  }
}

// What a stretch of one panel takes as signed bytes and as bfloat16; each segment is padded.
constexpr int64_t kBytes8 = (int64_t(kMaxSegment) + 64 * kStretch) * kRows + kTileBytes;
constexpr int64_t kBytes16 = 2 * kBytes8;
static_assert(kMostPanels * kBytes16 + 2 * kBytes8 <= kUnitsBytes, "scratch is too small");

// Segment s of one panel as units of the type that meets x; returns words of 64 columns.
template <Family kFamily, Kind kKind>
int decode_segment(const Weight &w, Floats<kFamily, kKind> &reader, const Scaling &, int s, bool,
                   uint8_t *units, uint8_t *) {
  return decode_floats(reader, w.segments[s].columns, units);
}
template <class Reader>
int decode_segment(const Weight &w, Reader &reader, const Scaling &scaling, int s, bool codes,
                   uint8_t *units, uint8_t *room) {
  const Segment &segment = w.segments[s];
  uint8_t *dense = codes ? units : room, *kept = room + kBytes8;
  int words = segment.steps;
  if (w.family == kColumns) {
    const uint32_t *counts = reinterpret_cast<const uint32_t *>(scaling.panel + w.counts_at);
    decode_bytes(reader, scaling.zero, static_cast<int>(counts[s]), kept);
    spread(scaling.panel + w.masks_at + segment.start / 8, words, kept, dense);
  } else {
    words = decode_bytes(reader, scaling.zero, words, dense);
  }
  if (!codes) widen(dense, words * 16, units);
  return words;
}

} // namespace amx
} // namespace sfx

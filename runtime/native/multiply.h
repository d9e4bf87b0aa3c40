// The two entry points of an instruction set: quantize and multiply. Included once per set.
#pragma once

#include "kernels.h"

namespace sfx {
namespace SFX_ISA {

// Side by side the activations that segments [first, last) of a panel keep; zero behind each.
// `lines` of the codes at `ahead` are fetched per segment meanwhile.
template <bool kCodes>
void compact(const Weight &w, const uint8_t *panel, Rows x, int rows, int first, int last,
             char *out, int64_t out_stride, int32_t *sums, const uint8_t *ahead, int64_t lines) {
  constexpr int kSize = kCodes ? 1 : 4;
  const uint32_t *counts = reinterpret_cast<const uint32_t *>(panel + w.counts_at);
  const int step = step_columns(w.kind);
  const I ones = V::set(0x01010101);
  for (int s = first; s < last; ++s) {
    const Segment &segment = w.segments[s];
    const uint8_t *masks = panel + w.masks_at + segment.start / 8;
    for (int64_t i = 0; i < lines; ++i, ahead += kUnit) V::prefetch(ahead);
    for (int r = 0; r < rows; ++r) {
      char *to = out + r * out_stride;
      const char *from = x.x + r * x.stride + segment.start * kSize;
      I sum = V::zero();
      for (int i = 0; i < segment.steps; ++i) {
        uint64_t mask;
        __builtin_memcpy(&mask, masks + 8 * i, 8);
        if constexpr (kCodes)
          sum = V::dot<false>(sum, ones, V::compact_bytes(to, mask, from + 64 * i));
        else
          V::compact_floats(to, mask, from + 256 * i);
        to += __builtin_popcountll(mask) * kSize;
      }
      V::store(to, V::zero()); // as far as a last step may read
      V::store(to + kUnit, V::zero());
      if constexpr (kCodes) sums[r * int64_t(w.segment_count) + s] = V::sum(sum);
    }
    out += int64_t(counts[s]) * step * kSize;
  }
}

template <class Reader, bool kCodes>
SFX_INLINE void few(const Weight &w, int64_t p, Rows x, int rows, float *tile, int64_t stride) {
  int r = 0;
  if constexpr (V::kFewRows >= 4)
    for (; r + 4 <= rows; r += 4)
      direct<Reader, kCodes, 4>(w, p, x.from(r), tile + r * stride, stride);
  if constexpr (V::kFewRows >= 2)
    for (; r + 2 <= rows; r += 2)
      direct<Reader, kCodes, 2>(w, p, x.from(r), tile + r * stride, stride);
  if constexpr (V::kFewRows >= 1)
    if (r < rows) direct<Reader, kCodes, 1>(w, p, x.from(r), tile + r * stride, stride);
}

// Eight rows at a time: what is decoded in registers for each eight again takes less than going
// through cache, until rows are many (see some_rows).
template <class Reader, bool kCodes>
__attribute__((noinline)) void some(const Weight &w, int64_t p, Rows x, int rows, float *tile,
                                    int64_t stride) {
  int r = 0;
  for (; r + 8 <= rows; r += 8)
    direct<Reader, kCodes, 8>(w, p, x.from(r), tile + r * stride, stride);
  if (r < rows) few<Reader, kCodes>(w, p, x.from(r), rows - r, tile + r * stride, stride);
}

// Up to how many rows `some` is faster: 16 rows of 2048×2048 int8+a8 took 346 µs in place of 434,
// 24 took 525 and 549, 32 took 714 and 708.
constexpr int some_rows(bool codes) { return !V::kEights ? V::kFewRows : codes ? 24 : 8; }

// Decodes segment s of `count` panels, one after the other; `cursors` say where each goes on.
// Returns the units of one panel.
template <class Reader, bool kCodes>
int decode_panels(const Weight &w, Cursor *cursors, Scaling *scaling, int s, int steps, int count,
                  uint8_t *units) {
  constexpr int64_t kPanelBytes = int64_t(kMaxSegment) * (kCodes ? kRows : kUnit);
  int64_t bytes = 0;
  for (int q = 0; q < count; ++q, units += kPanelBytes) {
    Reader reader(w, scaling[q].panel);
    if (s) cursors[q].restore(reader);
    scaling[q].begin(s);
    reader.begin(scaling[q].zero);
    bytes = decode<Reader, kCodes>(reader, steps, units) - units;
    cursors[q].save(reader);
  }
  return static_cast<int>(bytes / kUnit);
}

template <class Reader, bool kCodes>
void many(const Weight &w, Rows x, int rows, int64_t p, int count, float *tile, int64_t stride,
          const Scratch &scratch) {
  constexpr bool kWide = is_wide<Reader, kCodes>;
  constexpr int64_t kPanelBytes = int64_t(kMaxSegment) * (kCodes ? kRows : kUnit);
  constexpr int kSize = kCodes ? 1 : 4;
  Cursor cursors[kMostPanels];
  Scaling scaling[kMostPanels];
  for (int q = 0; q < count; ++q) scaling[q].start(w, p + q);
  const bool columns = w.family == kColumns; // then count is 1: panels keep different columns
  const uint32_t *counts = reinterpret_cast<const uint32_t *>(w.at(p) + w.counts_at);
  for (int s = 0; s < w.segment_count; ++s) {
    const Segment &segment = w.segments[s];
    const int steps = columns ? static_cast<int>(counts[s]) : segment.steps;
    const int units = decode_panels<Reader, kCodes>(w, cursors, scaling, s, steps, count,
                                                    scratch.units);
    Rows part = x;
    part.x += segment.start * kSize;
    if (columns) {
      part.stride = ((int64_t(kMaxSegment) + 128) * kSize) | kUnit;
      compact<kCodes>(w, w.at(p), x, rows, s, s + 1, scratch.compact, part.stride, scratch.sums,
                      nullptr, 0);
      part.x = scratch.compact;
      part.sums = kCodes ? scratch.sums : nullptr;
    }
    const bool last = s + 1 == w.segment_count;
    auto multiply = [&](auto panels, int q) {
      constexpr int kN = decltype(panels)::value;
      const Target to = last ? scratch.target.from(q) : Target{};
      blocks<kCodes, kWide, kN>(scaling + q, scratch.units + q * kPanelBytes, kPanelBytes, units,
                                part, rows, s, segment.scale, tile + q * kRows, stride, to);
    };
    int q = 0;
    if constexpr (V::kPanels >= 4)
      for (; q + 4 <= count; q += 4) multiply(Constant<4>(), q);
    if constexpr (V::kPanels >= 2)
      for (; q + 2 <= count; q += 2) multiply(Constant<2>(), q);
    for (; q < count; ++q) multiply(Constant<1>(), q);
  }
}

// A panel's product for rows up to some_rows.
template <class Reader, bool kCodes>
SFX_INLINE void in_registers(const Weight &w, int64_t p, Rows x, int rows, float *tile,
                             int64_t stride) {
  if constexpr (V::kEights)
    if (rows > V::kFewRows) return some<Reader, kCodes>(w, p, x, rows, tile, stride);
  few<Reader, kCodes>(w, p, x, rows, tile, stride);
}

// The same of a panel that keeps columns of its own, for as many rows as there is scratch for.
template <class Reader, bool kCodes>
void compacted(const Weight &w, int64_t p, Rows x, int rows, float *tile, int64_t stride,
               const Scratch &scratch) {
  const int segments = w.segment_count;
  const uint8_t *codes = w.at(p) + w.codes_at;
  const int64_t lines = (w.at(p + 1) - codes) / kUnit / (segments ? segments : 1) + 1;
  for (int r = 0; r < rows; r += kCompactRows) {
    const int part_rows = rows - r < kCompactRows ? rows - r : kCompactRows;
    Rows part = x.from(r);
    part.stride = (w.padded + 128) * (kCodes ? 1 : 4);
    compact<kCodes>(w, w.at(p), x.from(r), part_rows, 0, segments, scratch.compact, part.stride,
                    scratch.sums, codes, r ? 0 : lines);
    part.x = scratch.compact;
    part.sums = kCodes ? scratch.sums : nullptr;
    in_registers<Reader, kCodes>(w, p, part, part_rows, tile + r * stride, stride);
  }
}

template <class Reader, bool kCodes>
void run(const Weight &w, Rows x, int rows, int64_t p, int count, float *tile,
         const Scratch &scratch) {
  const bool columns = w.family == kColumns;
  const int64_t stride = count * kRows;
  if (rows <= some_rows(kCodes)) {
    for (int q = 0; q < count; ++q)
      if (columns)
        compacted<Reader, kCodes>(w, p + q, x, rows, tile + q * kRows, stride, scratch);
      else
        in_registers<Reader, kCodes>(w, p + q, x, rows, tile + q * kRows, stride);
  } else if (columns) {
    for (int q = 0; q < count; ++q)
      many<Reader, kCodes>(w, x, rows, p + q, 1, tile + q * kRows, stride, scratch.from(q));
  } else {
    many<Reader, kCodes>(w, x, rows, p, count, tile, stride, scratch);
  }
}

template <Family kFamily, Kind kKind, class... Args>
void run_codes(const Weight &w, bool codes, Args &&...args) {
  if (codes)
    run<Codes<kFamily, kKind, false>, true>(w, args...);
  else if (w.zero_points)
    run<Codes<kFamily, kKind, true>, false>(w, args...);
  else
    run<Codes<kFamily, kKind, false>, false>(w, args...);
}

template <Family kFamily, class... Args> void run_family(const Weight &w, bool codes, Args... args) {
  switch (w.kind) {
  case kCode2: return run_codes<kFamily, kCode2>(w, codes, args...);
  case kCode4: return run_codes<kFamily, kCode4>(w, codes, args...);
  case kCode8: return run_codes<kFamily, kCode8>(w, codes, args...);
  case kCode3: // only whole panels have three-bit codes
    if constexpr (kFamily == kDense) run_codes<kDense, kCode3>(w, codes, args...);
    return;
  default: break;
  }
  if constexpr (kFamily != kBytes) {
    if (w.kind == kFloat32) return run<Floats<kFamily, kFloat32>, false>(w, args...);
    if (w.kind == kFloat16) return run<Floats<kFamily, kFloat16>, false>(w, args...);
    return run<Floats<kFamily, kBfloat16>, false>(w, args...);
  }
}

void multiply(const Weight &w, const Activations &x, int64_t row, int rows, int64_t p, int count,
              float *tile, const Scratch &scratch) {
  const int64_t segments = int64_t(w.segment_count);
  Rows part{x.data + row * x.stride, x.stride, x.sums ? x.sums + row * segments : nullptr, segments,
            x.scales ? x.scales + row * w.a8_scales : nullptr, w.a8_scales};
  if (w.family == kLanes) return run_family<kLanes>(w, x.codes, part, rows, p, count, tile, scratch);
  if (w.family == kBytes) return run_family<kBytes>(w, x.codes, part, rows, p, count, tile, scratch);
  run_family<kDense>(w, x.codes, part, rows, p, count, tile, scratch);
}

// max |x|, as the bits of a float: above 0x7f800000 if any is not a number.
static uint32_t reach(const float *x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most;
}

// Codes of x / scale to nearest even; returns their sum. A loop that compilers vectorise.
static int32_t round_codes(const float *x, int count, float scale, int8_t *to) {
  int32_t sum = 0;
  for (int i = 0; i < count; ++i) {
    float code = __builtin_nearbyintf(x[i] / scale);
    code = code > 127.0f ? 127.0f : code;
    code = code < -127.0f ? -127.0f : code;
    const int32_t whole = static_cast<int32_t>(code);
    to[i] = static_cast<int8_t>(whole);
    sum += whole;
  }
  return sum;
}

// scale = max |x| / 127 and code = x / scale; zeros and a scale of NaN if any x is not finite.
void quantize(const Weight &w, const float *x, int8_t *codes, float *scales, int32_t *sums) {
  for (int s = 0; s < w.segment_count;) {
    int end = s;
    while (end < w.segment_count && w.segments[end].scale == w.segments[s].scale) ++end;
    const Segment &last = w.segments[end - 1];
    const int64_t first = w.segments[s].first;
    uint32_t bits = reach(x + first, last.first + last.columns - first);
    float most;
    __builtin_memcpy(&most, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const float scale = most == 0 ? 1.0f : most / 127;
    scales[w.segments[s].scale] = finite ? scale : __builtin_nanf("");
    for (; s < end; ++s) {
      const Segment &segment = w.segments[s];
      int8_t *to = codes + segment.start;
      if (finite) {
        sums[s] = round_codes(x + segment.first, segment.columns, scale, to);
      } else {
        __builtin_memset(to, 0, segment.columns);
        sums[s] = 0;
      }
    }
  }
}

} // namespace SFX_ISA
} // namespace sfx

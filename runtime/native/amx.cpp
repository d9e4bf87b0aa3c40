// AMX: 16×16 tiles of int8 or bfloat16 products, for products of many rows; the rest is AVX-512's.
//
// Weights are decoded into signed bytes, zero points subtracted, so that no sums need correcting.
// Float activations are cut into three bfloat16 slices whose sum they are, bit for bit (below 1e-33
// the lower slices are subnormal and count as 0); codes are exact in bfloat16, so the products are
// exact and only their sums round, as in float32.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "weight.h"

static bool allowed() { // as runs_here: for every processor, hence above the pragmas
  constexpr int kRequest = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return !syscall(SYS_arch_prctl, kRequest, kTileData);
}
static bool runs_here() {
  return sfx::kAvx512.runs_here() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") && allowed();
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2,f16c,fma,avx2,bmi2,popcnt," \
    "amx-tile,amx-int8,amx-bf16"))), apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2,f16c,fma,avx2,bmi2,popcnt", \
    "amx-tile,amx-int8,amx-bf16")
#endif
#define SFX_ISA amx
#include "vec_avx512.h"
#include "activate.h"
#include "norm.h"

#include "amx_units.h"

namespace sfx {
namespace amx {

constexpr int kManyRows = 12; // from here tiles are faster than vectors
constexpr int kPair = 2 * kTileRows; // rows that a block takes
const float kOne = 1; // the scale of activations that have none

// Registers 0…3 hold 2×2 tiles of sums, 4 and 5 rows of x, 6 and 7 panels of W.
struct alignas(64) Config {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Codes of the next stretch, fetched a few lines at a time while tiles are multiplied.
struct Ahead {
  const uint8_t *at, *end;
  int lines; // per tile
  void fetch() {
    for (int i = 0; i < lines && at < end; ++i, at += kUnit) V::prefetch(at);
  }
};

template <bool kInt, int kRowTiles, int kPanels>
void tiles(const char *x, int64_t next_rows, const uint8_t *units, int64_t panel_bytes, int words,
           Ahead &ahead) {
  for (int k = 0; k < words; ++k, x += kTileBytes, units += kTileBytes) {
    ahead.fetch();
    _tile_loadd(4, x, 64);
    if (kRowTiles == 2) _tile_loadd(5, x + next_rows, 64);
    _tile_loadd(6, units, 64);
    if (kPanels == 2) _tile_loadd(7, units + panel_bytes, 64);
    if constexpr (kInt) {
      _tile_dpbssd(0, 4, 6);
      if (kPanels == 2) _tile_dpbssd(1, 4, 7);
      if (kRowTiles == 2) _tile_dpbssd(2, 5, 6);
      if (kRowTiles == 2 && kPanels == 2) _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      if (kPanels == 2) _tile_dpbf16ps(1, 4, 7);
      if (kRowTiles == 2) _tile_dpbf16ps(2, 5, 6);
      if (kRowTiles == 2 && kPanels == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// A segment of a stretch: its tiles, where its units lie and its tiles of x.
struct Part {
  int words, units, x, x_scale;
};

// Up to 32 rows times up to 2 panels times a stretch.
struct Block {
  const Activations &x;
  const Part *parts;
  int count;
  const char *from;     // the stretch in the first tile of x
  int64_t next_rows;    // bytes from a tile to the one of the next 16 rows
  const uint8_t *units; // of the first panel
  int64_t panel_bytes;
  const F *scales;      // count for each panel
  const float *x_scales;
  int64_t x_scales_stride;
  float *tile;
  int64_t tile_stride;
  int tiles; // along the stretch, of all slices
};

// tile += sums · scales
template <bool kInt>
void add_tile(const uint8_t *sums, F scale, const float *x_scales, int64_t x_scales_stride,
              int rows, float *tile, int64_t tile_stride) {
  for (int r = 0; r < rows; ++r, sums += 64, tile += tile_stride) {
    if constexpr (kInt) {
      const F both = V::mulf(scale, V::setf(x_scales[r * x_scales_stride]));
      V::storef(tile, V::fma(V::to_float(V::load(sums)), both, V::loadf(tile)));
    } else {
      const F sum = V::loadf(reinterpret_cast<const float *>(sums));
      V::storef(tile, V::fma(sum, scale, V::loadf(tile)));
    }
  }
}

template <bool kInt, int kRowTiles, int kPanels>
void block(const Block &b, int rows, Ahead ahead) {
  alignas(64) uint8_t sums[4][kTileBytes];
  for (int i = 0; i < b.count; ++i) {
    const Part &part = b.parts[i];
    _tile_zero(0);
    if (kPanels == 2) _tile_zero(1);
    if (kRowTiles == 2) _tile_zero(2);
    if (kRowTiles == 2 && kPanels == 2) _tile_zero(3);
    for (int slice = 0; slice < (kInt ? 1 : b.x.slices); ++slice)
      tiles<kInt, kRowTiles, kPanels>(b.from + part.x + slice * b.x.stride, b.next_rows,
                                      b.units + part.units, b.panel_bytes, part.words, ahead);
    _tile_stored(0, sums[0], 64);
    if (kPanels == 2) _tile_stored(1, sums[1], 64);
    if (kRowTiles == 2) _tile_stored(2, sums[2], 64);
    if (kRowTiles == 2 && kPanels == 2) _tile_stored(3, sums[3], 64);
    for (int h = 0; h < kRowTiles; ++h)
      for (int q = 0; q < kPanels; ++q)
        add_tile<kInt>(sums[2 * h + q], b.scales[q * kStretch + i],
                       b.x_scales + 16 * h * b.x_scales_stride + part.x_scale, b.x_scales_stride,
                       rows - 16 * h < 16 ? rows - 16 * h : 16,
                       b.tile + 16 * h * b.tile_stride + kRows * q, b.tile_stride);
  }
}

// `turn` of `turns` blocks of rows: each fetches its share of what every panel needs next.
template <bool kInt>
void panels_of_rows(Block b, int panels, int rows, const Cursor *cursors, int turn, int turns) {
  for (int q = 0; q < panels; q += 2) {
    const Cursor &next = cursors[q + (turn % 2 && q + 1 < panels)];
    const int64_t share = 2 * next.last / turns + kUnit;
    const uint8_t *from = next.codes + turn / 2 * share;
    const Ahead ahead{from, from + share, static_cast<int>(share / kUnit / b.tiles) + 1};
    if (rows > 16)
      panels - q > 1 ? block<kInt, 2, 2>(b, rows, ahead) : block<kInt, 2, 1>(b, rows, ahead);
    else
      panels - q > 1 ? block<kInt, 1, 2>(b, rows, ahead) : block<kInt, 1, 1>(b, rows, ahead);
    b.units += 2 * b.panel_bytes;
    b.scales += 2 * kStretch;
    b.tile += 2 * kRows;
  }
}

// Segments [first, first + count) of one panel; fills in `parts` and the panel's scales.
template <class Reader>
void decode_stretch(const Weight &w, Cursor &cursor, Scaling &scaling, int first, int count,
                    bool codes, Part *parts, F *scales, uint8_t *units, uint8_t *room) {
  Reader reader(w, scaling.panel);
  if (first) cursor.restore(reader);
  int at = 0;
  for (int i = 0; i < count; ++i) {
    const Segment &segment = w.segments[first + i];
    scaling.begin(first + i);
    reader.begin(scaling.zero);
    scales[i] = scaling.scale;
    int words = decode_segment(w, reader, scaling, first + i, codes, units + at, room);
    words *= codes ? 1 : 2;
    const int x = (segment.word - w.segments[first].word) * kTileBytes * (codes ? 1 : 2);
    parts[i] = {words, at, x, codes ? segment.scale : 0};
    at += words * kTileBytes;
  }
  cursor.save(reader);
}

// How many segments from `first` on make a stretch.
int stretch(const Weight &w, int first) {
  int count = 1, columns = w.segments[first].columns;
  while (count < kStretch && first + count < w.segment_count) {
    columns += w.segments[first + count].columns;
    if (columns > kMaxSegment) break;
    ++count;
  }
  return count;
}

template <class Reader>
void run(const Weight &w, const Activations &x, int64_t row, int rows, int64_t p, int panels,
         float *tile, const Scratch &scratch) {
  const bool codes = x.codes;
  const int64_t next_rows = w.words * kTileBytes * (codes ? 1 : 2);
  const int64_t panel_bytes = codes ? kBytes8 : kBytes16;
  Cursor cursors[kMostPanels];
  Scaling scaling[kMostPanels];
  F scales[kMostPanels * kStretch];
  Part parts[kStretch];
  for (int q = 0; q < panels; ++q) scaling[q].start(w, p + q);
  for (int s = 0, count; s < w.segment_count; s += count) {
    count = stretch(w, s);
    for (int q = 0; q < panels; ++q)
      decode_stretch<Reader>(w, cursors[q], scaling[q], s, count, codes, parts,
                             scales + q * kStretch, scratch.units + q * panel_bytes,
                             scratch.units + kMostPanels * kBytes16);
    const char *from = x.data + w.segments[s].word * kTileBytes * (codes ? 1 : 2);
    const float *x_scales = codes ? x.scales + row * w.a8_scales : &kOne;
    const int64_t x_scales_stride = codes ? w.a8_scales : 0;
    int tiles_along = 0;
    for (int i = 0; i < count; ++i) tiles_along += parts[i].words * x.slices;
    for (int r = 0; r < rows; r += kPair) {
      const char *rows_from = from + (row + r) / kTileRows * next_rows;
      const Block b{x, parts, count, rows_from, next_rows, scratch.units, panel_bytes, scales,
                    x_scales + r * x_scales_stride, x_scales_stride,
                    tile + r * panels * kRows, panels * kRows, tiles_along};
      const int left = rows - r < kPair ? rows - r : kPair;
      const int turn = r / kPair, turns = (rows + kPair - 1) / kPair;
      codes ? panels_of_rows<true>(b, panels, left, cursors, turn, turns)
            : panels_of_rows<false>(b, panels, left, cursors, turn, turns);
    }
  }
}

template <Family kFamily, class... Args> void run_tiles(const Weight &w, Args... args) {
  if (w.kind == kCode2) return run<Codes<kFamily, kCode2, false>>(w, args...);
  if (w.kind == kCode4) return run<Codes<kFamily, kCode4, false>>(w, args...);
  if (w.kind == kCode8) return run<Codes<kFamily, kCode8, false>>(w, args...);
  if constexpr (kFamily != kBytes)
    if (w.kind == kBfloat16) return run<Floats<kFamily, kBfloat16>>(w, args...);
  if constexpr (kFamily == kDense) run<Codes<kDense, kCode3, false>>(w, args...);
}

// Codes whose distance from their zero point fits a signed byte, and those bfloat16 values that tiles
// neither take for 0 (subnormal ones) nor make NaN of (infinity times a slice that is 0).
bool fits(const Weight &w) {
  if (is_float(w.kind)) return w.kind == kBfloat16 && w.family != kColumns && w.plain;
  return w.bits < 8 || (!w.zero_points && w.zero == 128);
}

int slices(const Weight &w, int64_t m, int x_type, bool codes) {
  constexpr int kManyOutputs = 128; // from here cutting x into slices pays
  if (m < kManyRows || !fits(w)) return 0;
  if (is_float(w.kind) && x_type != SFX_BF16 && w.n < kManyOutputs) return 0;
  return codes || x_type == SFX_BF16 ? 1 : x_type == SFX_F16 ? 2 : 3;
}

// x = the sum of its slices: 8 bits of the significand each, cut off, not rounded.
void split(const float *x, int columns, int64_t tiles, char *to, const Activations &out) {
  for (int64_t i = 0; i < 2 * tiles; ++i) { // 16 columns at a time
    const int64_t left = columns - 16 * i;
    const __mmask16 some =
        left >= 16 ? __mmask16(0xffff) : left > 0 ? __mmask16((1 << left) - 1) : __mmask16(0);
    F rest = _mm512_maskz_loadu_ps(some, x + 16 * i);
    for (int slice = 0; slice < out.slices; ++slice) {
      const I bits = _mm512_castps_si512(rest);
      __m256i *at = reinterpret_cast<__m256i *>(to + slice * out.stride + i / 2 * kTileBytes);
      _mm256_storeu_si256(at + i % 2, _mm512_cvtepi32_epi16(V::shift_right(bits, 16)));
      const I head = V::bits_and(bits, V::set(static_cast<int32_t>(0xffff0000)));
      // What is not finite has no further slices: inf - inf would make a NaN of an infinity.
      const __mmask16 finite = static_cast<__mmask16>(~_mm512_fpclass_ps_mask(rest, 0x99));
      rest = _mm512_maskz_sub_ps(finite, rest, _mm512_castsi512_ps(head));
    }
  }
}

void tile(const Weight &w, const void *from, int64_t row, const Activations &to) {
  const int wide = to.codes ? 1 : 2;
  char *out = const_cast<char *>(to.data) + row / kTileRows * w.words * kTileBytes * wide +
              row % kTileRows * 64;
  for (int32_t s = 0; s < w.segment_count; ++s) {
    const Segment &segment = w.segments[s];
    const int64_t words = (segment.columns + 63) / 64;
    char *at = out + segment.word * kTileBytes * wide;
    if (!to.codes) {
      split(static_cast<const float *>(from) + segment.first, segment.columns, 2 * words, at, to);
      continue;
    }
    const int8_t *codes = static_cast<const int8_t *>(from) + segment.start;
    for (int64_t i = 0; i < words; ++i) {
      const int64_t left = segment.columns - 64 * i;
      const __mmask64 some = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
      V::store(at + i * kTileBytes, _mm512_maskz_loadu_epi8(some, codes + 64 * i));
    }
  }
}

void multiply_tiles(const Weight &w, const Activations &x, int64_t row, int rows, int64_t p,
                    int count, float *tile, const Scratch &scratch) {
  static const Config config;
  _tile_loadconfig(&config);
  if (w.family == kLanes)
    run_tiles<kLanes>(w, x, row, rows, p, count, tile, scratch);
  else if (w.family == kBytes)
    run_tiles<kBytes>(w, x, row, rows, p, count, tile, scratch);
  else
    run_tiles<kDense>(w, x, row, rows, p, count, tile, scratch);
  _tile_release();
}

void any_rows(const Weight &w, const Activations &x, int64_t row, int rows, int64_t p, int count,
              float *tile, const Scratch &scratch) {
  (x.slices ? multiply_tiles : kAvx512.multiply)(w, x, row, rows, p, count, tile, scratch);
}

void quantize(const Weight &w, const float *x, int8_t *codes, float *scales, int32_t *sums) {
  kAvx512.quantize(w, x, codes, scales, sums);
}

} // namespace amx

const Isa kAmx = {"amx",         runs_here,     amx::slices,  amx::tile,
                  amx::quantize, amx::any_rows, amx::activate,
                  amx::norm, amx::rotate};
} // namespace sfx
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

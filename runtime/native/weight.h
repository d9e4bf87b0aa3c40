// A packed weight in memory, and the activations and instruction sets that meet it.
//
// W (n, k) is cut into panels of 16 rows and every panel into segments along K that share one
// scale per row. What a multiply instruction takes is a unit: 16 lanes of 4 bytes, lane r for row
// r of the panel, holding 4 columns of 8-bit codes or one float column. x is broadcast, 4 bytes
// at a time, so no sum is ever taken across lanes. A step is what one load of codes decodes into.
//
// A panel is stored in one piece, in reading order:
//   scales   segments × 16 fp16          (codes only)
//   zeros    segments × 16 uint8         (where zero points differ)
//   counts   segments × uint32 steps     (kColumns)
//   masks    see Family
//   codes    steps
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparsefx.h"

namespace sfx {

constexpr int kRows = 16;        // rows of a panel
constexpr int kUnit = 64;        // bytes of a unit
constexpr int kMaxSegment = 512; // columns: decoded units stay in cache, sums in int32
constexpr int kMostPanels = 8;    // that a tile of results is wide: what reading x is shared by

enum Family {
  kDense,   // every position; no masks
  kLanes,   // per step one 16-bit mask: rows that keep the step's columns; kept lanes only
  kBytes,   // per unit one 64-bit mask; units of a step share bytes, each compacted on its own
  kColumns, // per segment a bitmask of columns that the whole panel keeps; then as kDense
};
enum Kind { kCode2, kCode3, kCode4, kCode8, kFloat32, kFloat16, kBfloat16 };

constexpr bool is_float(Kind kind) { return kind >= kFloat32; }
// Columns that a step covers.
constexpr int step_columns(Kind kind) {
  return kind == kCode2 ? 16 : kind == kCode3 ? 32 : kind == kCode4 ? 8 : kind == kCode8 ? 4 : 1;
}
// Bytes of a step of kDense and kColumns.
constexpr int step_bytes(Kind kind) {
  return kind == kCode3 ? 192 : kind == kFloat16 || kind == kBfloat16 ? 32 : 64;
}

struct Segment {
  int64_t first;   // its first column in W
  int32_t columns;
  int32_t steps;   // ceil(columns / step); kColumns: ceil(columns / 64) words of mask
  int64_t start;   // where its columns begin in a padded row of activations
  int32_t scale;   // which activation scale it has
  int32_t word;    // where its columns begin in tiles of activations, counting 64 columns
};

struct Weight {
  int64_t n, k, panels, padded; // padded: columns of a padded row of activations
  int64_t words; // of tiled activations: 64 columns each, segments begin at a whole one
  Family family;
  Kind kind;
  int32_t bits; // of codes
  int32_t zero;
  bool zero_points;
  bool plain;   // of bfloat16: no value is subnormal, infinite or NaN
  int64_t a8_scales;             // activation scales per row
  int32_t segment_count;
  const Segment *segments;
  const int64_t *panel;          // panels + 1 offsets into data
  int64_t zeros_at, counts_at, masks_at, codes_at; // within a panel
  uint8_t *data;                 // 64-byte aligned, 64 readable bytes beyond the end

  const uint8_t *at(int64_t p) const { return data + panel[p]; }
};

// m rows of activations in the order of a Weight's segments, zero where padded: int8 codes with
// their scales and sums, or floats. As rows, or in tiles for a matrix unit: 16 rows × 64 bytes side
// by side, tiles along K, then along m. Tiled floats are slices of bfloat16 that sum to the float.
struct Activations {
  bool codes;
  int slices;           // 0: rows (int8 or float32); else tiles, one set per slice
  const char *data;
  int64_t stride;       // bytes from row to row, or from slice to slice
  const int32_t *sums;  // of codes: (m, segments)
  const float *scales;  // of codes: (m, a8_scales)
};

constexpr int kTileRows = 16;
constexpr int kTileBytes = 1024;
constexpr int64_t kUnitsBytes = 512 << 10;

constexpr int kCompactRows = 8; // whose kept activations, of all segments, lie side by side at once

// Where the results of a tile go: lines that are fetched while sums are taken, or writing many rows
// waits for them.
struct Target {
  char *y = nullptr; // null: nothing is fetched
  int64_t stride = 0; // bytes from row to row
  int64_t size = 0;   // bytes of a number

  // Of the tile's panels from q on.
  Target from(int q) const { return {y ? y + q * kRows * size : nullptr, stride, size}; }
};

// Buffers of one thread; linear.cpp says how large they are.
struct Scratch {
  uint8_t *units;   // kUnitsBytes of decoded weights
  char *compact;    // activations of the columns that a panel keeps
  int32_t *sums;    // and their sums
  Target target;

  Scratch from(int q) const { return {units, compact, sums, target.from(q)}; }
};

// A row of sfx_norm_call, all as float32; `sum` may be x or y, and is not null where `residual` is
// not.
struct NormRow {
  const float *x, *residual;
  float *sum, *y;
  const float *weight, *bias;
  int64_t k;
  float eps;
  bool centred;
};

struct Isa {
  const char *name;
  bool (*runs_here)();
  // How many slices of tiles a product of m rows wants; 0: rows.
  int (*slices)(const Weight &, int64_t m, int x_type, bool codes);
  // Puts row `row`, padded int8 codes or k float32, into its tiles; null if slices is always 0.
  void (*tile)(const Weight &, const void *from, int64_t row, const Activations &to);
  // Codes and scales of one row x (k float32) of a padded row; sums per segment.
  void (*quantize)(const Weight &, const float *x, int8_t *codes, float *scales, int32_t *sums);
  // tile (rows, count · 16) += rows [row, row + rows) of x times panels [p, p + count)ᵀ;
  // count ≤ kMostPanels.
  void (*multiply)(const Weight &, const Activations &, int64_t row, int rows, int64_t p, int count,
                   float *tile, const Scratch &);
  // What an SFX_RELU, … makes of `count` values, in place.
  void (*activate)(float *values, int64_t count, int activation);
  void (*norm)(const NormRow &);
  // y = x ⊙ cos + (-x₁, x₀) ⊙ sin, each of 2 · half numbers.
  void (*rotate)(const float *x, const float *cos, const float *sin, float *y, int64_t half);
};

inline int no_slices(const Weight &, int64_t, int, bool) { return 0; }

// Clang assembles AVX-VNNI itself; GCC leaves it to binutils, which must be 2.36 or later.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SFX_AVXVNNI
#endif

extern const Isa kAmx, kAvx512, kAvxVnni, kAvx2, kNeon, kPortable;

} // namespace sfx

struct sfx_weight : sfx::Weight {};

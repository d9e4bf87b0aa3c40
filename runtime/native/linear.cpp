// sfx_linear: activations are brought into the order of the weight, then panels are shared out to
// threads; each tile of results gets its branch and epilogue while it is in cache. Parts that read
// the same x in the same order share its activations.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>
#include <vector>

#include "floats.h"
#include "isa.h"
#include "threads.h"

namespace sfx {
namespace {

constexpr int64_t kMostRows = 256; // of a tile of results: what decoding a panel is shared by

// Memory that a thread keeps from call to call, so that none is allocated in the steady state.
class Arena {
public:
  ~Arena() { std::free(data_); }
  char *get(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + bytes / 4 + 4096) / kUnit * kUnit;
      data_ = static_cast<char *>(std::aligned_alloc(kUnit, size_));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

private:
  char *data_ = nullptr;
  int64_t size_ = 0;
};

int64_t round_up(int64_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }

// Hands out aligned pieces of one allocation; the first pass, on null, only counts.
struct Pieces {
  char *base = nullptr;
  int64_t used = 0;
  template <class T> T *take(int64_t count) {
    T *out = base ? reinterpret_cast<T *>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)) + 256);
    return out;
  }
};
template <class Take> void lay_out(Arena &arena, Take &&take) {
  Pieces counting;
  take(counting);
  Pieces real;
  real.base = arena.get(counting.used);
  take(real);
}

struct Input { // as sfx_call has it, or the low-rank product
  const void *x;
  int64_t m, stride;
  int type;
};

// Rooms of one worker of `prepare`: a row of x as float32 and as codes.
struct Room {
  float *wide;
  int8_t *codes;
};

// One row of x in the order of w, as `to` wants it.
void prepare_row(const Isa &isa, const Weight &w, const Input &in, const Activations &to,
                 int64_t row, const Room &room) {
  const float *x = static_cast<const float *>(in.x) + row * in.stride;
  if (in.type != SFX_F32) {
    read(room.wide, in.x, row * in.stride, w.k, in.type);
    x = room.wide;
  }
  char *out = const_cast<char *>(to.data) + (to.slices ? 0 : row * to.stride);
  if (to.codes) {
    int8_t *codes = to.slices ? room.codes : reinterpret_cast<int8_t *>(out);
    std::memset(codes, 0, w.padded);
    isa.quantize(w, x, codes, const_cast<float *>(to.scales) + row * w.a8_scales,
                 const_cast<int32_t *>(to.sums) + row * w.segment_count);
    if (to.slices) isa.tile(w, codes, row, to);
    return;
  }
  if (to.slices) return isa.tile(w, x, row, to);
  for (int32_t s = 0; s < w.segment_count; ++s) {
    const Segment &segment = w.segments[s];
    const int64_t end = s + 1 < w.segment_count ? w.segments[s + 1].start : w.padded;
    float *at = reinterpret_cast<float *>(out) + segment.start;
    std::memcpy(at, x + segment.first, segment.columns * 4);
    std::memset(at + segment.columns, 0, (end - segment.start - segment.columns) * 4);
  }
}

Activations prepare(const Isa &isa, const Weight &w, const Input &in, bool a8, const sfx_call &call,
                    Arena &arena) {
  constexpr int64_t kDirectRows = 8; // up to here rows of x are read where they are
  Activations out{};
  out.codes = a8;
  out.slices = isa.slices(w, in.m, in.type, a8);
  const bool as_it_is = in.type == SFX_F32 && w.padded == w.k && in.m <= kDirectRows;
  if (!a8 && !out.slices && as_it_is) {
    out.data = static_cast<const char *>(in.x);
    out.stride = in.stride * 4;
    return out;
  }
  const int64_t tiles = (in.m + 2 * kTileRows - 1) / (2 * kTileRows) * 2 * w.words;
  // Rows an odd number of cache lines apart do not fight for the same sets of the cache.
  out.stride = out.slices ? tiles * kTileBytes * (a8 ? 1 : 2)
                          : round_up(w.padded * (a8 ? 1 : 4)) | kUnit;
  const int64_t workers = std::min<int64_t>(in.m, std::max(call.threads, 1));
  Room rooms{};
  lay_out(arena, [&](Pieces &p) {
    out.data = p.take<char>((out.slices ? out.slices : in.m) * out.stride);
    out.scales = p.take<float>(a8 ? in.m * w.a8_scales : 0);
    out.sums = p.take<int32_t>(a8 ? in.m * w.segment_count : 0);
    rooms.wide = p.take<float>(workers * (w.k + kUnit));
    rooms.codes = p.take<int8_t>(workers * (w.padded + kUnit));
  });
  parallel(call, workers, [&](int64_t t) {
    const Room room{rooms.wide + t * (w.k + kUnit), rooms.codes + t * (w.padded + kUnit)};
    for (int64_t row = in.m * t / workers; row < in.m * (t + 1) / workers; ++row)
      prepare_row(isa, w, in, out, row, room);
  });
  return out;
}

Scratch scratch_for(const Weight &w, int rows, Arena &arena) {
  Scratch out{};
  const int64_t wide = std::max<int64_t>(w.padded, kMaxSegment) + 128;
  // A segment of all rows, or all segments of a few.
  const int64_t compact =
      std::max(rows * int64_t(kMaxSegment + 256), std::min(rows, kCompactRows) * wide) * 4;
  lay_out(arena, [&](Pieces &p) {
    out.units = p.take<uint8_t>(kUnitsBytes);
    out.compact = p.take<char>(w.family == kColumns ? compact : 0);
    out.sums = p.take<int32_t>(rows * static_cast<int64_t>(w.segment_count));
  });
  return out;
}

// What is added up in one tile: the weight's product and the branch's.
struct Product {
  const Weight *w;
  Activations x;
};

// A weight of a call, what is added to its product, and where that goes.
struct Part {
  Product products[2];
  int count;
  const void *bias;
  void *y;
  int64_t y_stride;

  const Weight &w() const { return *products[0].w; }
};

// Memory that a calling thread keeps from call to call.
struct Rooms {
  std::deque<Arena> orders, low, padded; // deques: what points into them stays
  std::vector<Product> made;
  std::vector<Part> parts;
};
Arena &room(std::deque<Arena> &rooms, size_t i) {
  while (rooms.size() <= i) rooms.emplace_back();
  return rooms[i];
}

// Whether both read one x in the same order.
bool alike(const Weight &a, const Weight &b) {
  return a.padded == b.padded && a.words == b.words && a.a8_scales == b.a8_scales &&
         a.segment_count == b.segment_count &&
         !std::memcmp(a.segments, b.segments, a.segment_count * sizeof(Segment));
}

// x in the order of w: made at the first weight that asks for it.
Activations ordered(const Isa &isa, const Weight &w, bool a8, const sfx_call &call, Rooms &rooms) {
  const Input in{call.x, call.m, call.x_stride, call.x_type};
  const int slices = isa.slices(w, in.m, in.type, a8);
  for (const Product &made : rooms.made)
    if (made.x.codes == a8 && made.x.slices == slices && alike(*made.w, w)) return made.x;
  Arena &arena = room(rooms.orders, rooms.made.size());
  rooms.made.push_back({&w, prepare(isa, w, in, a8, call, arena)});
  return rooms.made.back().x;
}

// Rows and columns of a tile of results, its rows `stride` floats apart.
struct Block {
  int64_t row;
  int rows;
  int64_t column, columns, stride;
};

// The bias, which products are added to.
void begin(const sfx_call &call, const Part &part, float *tile, const Block &b) {
  float bias[kMostPanels * kRows] = {};
  if (part.bias) read(bias, part.bias, b.column, b.columns, call.x_type);
  for (int r = 0; r < b.rows; ++r) std::memcpy(tile + r * b.stride, bias, b.stride * 4);
}

// Activation, gate, multiply, residual; then to the output's type. A second part is the gate's
// other factor.
void finish(const Isa &isa, const sfx_call &call, const Part *parts, int count, float *const *tiles,
            const Block &b) {
  float other[kMostPanels * kRows];
  const int64_t n = parts[0].w().n;
  for (int r = 0; r < b.rows; ++r) {
    float *v = tiles[0] + r * b.stride;
    isa.activate(v, b.columns, call.activation);
    if (count == 2)
      for (int64_t j = 0; j < b.columns; ++j) v[j] *= tiles[1][r * b.stride + j];
    if (call.multiply) {
      read(other, call.multiply, (b.row + r) * n + b.column, b.columns, call.x_type);
      for (int64_t j = 0; j < b.columns; ++j) v[j] *= other[j];
    }
    if (call.residual) {
      read(other, call.residual, (b.row + r) * n + b.column, b.columns, call.x_type);
      for (int64_t j = 0; j < b.columns; ++j) v[j] += other[j];
    }
    write(parts[0].y, (b.row + r) * parts[0].y_stride + b.column, v, b.columns, call.x_type);
  }
}

Target target_of(const Part &part, int64_t row, int64_t column, int64_t size) {
  char *y = static_cast<char *>(part.y);
  return {y + (row * part.y_stride + column) * size, part.y_stride * size, size};
}

// Panels [p, p + panels) of a part, or of a part and its gate.
void some_panels(const Isa &isa, const sfx_call &call, const Part *parts, int count, int64_t p,
                 int panels) {
  thread_local Arena tile_arena, scratch_arena;
  const int64_t stride = panels * kRows;
  const int64_t column = p * kRows, columns = std::min(stride, parts[0].w().n - column);
  const int most = static_cast<int>(std::min(call.m, kMostRows));
  float *tile = reinterpret_cast<float *>(tile_arena.get(count * most * stride * 4 + kUnit));
  float *const tiles[2] = {tile, tile + (count - 1) * most * stride};
  for (int64_t row = 0; row < call.m; row += kMostRows) {
    const int rows = static_cast<int>(std::min(kMostRows, call.m - row));
    const Block block{row, rows, column, columns, stride};
    for (int i = 0; i < count; ++i) {
      begin(call, parts[i], tiles[i], block);
      for (int j = 0; j < parts[i].count; ++j) {
        const Product &product = parts[i].products[j];
        Scratch scratch = scratch_for(*product.w, rows, scratch_arena);
        if (!i && j + 1 == parts[i].count)
          scratch.target = target_of(parts[i], row, column, size_of(call.x_type));
        isa.multiply(*product.w, product.x, row, rows, p, panels, tiles[i], scratch);
      }
    }
    finish(isa, call, parts, count, tiles, block);
  }
}

// Every thread gets the same number of tiles, as wide as that allows; none crosses parts.
void all_panels(const Isa &isa, const sfx_call &call, const Part *parts, int count, bool gated) {
  const int outputs = gated ? 1 : count;
  int64_t panels = 0;
  for (int i = 0; i < outputs; ++i) panels += parts[i].w().panels;
  if (!panels) return;
  const int64_t threads = std::max(call.threads, 1);
  const int64_t tiles = (panels + kMostPanels * threads - 1) / (kMostPanels * threads) * threads;
  const int64_t tasks = std::min(panels, threads);
  parallel(call, tasks, [&](int64_t t) {
    for (int64_t i = tiles * t / tasks; i < tiles * (t + 1) / tasks; ++i) {
      const int64_t first = panels * i / tiles, last = panels * (i + 1) / tiles;
      int64_t start = 0;
      for (int j = 0; j < outputs; ++j) {
        const int64_t end = start + parts[j].w().panels;
        const int64_t from = std::max(first, start), to = std::min(last, end);
        if (from < to)
          some_panels(isa, call, parts + j, gated ? 2 : 1, from - start,
                      static_cast<int>(to - from));
        start = end;
      }
    }
  });
}

// (x · downᵀ) ⊙ scale as float32 rows.
const float *low_rank(const Isa &isa, const sfx_call &call, const sfx_part &part, size_t i,
                      Rooms &rooms) {
  const Weight &down = *part.down;
  float *low = reinterpret_cast<float *>(room(rooms.low, i).get(call.m * down.n * 4 + kUnit));
  sfx_call inner{};
  inner.m = call.m;
  inner.x_type = SFX_F32;
  inner.threads = call.threads;
  inner.parallel = call.parallel;
  inner.pool = call.pool;
  const Part whole{{{&down, ordered(isa, down, false, call, rooms)}}, 1, nullptr, low, down.n};
  all_panels(isa, inner, &whole, 1, false);
  if (part.branch_scale)
    for (int64_t row = 0; row < call.m; ++row)
      for (int64_t j = 0; j < down.n; ++j) low[row * down.n + j] *= part.branch_scale[j];
  return low;
}

const char *problem(const sfx_part &part, const sfx_call &call) {
  const Weight &w = *part.weight;
  if (call.m && w.k && !call.x) return "x is null";
  if (!part.down != !part.up) return "a branch needs both down and up";
  if (part.down && part.down->k != w.k) return "down has another k than the weight";
  if (part.up && part.up->n != w.n) return "up has another n than the weight";
  if (part.up && part.up->k != part.down->n) return "down and up differ in rank";
  if (call.a8 && is_float(w.kind)) return "int8 activations need a weight of codes";
  return nullptr;
}
const char *problem(const sfx_part *parts, int32_t count, bool gated, const sfx_call &call) {
  if (call.m < 0) return "m must not be negative";
  if (count < 1) return "there must be a part";
  if (call.x_type < SFX_F32 || call.x_type > SFX_BF16) return "unknown type of x";
  if (call.activation < SFX_NONE || call.activation > SFX_GELU_TANH) return "unknown activation";
  if (gated && (count != 2 || parts[0].weight->n != parts[1].weight->n))
    return "a gate needs two parts of one n";
  if (!gated && count > 1 && (call.multiply || call.residual))
    return "multiply and residual need one output";
  for (int32_t i = 0; i < count; ++i) {
    if (parts[i].weight->k != parts[0].weight->k) return "parts differ in k";
    if (call.m && parts[i].weight->n && !parts[i].y && !(gated && i)) return "y is null";
    if (const char *why = problem(parts[i], call)) return why;
  }
  return nullptr;
}

void linear(const Isa &isa, const sfx_part *given, int count, bool gated, const sfx_call &call) {
  thread_local Rooms rooms;
  rooms.made.clear();
  rooms.parts.clear();
  for (int i = 0; i < count; ++i) {
    const sfx_part &from = given[i];
    Part part{{}, 0, from.bias, from.y, from.y_stride};
    part.products[part.count++] = {from.weight, ordered(isa, *from.weight, call.a8, call, rooms)};
    if (from.down) {
      const Input low{low_rank(isa, call, from, i, rooms), call.m, from.down->n, SFX_F32};
      Arena &arena = room(rooms.padded, i);
      part.products[part.count++] = {from.up, prepare(isa, *from.up, low, false, call, arena)};
    }
    rooms.parts.push_back(part);
  }
  all_panels(isa, call, rooms.parts.data(), count, gated);
}

} // namespace
} // namespace sfx

extern "C" int sfx_linear_parts(const sfx_part *parts, int32_t count, int32_t gated,
                                const sfx_call *call, char *error) {
  if (const char *why = sfx::problem(parts, count, gated, *call)) {
    std::snprintf(error, SFX_ERROR, "%s", why);
    return 1;
  }
  if (!call->m) return 0;
  try {
    sfx::linear(sfx::isa(), parts, count, gated, *call);
  } catch (const std::bad_alloc &) {
    std::snprintf(error, SFX_ERROR, "out of memory");
    return 1;
  }
  return 0;
}

extern "C" int sfx_linear(const sfx_weight *w, const sfx_call *call, char *error) {
  const sfx_part whole{w,       call->bias, call->down, call->up, call->branch_scale,
                       call->y, call->y_stride};
  return sfx_linear_parts(&whole, 1, 0, call, error);
}

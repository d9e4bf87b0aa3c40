// sfx_linear: activations are brought into the order of the weight, then panels are shared out to
// threads; each tile of results gets its branch and epilogue while it is in cache.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

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
  const int64_t compact = (rows > 4 ? rows * (kMaxSegment + 256) : 4 * wide) * 4;
  lay_out(arena, [&](Pieces &p) {
    out.units = p.take<uint8_t>(kUnitsBytes);
    out.compact = p.take<char>(w.family == kColumns ? compact : 0);
    out.sums = p.take<int32_t>(rows * static_cast<int64_t>(w.segment_count));
  });
  return out;
}

// Bias, activation, multiply, residual; then to the output's type.
void finish(const sfx_call &call, int64_t n, float *tile, int64_t stride, int64_t row, int rows,
            int64_t column, int64_t columns) {
  float other[kMostPanels * kRows];
  for (int r = 0; r < rows; ++r) {
    float *v = tile + r * stride;
    if (call.bias) {
      read(other, call.bias, column, columns, call.x_type);
      for (int64_t i = 0; i < columns; ++i) v[i] += other[i];
    }
    activate(v, columns, call.activation);
    if (call.multiply) {
      read(other, call.multiply, (row + r) * n + column, columns, call.x_type);
      for (int64_t i = 0; i < columns; ++i) v[i] *= other[i];
    }
    if (call.residual) {
      read(other, call.residual, (row + r) * n + column, columns, call.x_type);
      for (int64_t i = 0; i < columns; ++i) v[i] += other[i];
    }
    write(call.y, (row + r) * call.y_stride + column, v, columns, call.x_type);
  }
}

// What is added up in one tile: the weight's product and the branch's.
struct Product {
  const Weight *w;
  Activations x;
};

void some_panels(const Isa &isa, const sfx_call &call, const Product *products, int count,
                 int64_t p, int panels) {
  thread_local Arena tile_arena, scratch_arena;
  const Weight &w = *products[0].w;
  const int64_t stride = panels * kRows;
  const int64_t column = p * kRows, columns = std::min(stride, w.n - column);
  const int most = static_cast<int>(std::min(call.m, kMostRows));
  float *tile = reinterpret_cast<float *>(tile_arena.get(most * stride * 4 + kUnit));
  for (int64_t row = 0; row < call.m; row += kMostRows) {
    const int rows = static_cast<int>(std::min(kMostRows, call.m - row));
    std::memset(tile, 0, rows * stride * 4);
    for (int i = 0; i < count; ++i) {
      const Scratch scratch = scratch_for(*products[i].w, rows, scratch_arena);
      isa.multiply(*products[i].w, products[i].x, row, rows, p, panels, tile, scratch);
    }
    finish(call, w.n, tile, stride, row, rows, column, columns);
  }
}

// Every thread gets the same number of tiles, as wide as that allows.
void all_panels(const Isa &isa, const sfx_call &call, const Product *products, int count) {
  const int64_t panels = products[0].w->panels, threads = std::max(call.threads, 1);
  const int64_t tiles = (panels + kMostPanels * threads - 1) / (kMostPanels * threads) * threads;
  const int64_t tasks = std::min(panels, threads);
  parallel(call, tasks, [&](int64_t t) {
    for (int64_t i = tiles * t / tasks; i < tiles * (t + 1) / tasks; ++i) {
      const int64_t first = panels * i / tiles, last = panels * (i + 1) / tiles;
      if (first < last)
        some_panels(isa, call, products, count, first, static_cast<int>(last - first));
    }
  });
}

// (x · downᵀ) ⊙ scale as float32 rows.
const float *low_rank(const Isa &isa, const sfx_call &call, Arena &rows, Arena &arena) {
  const Weight &down = *call.down;
  float *low = reinterpret_cast<float *>(rows.get(call.m * down.n * 4 + kUnit));
  sfx_call inner{};
  inner.y = low;
  inner.m = call.m;
  inner.y_stride = down.n;
  inner.x_type = SFX_F32;
  inner.threads = call.threads;
  inner.parallel = call.parallel;
  inner.pool = call.pool;
  const Input in{call.x, call.m, call.x_stride, call.x_type};
  const Product product{&down, prepare(isa, down, in, false, call, arena)};
  all_panels(isa, inner, &product, 1);
  if (call.branch_scale)
    for (int64_t i = 0; i < call.m * down.n; ++i) low[i] *= call.branch_scale[i % down.n];
  return low;
}

const char *problem(const Weight &w, const sfx_call &call) {
  if (call.m < 0) return "m must not be negative";
  if (call.x_type < SFX_F32 || call.x_type > SFX_BF16) return "unknown type of x";
  if (call.activation < SFX_NONE || call.activation > SFX_GELU_TANH) return "unknown activation";
  if (call.m && w.k && !call.x) return "x is null";
  if (call.m && w.n && !call.y) return "y is null";
  if (!call.down != !call.up) return "a branch needs both down and up";
  if (call.down && call.down->k != w.k) return "down has another k than the weight";
  if (call.up && call.up->n != w.n) return "up has another n than the weight";
  if (call.up && call.up->k != call.down->n) return "down and up differ in rank";
  if (call.a8 && is_float(w.kind)) return "int8 activations need a weight of codes";
  return nullptr;
}

void linear(const Isa &isa, const Weight &w, const sfx_call &call) {
  thread_local Arena main, wide, low_rows, low_padded;
  Product products[2];
  int count = 0;
  const Input in{call.x, call.m, call.x_stride, call.x_type};
  products[count++] = {&w, prepare(isa, w, in, call.a8, call, main)};
  if (call.down) {
    const float *low = low_rank(isa, call, low_rows, wide);
    const Input rows{low, call.m, call.down->n, SFX_F32};
    products[count++] = {call.up, prepare(isa, *call.up, rows, false, call, low_padded)};
  }
  all_panels(isa, call, products, count);
}

} // namespace
} // namespace sfx

extern "C" int sfx_linear(const sfx_weight *w, const sfx_call *call, char *error) {
  if (const char *why = sfx::problem(*w, *call)) {
    std::snprintf(error, SFX_ERROR, "%s", why);
    return 1;
  }
  if (!call->m || !w->n) return 0;
  try {
    sfx::linear(sfx::isa(), *w, *call);
  } catch (const std::bad_alloc &) {
    std::snprintf(error, SFX_ERROR, "out of memory");
    return 1;
  }
  return 0;
}

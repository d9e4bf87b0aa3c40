// Packing: a dense weight and its mask become panels (weight.h says how they are laid out).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <sys/mman.h>

#include "weight.h"

namespace sfx {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

using Bytes = std::vector<uint8_t>;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void align(Bytes &out) { out.resize(ceil_div(out.size(), kUnit) * kUnit); }

template <class T> void append(Bytes &out, T value) {
  const uint8_t *from = reinterpret_cast<const uint8_t *>(&value);
  out.insert(out.end(), from, from + sizeof(T));
}

class Packer {
public:
  explicit Packer(const sfx_source &source) : s_(source) {
    groups_ = std::max<int64_t>(ceil_div(s_.k, s_.group_size), 1);
    kind_ = kind();
    family_ = family();
    if (kind_ == kCode3 && family_ != kDense && family_ != kColumns) kind_ = kCode4;
    cut();
  }

  sfx_weight *pack() {
    auto w = std::make_unique<sfx_weight>();
    Bytes all;
    std::vector<int64_t> offsets = {0};
    const int64_t panels = ceil_div(s_.n, kRows);
    for (int64_t p = 0; p < panels; ++p) {
      append_panel(all, p * kRows);
      align(all);
      offsets.push_back(static_cast<int64_t>(all.size()));
    }
    fill(*w, panels, all, offsets);
    return w.release();
  }

private:
  const sfx_source &s_;
  int64_t groups_;
  Kind kind_;
  Family family_;
  std::vector<Segment> segments_;
  int64_t padded_ = 0, words_ = 0;
  int64_t zeros_at_ = 0, counts_at_ = 0, masks_at_ = 0, codes_at_ = 0;

  Kind kind() const {
    if (s_.type == SFX_F32) return kFloat32;
    if (s_.type == SFX_F16) return kFloat16;
    if (s_.type == SFX_BF16) return kBfloat16;
    return s_.bits == 2 ? kCode2 : s_.bits == 3 ? kCode3 : s_.bits == 4 ? kCode4 : kCode8;
  }
  bool stored(int64_t row, int64_t column) const {
    return row < s_.n && column < s_.k && (!s_.mask || s_.mask[row * s_.k + column]);
  }
  uint32_t code(int64_t row, int64_t column) const {
    return static_cast<const uint8_t *>(s_.values)[row * s_.k + column];
  }
  uint8_t zero_point(int64_t row, int64_t group) const {
    if (!s_.zero_points || row >= s_.n) return static_cast<uint8_t>(s_.zero);
    return s_.zero_points[row * groups_ + group];
  }
  int step() const { return step_columns(kind_); }

  // The most regular family that holds the mask without storing what it leaves out.
  Family family() const {
    if (!s_.mask) return kDense;
    const int64_t total = s_.n * s_.k;
    if (std::find(s_.mask, s_.mask + total, 0) == s_.mask + total) return kDense;
    if (rows_agree()) return kColumns;
    if (is_float(kind_)) return kLanes;
    return kind_ != kCode3 && steps_agree(step()) ? kLanes : kBytes;
  }
  bool rows_agree() const {
    for (int64_t row = 0; row < s_.n; ++row)
      if (row % kRows && std::memcmp(s_.mask + row * s_.k, s_.mask + (row - 1) * s_.k, s_.k))
        return false;
    return true;
  }
  bool steps_agree(int columns) const {
    for (int64_t row = 0; row < s_.n; ++row)
      for (int64_t first = 0, end; first < s_.k; first = end) {
        end = segment_end(first);
        for (int64_t c = first; c < end; ++c)
          if ((c - first) % columns && stored(row, c) != stored(row, c - 1)) return false;
      }
    return true;
  }

  // Segments end where a weight's or an activation's scale does, and at kMaxSegment columns.
  int64_t segment_end(int64_t first) const {
    int64_t end = std::min({first + kMaxSegment, next(first, s_.group_size), s_.k});
    return s_.a8_group ? std::min(end, next(first, s_.a8_group)) : end;
  }
  static int64_t next(int64_t column, int64_t multiple) {
    return (column / multiple + 1) * multiple;
  }
  void cut() {
    const int64_t unit = family_ == kColumns ? 64 : step();
    for (int64_t c = 0; c < s_.k;) {
      const int64_t end = segment_end(c);
      const int64_t steps = ceil_div(end - c, unit);
      segments_.push_back({c, static_cast<int32_t>(end - c), static_cast<int32_t>(steps), padded_,
                           static_cast<int32_t>(s_.a8_group ? c / s_.a8_group : 0),
                           static_cast<int32_t>(words_)});
      padded_ += steps * unit;
      words_ += ceil_div(end - c, 64);
      c = end;
    }
  }

  void append_panel(Bytes &out, int64_t row) {
    const size_t start = out.size();
    if (s_.type == SFX_CODE) append_scales(out, row);
    align(out);
    zeros_at_ = static_cast<int64_t>(out.size() - start);
    if (s_.zero_points) append_zero_points(out, row);
    align(out);
    Bytes counts, masks, codes;
    for (const Segment &segment : segments_) append_segment(segment, row, counts, masks, codes);
    counts_at_ = static_cast<int64_t>(out.size() - start);
    out.insert(out.end(), counts.begin(), counts.end());
    align(out);
    masks_at_ = static_cast<int64_t>(out.size() - start);
    out.insert(out.end(), masks.begin(), masks.end());
    align(out);
    codes_at_ = static_cast<int64_t>(out.size() - start);
    out.insert(out.end(), codes.begin(), codes.end());
  }
  void append_scales(Bytes &out, int64_t row) const {
    for (const Segment &segment : segments_)
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = (row + r) * groups_ + segment.first / s_.group_size;
        append<uint16_t>(out, row + r < s_.n ? s_.scales[at] : 0);
      }
  }
  void append_zero_points(Bytes &out, int64_t row) const {
    for (const Segment &segment : segments_)
      for (int r = 0; r < kRows; ++r)
        append<uint8_t>(out, zero_point(row + r, segment.first / s_.group_size));
  }

  void append_segment(const Segment &segment, int64_t row, Bytes &counts, Bytes &masks,
                      Bytes &codes) const {
    std::vector<int64_t> columns; // in stored order; -1 pads
    for (int i = 0; i < segment.columns; ++i)
      if (family_ != kColumns || stored(row, segment.first + i))
        columns.push_back(segment.first + i);
    columns.resize(ceil_div(columns.size(), step()) * step(), -1);
    const int64_t steps = static_cast<int64_t>(columns.size()) / step();
    if (family_ == kColumns) {
      append<uint32_t>(counts, static_cast<uint32_t>(steps));
      for (int i = 0; i < segment.steps; ++i)
        append<uint64_t>(masks, column_mask(segment, row, 64 * i));
    }
    for (int64_t i = 0; i < steps; ++i)
      append_step(columns.data() + i * step(), row, segment.first / s_.group_size, masks, codes);
  }
  uint64_t column_mask(const Segment &segment, int64_t row, int from) const {
    uint64_t mask = 0;
    for (int i = 0; i < 64 && from + i < segment.columns; ++i)
      mask |= uint64_t(stored(row, segment.first + from + i)) << i;
    return mask;
  }

  void append_step(const int64_t *columns, int64_t row, int64_t group, Bytes &masks,
                   Bytes &codes) const {
    if (is_float(kind_)) return append_floats(columns[0], row, masks, codes);
    if (family_ == kBytes) return append_bytes(columns, row, masks, codes);
    uint16_t mask = 0;
    for (int r = 0; r < kRows; ++r)
      if (columns[0] >= 0 && stored(row + r, columns[0])) mask |= uint16_t(1) << r;
    if (family_ == kLanes) append<uint16_t>(masks, mask);
    uint32_t lanes[3][kRows] = {};
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < step(); ++c) {
        const bool real = columns[c] >= 0 && row + r < s_.n;
        place(lanes, r, c, real ? code(row + r, columns[c]) : zero_point(row + r, group));
      }
    const int words = kind_ == kCode3 ? 3 : 1;
    for (int i = 0; i < words; ++i)
      for (int r = 0; r < kRows; ++r)
        if (family_ != kLanes || mask >> r & 1) append<uint32_t>(codes, lanes[i][r]);
  }
  // Column c of a step: byte c % 4 of unit c / 4, whose bits lie above those of the units before.
  void place(uint32_t lanes[3][kRows], int r, int c, uint32_t code) const {
    const int byte = 8 * (c % 4), unit = c / 4;
    if (kind_ == kCode3) {
      lanes[unit / 4][r] |= (code & 3) << (byte + 2 * (unit % 4));
      lanes[2][r] |= (code >> 2) << (byte + unit);
    } else {
      lanes[0][r] |= code << (byte + 32 / step() * unit);
    }
  }
  void append_bytes(const int64_t *columns, int64_t row, Bytes &masks, Bytes &codes) const {
    const int units = step() / 4, bits = 8 / units;
    uint8_t shared[kUnit] = {};
    int longest = 0;
    for (int unit = 0; unit < units; ++unit) {
      uint64_t mask = 0;
      int kept = 0;
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < 4; ++i) {
          const int64_t column = columns[4 * unit + i];
          if (column < 0 || !stored(row + r, column)) continue;
          mask |= uint64_t(1) << (4 * r + i);
          shared[kept++] |= static_cast<uint8_t>(code(row + r, column) << (bits * unit));
        }
      append<uint64_t>(masks, mask);
      longest = std::max(longest, kept);
    }
    codes.insert(codes.end(), shared, shared + longest);
  }
  void append_floats(int64_t column, int64_t row, Bytes &masks, Bytes &codes) const {
    const int size = kind_ == kFloat32 ? 4 : 2;
    const uint8_t *values = static_cast<const uint8_t *>(s_.values);
    uint16_t mask = 0;
    for (int r = 0; r < kRows; ++r) {
      const bool keep = family_ == kLanes ? stored(row + r, column) : true;
      if (!keep) continue;
      mask |= uint16_t(1) << r;
      const uint8_t zeros[4] = {};
      const uint8_t *from =
          row + r < s_.n && column >= 0 ? values + ((row + r) * s_.k + column) * size : zeros;
      codes.insert(codes.end(), from, from + size);
    }
    if (family_ == kLanes) append<uint16_t>(masks, mask);
  }

  void fill(sfx_weight &w, int64_t panels, const Bytes &all, const std::vector<int64_t> &offsets) {
    w.n = s_.n;
    w.k = s_.k;
    w.panels = panels;
    w.padded = padded_;
    w.words = words_;
    w.family = family_;
    w.kind = kind_;
    w.bits = s_.bits;
    w.zero = s_.zero;
    w.zero_points = s_.zero_points != nullptr;
    w.plain = s_.type == SFX_BF16 && plain(static_cast<const uint16_t *>(s_.values), s_.n * s_.k);
    w.a8_scales = std::max<int64_t>(s_.a8_group ? ceil_div(s_.k, s_.a8_group) : 1, 1);
    w.segment_count = static_cast<int32_t>(segments_.size());
    w.segments = copy(segments_.data(), segments_.size());
    w.panel = copy(offsets.data(), offsets.size());
    w.zeros_at = zeros_at_;
    w.counts_at = counts_at_;
    w.masks_at = masks_at_;
    w.codes_at = codes_at_;
    w.data = copy(all.data(), all.size());
  }
  static bool plain(const uint16_t *values, int64_t count) {
    return std::none_of(values, values + count, [](uint16_t v) {
      const int exponent = v >> 7 & 0xff;
      return exponent == 0xff || (exponent == 0 && (v & 0x7f));
    });
  }
  // A copy, aligned for vector loads, that may be read 256 bytes beyond its end.
  template <class T> static T *copy(const T *from, size_t count) {
    size_t bytes = count * sizeof(T) + 256;
    // Streams of weights cross fewer page boundaries, where prefetching stops, on huge pages.
    const size_t page = bytes >= kHugePage ? kHugePage : kUnit;
    void *out = std::aligned_alloc(page, ceil_div(bytes, page) * page);
    if (!out) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (page == kHugePage) madvise(out, ceil_div(bytes, page) * page, MADV_HUGEPAGE);
#endif
    if (count) std::memcpy(out, from, count * sizeof(T));
    std::memset(static_cast<char *>(out) + count * sizeof(T), 0, 256);
    return static_cast<T *>(out);
  }
};

const char *problem(const sfx_source &s) {
  if (s.n < 0 || s.k < 0) return "n and k must not be negative";
  if (s.group_size < 1) return "group_size must be at least 1";
  if (s.a8_group < 0) return "a8_group must not be negative";
  if (s.type < SFX_F32 || s.type > SFX_CODE) return "unknown type";
  if (s.type == SFX_CODE && (s.bits < 2 || s.bits > 8)) return "bits must be 2 to 8";
  if (s.n && s.k && !s.values) return "values is null";
  if (s.n && s.k && s.type == SFX_CODE && !s.scales) return "scales is null";
  return nullptr;
}

} // namespace
} // namespace sfx

extern "C" {

sfx_weight *sfx_pack(const sfx_source *source, char *error) {
  if (const char *why = sfx::problem(*source)) {
    std::snprintf(error, SFX_ERROR, "%s", why);
    return nullptr;
  }
  try {
    return sfx::Packer(*source).pack();
  } catch (const std::bad_alloc &) {
    std::snprintf(error, SFX_ERROR, "out of memory");
    return nullptr;
  }
}

void sfx_free(sfx_weight *w) {
  if (!w) return;
  std::free(const_cast<sfx::Segment *>(w->segments));
  std::free(const_cast<int64_t *>(w->panel));
  std::free(w->data);
  delete w;
}

int64_t sfx_bytes(const sfx_weight *w) { return w->panel[w->panels]; }

const char *sfx_family(const sfx_weight *w) {
  static const char *const names[] = {"dense", "lanes", "bytes", "columns"};
  return names[w->family];
}
}

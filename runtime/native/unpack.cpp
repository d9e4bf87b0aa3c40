#include "unpack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "floats.h"

namespace sfx {
namespace {

constexpr int64_t kMostWeights = int64_t(1) << 34; // what is unpacked takes as many bytes

[[noreturn]] void refuse(const std::string &why) { throw std::invalid_argument(why); }

std::string text(int64_t number) { return std::to_string(number); }

bool within(int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; }

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Numbers of 1 to 8 bits, the first in the lowest bits of the first byte.
struct Stream {
  const uint8_t *data;
  int bits;
  uint8_t operator[](int64_t i) const {
    const int64_t at = i * bits;
    const int shift = static_cast<int>(at & 7);
    uint32_t word = data[at >> 3];
    // The byte behind is not there where the last number ends in this one.
    if (shift + bits > 8) word |= uint32_t(data[(at >> 3) + 1]) << 8;
    return static_cast<uint8_t>(word >> shift & ((1u << bits) - 1));
  }
};

void check_size(const Form &f) {
  if (f.n < 0 || f.k < 0) refuse("n and k must not be negative");
  if (f.n > kMostWeights || f.k > kMostWeights || (f.n && f.k > kMostWeights / f.n))
    refuse("a weight of " + text(f.n) + " times " + text(f.k) + " is too large");
  if (f.a8_group && !within(f.a8_group, 8, 65536)) refuse("a8_group must be 0 or 8 to 65536");
}

void check_layout(const Form &f) {
  const std::vector<int64_t> &l = f.layout;
  const int64_t kind = l.empty() ? -1 : l[0];
  if (!within(kind, 0, 2)) refuse("unknown layout " + text(kind));
  if (l.size() != (kind ? 3 : 1)) refuse("layout has " + text(l.size()) + " numbers");
  if (kind == 1) {
    if (l[1] < 1 || l[1] >= l[2] || l[2] > 256) refuse("layout n:m needs 1 <= n < m <= 256");
    if (f.k % l[2]) refuse("k = " + text(f.k) + " is not a multiple of m = " + text(l[2]));
  }
  if (kind == 2 && !(within(l[1], 1, 4096) && within(l[2], 1, 4096)))
    refuse("sides of tiles must be 1 to 4096");
}

void check_codec(const Form &f) {
  const std::vector<int64_t> &c = f.codec;
  const int64_t kind = c.empty() ? -1 : c[0];
  if (!within(kind, 0, 1)) refuse("unknown codec " + text(kind));
  if (c.size() != (kind ? 4 : 1)) refuse("codec has " + text(c.size()) + " numbers");
  if (!kind) return;
  if (!within(c[1], 2, 8)) refuse("codes have 2 to 8 bits, not " + text(c[1]));
  if (c[2] && !within(c[2], 8, 65536)) refuse("group_size must be 0 or 8 to 65536");
  if (!within(c[3], 0, 1)) refuse("symmetric must be 0 or 1");
}

void demand(const std::string &name, const Stored &stored, int type, int64_t count) {
  static const char *const names[] = {"float32", "float16", "bfloat16", "uint8"};
  if (stored.type != type) refuse(name + " must be " + names[type]);
  if (stored.count != count)
    refuse(name + " has " + text(stored.count) + " elements, not " + text(count));
}
Stream stream(const std::string &name, const Stored &stored, int64_t count, int bits) {
  demand(name, stored, SFX_CODE, ceil_div(count * bits, 8));
  return {static_cast<const uint8_t *>(stored.data), bits};
}

// n of m: as a bit per position, or as n positions per run where that is less.
void fill_runs(const Form &f, const Stored &index, std::vector<uint8_t> &mask) {
  const int64_t keep = f.layout[1], m = f.layout[2], total = f.n * f.k;
  int bits = 0;
  while (int64_t(1) << bits < m) ++bits;
  if (m <= keep * bits) {
    const Stream marks = stream("index", index, total, 1);
    mask.resize(total);
    for (int64_t i = 0; i < total; ++i) mask[i] = marks[i];
    return;
  }
  const int64_t count = total / m * keep;
  const Stream places = stream("index", index, count, bits);
  mask.resize(total);
  for (int64_t i = 0; i < count; ++i) {
    if (places[i] >= m) refuse("index has a position outside its run of " + text(m));
    mask[i / keep * m + places[i]] = 1;
  }
}

void fill_tiles(const Form &f, const Stored &index, std::vector<uint8_t> &mask) {
  const int64_t rows = f.layout[1], columns = f.layout[2], across = ceil_div(f.k, columns);
  const Stream marks = stream("index", index, ceil_div(f.n, rows) * across, 1);
  mask.resize(f.n * f.k);
  for (int64_t row = 0; row < f.n; ++row)
    for (int64_t tile = 0; tile < across; ++tile) {
      const int64_t first = tile * columns, last = std::min(first + columns, f.k);
      std::memset(mask.data() + row * f.k + first, marks[row / rows * across + tile], last - first);
    }
}

// Calls put(where in the weight, i) for the stored values in their order.
template <class Put> void scatter(const std::vector<uint8_t> &mask, int64_t total, Put &&put) {
  for (int64_t at = 0, i = 0; at < total; ++at)
    if (mask.empty() || mask[at]) put(at, i++);
}

void read_codes(const Form &f, const std::vector<Stored> &rest, int64_t count, Unpacked &out) {
  const int64_t total = f.n * f.k;
  const int bits = static_cast<int>(f.codec[1]);
  const int64_t group = f.codec[2] ? f.codec[2] : std::max<int64_t>(f.k, 1);
  const int64_t scales = f.n * ceil_div(f.k, group);
  const Stream codes = stream("values", rest[0], count, bits);
  demand("scales", rest[1], SFX_F16, scales);
  // Two's complement and unsigned codes differ in the highest bit.
  const uint8_t flip = f.symmetric() ? static_cast<uint8_t>(1u << (bits - 1)) : 0;
  out.source.type = SFX_CODE;
  out.source.bits = bits;
  out.source.zero = flip;
  out.source.group_size = group;
  out.source.a8_group = f.a8_group;
  out.source.scales = static_cast<const uint16_t *>(rest[1].data);
  if (!f.symmetric()) {
    const Stream zeros = stream("zero_points", rest[2], scales, bits);
    out.zero_points.resize(scales);
    for (int64_t i = 0; i < scales; ++i) out.zero_points[i] = zeros[i];
    out.source.zero_points = out.zero_points.data();
  }
  out.values.resize(total);
  scatter(out.mask, total, [&](int64_t at, int64_t i) { out.values[at] = codes[i] ^ flip; });
  out.source.values = out.values.data();
}

void read_floats(const Form &f, const Stored &stored, int64_t count, Unpacked &out) {
  if (!within(stored.type, SFX_F32, SFX_BF16))
    refuse("values must be float32, float16 or bfloat16");
  demand("values", stored, stored.type, count);
  out.source.type = stored.type;
  out.source.group_size = std::max<int64_t>(f.k, 1);
  out.source.values = stored.data;
  if (out.mask.empty()) return;
  const int64_t size = size_of(stored.type);
  const char *from = static_cast<const char *>(stored.data);
  out.values.resize(f.n * f.k * size);
  scatter(out.mask, f.n * f.k, [&](int64_t at, int64_t i) {
    std::memcpy(out.values.data() + at * size, from + i * size, size);
  });
  out.source.values = out.values.data();
}

} // namespace

std::vector<std::string> buffers(const Form &form) {
  check_size(form);
  check_layout(form);
  check_codec(form);
  std::vector<std::string> out;
  if (!form.dense()) out.push_back("index");
  out.push_back("values");
  if (form.integers()) out.push_back("scales");
  if (form.integers() && !form.symmetric()) out.push_back("zero_points");
  return out;
}

void unpack(const Form &form, const std::vector<Stored> &stored, Unpacked &out) {
  if (stored.size() != buffers(form).size()) refuse("the number of buffers is another");
  if (form.layout[0] == 1) fill_runs(form, stored[0], out.mask);
  if (form.layout[0] == 2) fill_tiles(form, stored[0], out.mask);
  const int64_t total = form.n * form.k;
  const int64_t count =
      form.dense() ? total : std::count(out.mask.begin(), out.mask.end(), uint8_t(1));
  const std::vector<Stored> rest(stored.begin() + !form.dense(), stored.end());
  out.source.n = form.n;
  out.source.k = form.k;
  if (!form.dense()) out.source.mask = out.mask.data();
  if (form.integers())
    read_codes(form, rest, count, out);
  else
    read_floats(form, rest[0], count, out);
}

} // namespace sfx

// Random weights and activations, and their product by plain loops in doubles.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "../../runtime/native/sparsefx.h"

using std::string;
template <class T> using Matrix = std::vector<T>; // row-major

constexpr double kU = 0x1p-24; // what rounding to float32 changes, at most, relatively

// Counts a check, and prints the first that fail.
void expect(bool good, const string &what);

// xorshift64*, so that every machine checks the same numbers.
struct Random {
  uint64_t state;
  uint64_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dull;
  }
  int below(int n) { return static_cast<int>((next() >> 33) % static_cast<uint64_t>(n)); }
  float real() { return static_cast<float>(below(1 << 23)) * 0x1p-22f - 1; } // -1 … 1
};

// Masks; the last three almost fit a family that would lose what they keep or store too much.
enum Pattern { kNone, kSteps, kAny, kColumns, kEmpty, kHalfSteps, kOneRow, kAllButLast };
const char *const kPatterns[] = {"none",  "steps",      "any",           "columns",
                                 "empty", "half steps", "but one row's", "all but the last"};

struct Case {
  int type, bits;
  bool zero_points;
  Pattern pattern;
  bool a8, exact;
  int n, k, group, a8_group;

  string name() const {
    const char *const types[] = {"fp32", "fp16", "bf16"};
    string kind = type == SFX_CODE ? "int" + std::to_string(bits) : types[type];
    return kind + (zero_points ? " zero points" : "") + " mask " + kPatterns[pattern] +
           (a8 ? " a8" : "") + (exact ? " exact " : " ") + std::to_string(n) + "x" +
           std::to_string(k) + " group " + std::to_string(group) + "/" + std::to_string(a8_group);
  }
};

// float16 and bfloat16: bits of fraction, the field that means infinity, the least exponent.
struct Layout {
  int digits, top, least;
  explicit Layout(int type)
      : digits(type == SFX_BF16 ? 7 : 10), top(type == SFX_BF16 ? 255 : 31),
        least(type == SFX_BF16 ? -126 : -14) {}
};

inline double widen(uint16_t bits, int type) {
  const Layout l(type);
  const int field = (bits & 0x7fff) >> l.digits, fraction = bits & ((1 << l.digits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (field == l.top) return fraction ? NAN : sign * INFINITY;
  const int hidden = field ? 1 << l.digits : 0;
  return sign * std::ldexp(hidden + fraction, std::max(field, 1) - 1 + l.least - l.digits);
}

// To nearest, ties to even.
inline uint16_t narrowed(double v, int type) {
  const Layout l(type);
  const int sign = std::signbit(v) ? 0x8000 : 0, infinity = l.top << l.digits;
  if (std::isnan(v)) return static_cast<uint16_t>(infinity | 1 << (l.digits - 1));
  if (std::isinf(v)) return static_cast<uint16_t>(sign | infinity);
  const int exponent = v == 0 ? l.least : std::max(std::ilogb(v), l.least);
  const double units = std::nearbyint(std::ldexp(std::abs(v), l.digits - exponent));
  const int bits = ((exponent - l.least) << l.digits) + static_cast<int>(units);
  return static_cast<uint16_t>(sign | std::min(bits, infinity));
}

// A weight of random codes or values, and what it stands for.
struct Weight {
  Case c;
  int groups;
  std::vector<uint8_t> codes, mask, zeros;
  std::vector<float> wide;
  std::vector<uint16_t> narrow, scales;
  int zero = 0;
  Matrix<double> value; // (n, k)
  std::unique_ptr<sfx_weight, void (*)(sfx_weight *)> packed{nullptr, sfx_free};

  Weight(const Case &of, Random &random) : c(of), groups((c.k + c.group - 1) / c.group) {
    fill_mask(random);
    c.type == SFX_CODE ? fill_codes(random) : fill_floats(random);
    sfx_source source{};
    source.n = c.n;
    source.k = c.k;
    source.type = c.type;
    source.bits = c.bits;
    source.zero = zero;
    source.group_size = c.group;
    source.a8_group = c.a8_group;
    source.values = c.type == SFX_CODE  ? static_cast<const void *>(codes.data())
                    : c.type == SFX_F32 ? static_cast<const void *>(wide.data())
                                        : narrow.data();
    source.mask = mask.empty() ? nullptr : mask.data();
    source.scales = scales.empty() ? nullptr : scales.data();
    source.zero_points = zeros.empty() ? nullptr : zeros.data();
    char error[SFX_ERROR] = "";
    packed.reset(sfx_pack(&source, error));
    expect(packed != nullptr, c.name() + ": " + error);
  }

  void fill_mask(Random &random) {
    if (c.pattern == kNone) return;
    mask.resize(int64_t(c.n) * c.k);
    const int step = c.bits == 2 ? 16 : c.bits <= 4 ? 8 : 4;
    for (int i = 0; i < c.n; ++i)
      for (int j = 0; j < c.k; ++j) {
        uint8_t &keep = mask[i * c.k + j];
        if (c.pattern == kAny) keep = random.below(16) < i % 16;
        if (c.pattern == kSteps || c.pattern == kHalfSteps) {
          const int same = c.pattern == kSteps ? step : step / 2;
          keep = j % c.group % same ? mask[i * c.k + j - 1] : random.below(2);
        }
        if (c.pattern == kColumns || c.pattern == kOneRow) {
          const int own = c.pattern == kColumns ? 0 : 1; // the last row that is not a copy
          keep = i % 16 > own ? mask[(i - 1) * c.k + j] : random.below(3) > 0;
        }
        if (c.pattern == kAllButLast) keep = i + 1 < c.n || j + 1 < c.k;
      }
  }
  bool kept(int i, int j) const { return mask.empty() || mask[i * c.k + j]; }
  void fill_codes(Random &random) {
    zero = random.below(2) ? 1 << (c.bits - 1) : random.below(1 << c.bits);
    for (int i = 0; i < c.n * groups; ++i) {
      scales.push_back(c.exact ? 0x3c00 : static_cast<uint16_t>(0x2000 + random.below(0x1000)));
      if (c.zero_points) zeros.push_back(static_cast<uint8_t>(random.below(1 << c.bits)));
    }
    for (int i = 0; i < c.n; ++i)
      for (int j = 0; j < c.k; ++j) {
        const int at = i * groups + j / c.group;
        // Half of them extreme: sums of two products are what overflows first.
        const int code = random.below(2) ? random.below(1 << c.bits) : (1 << c.bits) - 1;
        codes.push_back(static_cast<uint8_t>(code));
        const int from = zeros.empty() ? zero : zeros[at];
        value.push_back(kept(i, j) ? (code - from) * widen(scales[at], SFX_F16) : 0.0);
      }
  }
  void fill_floats(Random &random) {
    for (int i = 0; i < c.n; ++i)
      for (int j = 0; j < c.k; ++j) {
        const float v = c.exact ? static_cast<float>(random.below(17) - 8) : random.real();
        wide.push_back(v);
        narrow.push_back(narrowed(v, c.type));
        const double stored = c.type == SFX_F32 ? v : widen(narrow.back(), c.type);
        value.push_back(kept(i, j) ? stored : 0.0);
      }
  }
  int64_t segments() const { // at most: they end where scales do, and at 256 columns or more
    return groups + (c.a8_group ? c.k / c.a8_group : 0) + c.k / 256 + 2;
  }
};

// Rows of x of one type, as the engine gets them and as doubles.
struct Input {
  int type, m, k, stride;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  Matrix<double> value;

  // Exact: integers whose largest is 127 wherever an activation scale may start anew.
  Input(int of_type, int rows, const Case &c, Random &random)
      : type(of_type), m(rows), k(c.k), stride(c.k + 3) {
    for (int i = 0; i < (m - 1) * stride + k; ++i) {
      const int j = i % stride % (c.a8_group ? c.a8_group : std::max(k, 1));
      float v = random.real() * static_cast<float>(1 << random.below(8));
      if (c.exact) v = static_cast<float>(j ? random.below(19) - 9 : random.below(2) * 254 - 127);
      wide.push_back(v);
      narrow.push_back(narrowed(v, type));
    }
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < k; ++j)
        value.push_back(type == SFX_F32 ? wide[i * stride + j]
                                        : widen(narrow[i * stride + j], type));
  }
  const void *data() const {
    return type == SFX_F32 ? static_cast<const void *>(wide.data()) : narrow.data();
  }
  // What the engine rounds row i to.
  std::vector<double> rounded(int i, int group) const {
    std::vector<double> out(value.begin() + i * k, value.begin() + (i + 1) * k);
    group = group ? group : std::max(k, 1);
    for (int from = 0; from < k; from += group) {
      const int to = std::min(from + group, k);
      float most = 0;
      for (int j = from; j < to; ++j) most = std::max(most, static_cast<float>(std::abs(out[j])));
      const float scale = most == 0 ? 1.0f : most / 127;
      for (int j = from; j < to; ++j) {
        const float code = std::nearbyint(static_cast<float>(out[j]) / scale);
        out[j] = double(std::min(std::max(code, -127.0f), 127.0f)) * scale;
      }
    }
    return out;
  }
};

// A number and how far from it a result may be.
struct Sum {
  double value = 0, size = 0, error = 0;
};

inline Sum product(const double *x, const double *w, int k, double roundings) {
  Sum out;
  for (int j = 0; j < k; ++j) {
    out.value += x[j] * w[j];
    out.size += std::abs(x[j] * w[j]);
  }
  out.error = roundings * kU * out.size * 1.001;
  return out;
}

inline Matrix<Sum> products(const Input &x, const Weight &w) {
  Matrix<Sum> out;
  // Floats: one rounding per product and sum, three sums where x is cut into three.
  const double per_row = 2.0 * static_cast<double>(w.segments()) + 8 + (w.c.a8 ? 0 : 3.0 * x.k);
  for (int i = 0; i < x.m; ++i) {
    std::vector<double> row(x.value.begin() + i * x.k, x.value.begin() + (i + 1) * x.k);
    if (w.c.a8) row = x.rounded(i, w.c.a8_group);
    for (int r = 0; r < w.c.n; ++r)
      out.push_back(product(row.data(), w.value.data() + r * x.k, x.k, per_row));
    if (w.c.exact)
      for (int r = 0; r < w.c.n; ++r) out[i * w.c.n + r].error = 0;
  }
  return out;
}

inline double round_to(double v, int type) {
  return type == SFX_F32 ? v : widen(narrowed(v, type), type);
}

struct Extras { // of an epilogue; empty: none
  int activation = SFX_NONE;
  std::vector<double> bias, multiply, residual;
};

inline double activated(double v, int activation) {
  switch (activation) {
  case SFX_RELU: return std::max(v, 0.0);
  case SFX_SILU: return v / (1 + std::exp(-v));
  case SFX_GELU: return 0.5 * v * (1 + std::erf(v * std::sqrt(0.5)));
  case SFX_GELU_TANH:
    return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
  default: return v;
  }
}

inline void finish(Sum &s, const Extras &e, int row, int column, int n) {
  auto rounds = [&](double times) { s.error += times * kU * (std::abs(s.value) + s.error); };
  if (!e.bias.empty()) {
    s.value += e.bias[column];
    rounds(1);
  }
  if (e.activation > SFX_RELU) { // slopes stay below 1.13; arguments of exp are a few roundings off
    s.error = 1.13 * s.error + 32 * kU * std::abs(s.value);
    s.value = activated(s.value, e.activation);
  }
  if (e.activation == SFX_RELU) s.value = std::max(s.value, 0.0);
  if (!e.multiply.empty()) {
    s.value *= e.multiply[row * n + column];
    s.error *= std::abs(e.multiply[row * n + column]);
    rounds(1);
  }
  if (!e.residual.empty()) {
    s.value += e.residual[row * n + column];
    rounds(1);
  }
}

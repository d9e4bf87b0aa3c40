// Checks of sfx_norm and sfx_rotary: sizes around whole vectors, against plain loops in doubles.
#pragma once

#include <cstring>

#include "reference.h"

struct NormCase {
  int m, k, type;
  bool residual, keep, weight, bias, centred;

  string name() const {
    return "norm " + std::to_string(m) + "x" + std::to_string(k) + " type " + std::to_string(type) +
           (residual ? " residual" : "") + (keep ? " kept" : "") + (weight ? " weight" : "") +
           (bias ? " bias" : "") + (centred ? " centred" : "");
  }
};

// Numbers of `type` from random ones times `scale`, and as doubles.
struct Numbers {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  std::vector<double> exact;

  Numbers(size_t count, int type, Random &random, float scale = 1) {
    for (size_t i = 0; i < count; ++i) {
      wide.push_back(random.real() * scale);
      narrow.push_back(type == SFX_F32 ? uint16_t(0) : narrowed(wide.back(), type));
      exact.push_back(type == SFX_F32 ? wide.back() : widen(narrow.back(), type));
    }
  }
  const void *data(int type) const {
    return type == SFX_F32 ? static_cast<const void *>(wide.data()) : narrow.data();
  }
};

inline double number_at(const std::vector<char> &values, size_t i, int type) {
  if (type == SFX_F32) return reinterpret_cast<const float *>(values.data())[i];
  return widen(reinterpret_cast<const uint16_t *>(values.data())[i], type);
}

// What y may be off by. A sum of k numbers is rounded at most k / 64 + 10 times, the mean twice more
// and the root thrice, which halves what the squares were off by; then y is, for each operand.
inline bool norm_is(const NormCase &c, const double *s, const double *weight, const double *bias,
                    const std::vector<char> &y, size_t at) {
  const double unit = c.type == SFX_F32 ? kU : c.type == SFX_F16 ? 0x1p-11 : 0x1p-8;
  const double sums = c.k / 64 + 12, eps = static_cast<float>(1e-5);
  double mean = 0, size = 0, squares = 0;
  for (int j = 0; j < c.k; ++j) mean += s[j] / c.k, size += std::abs(s[j]) / c.k;
  if (!c.centred) mean = size = 0;
  for (int j = 0; j < c.k; ++j) squares += (s[j] - mean) * (s[j] - mean) / c.k;
  const double off = sums * kU * size, root = std::sqrt(squares + eps); // of the mean
  bool good = true;
  for (int j = 0; j < c.k; ++j) {
    const double w = weight ? weight[j] : 1, b = bias ? bias[j] : 0;
    const double turned = (s[j] - mean) / root * w;
    const double far = off / root * (1 + std::abs(s[j] - mean) / root) * std::abs(w);
    const double limit = (sums + 6) * kU * (std::abs(turned) + std::abs(b)) + 2 * far;
    const double want = turned + b, got = number_at(y, at + j, c.type);
    good = good && std::abs(got - want) <= unit * std::abs(want) + (1 + unit) * limit + 1e-7;
  }
  return good;
}

inline void check_norm(const NormCase &c, int threads, const string &set, Random &random) {
  const size_t count = size_t(c.m) * c.k, size = c.type == SFX_F32 ? 4 : 2;
  const Numbers x(count, c.type, random, 3), r(count, c.type, random), w(c.k, c.type, random),
      b(c.k, c.type, random);
  std::vector<char> y((count + 8) * size, 'y'), s((count + 8) * size, 's');
  sfx_norm_call call{};
  call.x = x.data(c.type);
  call.residual = c.residual ? r.data(c.type) : nullptr;
  call.sum = c.keep ? s.data() : nullptr;
  call.y = y.data();
  call.m = c.m;
  call.k = c.k;
  call.type = c.type;
  call.centred = c.centred;
  call.threads = threads;
  call.eps = 1e-5f;
  call.weight = c.weight ? w.data(c.type) : nullptr;
  call.bias = c.bias ? b.data(c.type) : nullptr;
  char error[SFX_ERROR] = "";
  bool good = !sfx_norm(&call, error);
  std::vector<double> sum = x.exact;
  for (size_t i = 0; i < count && c.residual; ++i) {
    const double both = x.exact[i] + r.exact[i];
    const float once = static_cast<float>(both);
    sum[i] = c.type == SFX_F32 ? once : widen(narrowed(once, c.type), c.type);
    good = good && (!c.keep || number_at(s, i, c.type) == sum[i]);
  }
  for (int row = 0; row < c.m; ++row)
    good = good && norm_is(c, sum.data() + size_t(row) * c.k, c.weight ? w.exact.data() : nullptr,
                           c.bias ? b.exact.data() : nullptr, y, size_t(row) * c.k);
  for (size_t i = count * size; i < y.size(); ++i) good = good && y[i] == 'y' && s[i] == 's';
  expect(good, c.name() + " in " + set + error);
}

// NaN and infinity spoil their own row alone; numbers of which squares overflow give 0.
inline void check_spoiled(const string &set) {
  constexpr int k = 37;
  for (float bad : {NAN, INFINITY, 1e30f})
    for (int centred : {0, 1}) {
      std::vector<float> x(3 * k, 1.0f), y(3 * k);
      x[0] = x[k + 1] = x[2 * k] = 2;
      x[k + k - 1] = bad;
      sfx_norm_call call{x.data(), nullptr, nullptr, y.data(), 3, k, SFX_F32, centred, 1, 1e-5f};
      char error[SFX_ERROR] = "";
      bool good = !sfx_norm(&call, error) && std::isfinite(y[0]) && std::isfinite(y[2 * k]);
      good = good && !std::memcmp(y.data(), y.data() + 2 * k, k * 4);
      if (std::isnan(bad) || std::isinf(bad)) good = good && std::isnan(y[k + k - 1]);
      if (std::isnan(bad)) good = good && std::isnan(y[k]);
      if (bad == 1e30f) good = good && y[k + k - 1] == 0;
      expect(good, "a norm of " + std::to_string(bad) + " in " + set);
    }
}

// Bit for bit the products and sums that it means, from rows and into rows of any distance.
inline void check_rotary(int half, int threads, sfx_parallel pool, const string &set,
                         Random &random) {
  const int d = 2 * half, a = 2, b = 3, c = 5;
  const int64_t step = d + 3, rows = a * b * c;
  const Numbers x(rows * step, SFX_F32, random), angles(2 * c * step, SFX_F32, random);
  std::vector<float> y(rows * step, 777.0f);
  const float *cos = angles.wide.data(), *sin = cos + c * step;
  sfx_rotary_call call{x.wide.data(), cos, sin, y.data(), {a, b, c}};
  const int64_t from[3] = {b * c * step, step, b * step}, to[3] = {b * c * step, c * step, step};
  std::memcpy(call.x_stride, from, sizeof from);
  std::memcpy(call.y_stride, to, sizeof to);
  call.cos_stride[2] = call.sin_stride[2] = step;
  call.half = half;
  call.threads = threads;
  call.parallel = pool;
  char error[SFX_ERROR] = "";
  bool good = !sfx_rotary(&call, error);
  for (int i = 0; i < rows; ++i) {
    const int p = i / (b * c), q = i / c % b, r = i % c;
    const float *v = x.wide.data() + p * from[0] + q * from[1] + r * from[2];
    const float *got = y.data() + p * to[0] + q * to[1] + r * to[2];
    for (int j = 0; j < d; ++j) {
      const float product = v[j] * cos[r * step + j];
      const float other = (j < half ? -v[half + j] : v[j - half]) * sin[r * step + j];
      good = good && got[j] == product + other;
    }
    good = good && got[d] == 777.0f && got[d + 2] == 777.0f;
  }
  expect(good, "rotary of 2 · " + std::to_string(half) + " in " + set + error);
}

inline void check_wrong_norms() {
  char error[SFX_ERROR] = "";
  float x[4] = {};
  sfx_norm_call call{x, nullptr, nullptr, x, 1, 4, SFX_F32};
  auto refused = [&](sfx_norm_call wrong) { return sfx_norm(&wrong, error) && *error; };
  sfx_norm_call wrong = call;
  expect(!sfx_norm(&call, error), "a norm in place is fine");
  wrong.y = nullptr;
  expect(refused(wrong), "a norm to nowhere is refused");
  wrong = call;
  wrong.type = SFX_CODE;
  expect(refused(wrong), "a norm of codes is refused");
  wrong = call;
  wrong.m = -1;
  expect(refused(wrong), "a norm of less than no rows is refused");
  wrong = call;
  wrong.type = SFX_F16;
  wrong.residual = x;
  expect(refused(wrong), "a norm of a rounded sum without a place for it is refused");
  sfx_rotary_call rotary{};
  rotary.half = -1;
  expect(sfx_rotary(&rotary, error), "less than half a row is refused");
}

inline void check_norms(const string &set, sfx_parallel pool, Random &random) {
  char error[SFX_ERROR];
  expect(!sfx_set_isa(set.c_str(), error), set + " is chosen");
  for (int k : {0, 1, 15, 16, 17, 63, 64, 65, 131, 1031})
    for (int bits = 0; bits < 32; ++bits) {
      const int m = bits / 3 % 3 == 2 ? 7 : bits / 3 % 3;
      const NormCase c{m,         k, bits % 3, (bits & 1) || bits % 3, (bits & 1) || bits % 3,
                       (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
      check_norm(c, 1, set, random);
    }
  check_norm({130, 1031, SFX_F32, true, true, true, true, true}, 3, set, random);
  check_norm({130, 1031, SFX_F32, true, false, true, false, false}, 3, set, random);
  check_spoiled(set);
  for (int half : {0, 1, 7, 8, 15, 16, 17, 32, 47}) check_rotary(half, 1, nullptr, set, random);
  check_rotary(1200, 2, pool, set, random);
  check_wrong_norms();
}

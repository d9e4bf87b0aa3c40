// Checks the CPU engine against plain loops, on every instruction set of the machine: each family,
// kind of code, type of activations and boundary shape. Small integers must come out exact; random
// numbers within bounds that follow from the number of roundings. Returns 1 if any check fails.
// An argument names the only instruction set to check; the first failure then ends the program.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <thread>

#include "parts.h"
#include "units.h"

namespace {
int checks = 0, failures = 0;
string only; // the instruction set to check; empty: all
}

void expect(bool good, const string &what) {
  ++checks;
  if (good) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
  if (!only.empty()) {
    std::fflush(stdout);
    std::_Exit(1);
  }
}

namespace {

void in_threads(void *, sfx_body body, void *context, int64_t count) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i; (i = next++) < count;) body(context, i);
  };
  std::thread other(work);
  work();
  other.join();
}

std::vector<string> isas() {
  std::vector<string> out;
  const string all = sfx_isas();
  for (size_t from = 0; from < all.size();) {
    const size_t end = std::min(all.find(' ', from), all.size());
    const string isa = all.substr(from, end - from);
    if (only.empty() || isa == only) out.push_back(isa);
    from = end + 1;
  }
  return out;
}

// Numbers in the type of x, from the rounded doubles that they are; and back.
std::vector<char> in_type(const std::vector<double> &values, int type) {
  std::vector<char> out;
  for (double v : values) {
    const float wide = static_cast<float>(v);
    const uint16_t narrow = type == SFX_F32 ? uint16_t(0) : narrowed(v, type);
    const char *from = type == SFX_F32 ? reinterpret_cast<const char *>(&wide)
                                       : reinterpret_cast<const char *>(&narrow);
    out.insert(out.end(), from, from + (type == SFX_F32 ? 4 : 2));
  }
  return out;
}
double number(const std::vector<char> &from, int i, int type) {
  if (type == SFX_F32) return reinterpret_cast<const float *>(from.data())[i];
  return widen(reinterpret_cast<const uint16_t *>(from.data())[i], type);
}

// Runs the call on every set for the first m rows of x and compares with `want`.
void compare(const Weight &w, const Input &x, int m, sfx_call call, const Matrix<Sum> &want,
             const string &name, const std::vector<string> &sets = isas()) {
  const int n = w.c.n, stride = n + 2;
  for (const string &isa : sets) {
    char error[SFX_ERROR] = "";
    expect(!sfx_set_isa(isa.c_str(), error) && isa == sfx_isa(), isa + " is chosen");
    const std::vector<double> before(static_cast<size_t>(m) * stride, 777);
    std::vector<char> y = in_type(before, x.type);
    call.x = x.data();
    call.y = y.data();
    call.m = m;
    call.x_stride = x.stride;
    call.y_stride = stride;
    call.x_type = x.type;
    call.a8 = w.c.a8;
    const bool ran = !sfx_linear(w.packed.get(), &call, error);
    const double narrow = x.type == SFX_F32 ? 0 : x.type == SFX_F16 ? 0x1p-11 : 0x1p-8;
    double worst = 0, off = 0;
    bool whole = true;
    for (int i = 0; i < m * stride; ++i) {
      if (i % stride >= n) {
        whole = whole && number(y, i, x.type) == round_to(777, x.type);
        continue;
      }
      const Sum &s = want[i / stride * n + i % stride];
      const double most = s.error + narrow * (std::abs(s.value) + s.error) + 0x1p-25 * (narrow > 0);
      const double far = std::abs(number(y, i, x.type) - s.value);
      if (!(far <= most) && !(far < worst)) worst = far, off = most;
    }
    char numbers[80];
    std::snprintf(numbers, sizeof numbers, " m=%d threads=%d type %d: %g beyond %g", m,
                  call.threads, x.type, worst, off);
    expect(ran && worst == 0 && whole, isa + " " + name + numbers + error);
  }
}

// Every epilogue and a low-rank branch, in the type of x.
void check_epilogues(int type, Random &random) {
  const Case c{SFX_CODE, 4, false, kAny, type == SFX_F16, false, 37, 132, 32, 0};
  const Case thin{SFX_F32, 0, false, kNone, false, false, 5, c.k, 1, 0};
  const Case tall{SFX_F32, 0, false, kNone, false, false, c.n, 5, 1, 0};
  const Weight w(c, random), down(thin, random), up(tall, random);
  const Input x(type, type == SFX_F32 ? 270 : 13, c, random); // tiles of results have 256 rows
  const std::vector<float> scale = {0.5f, -1, 2, 0.25f, 1};
  const Matrix<Sum> plain = products(x, w), low = products(x, down);
  for (int bits = 0; bits < 32; ++bits) {
    Extras extras;
    auto fill = [&](int bit, int count, std::vector<double> &to) {
      for (int i = 0; i < count && bits & bit; ++i) to.push_back(round_to(random.real(), type));
    };
    extras.activation = bits % 5;
    fill(1, c.n, extras.bias);
    fill(2, x.m * c.n, extras.multiply);
    fill(4, x.m * c.n, extras.residual);
    Matrix<Sum> want = plain;
    for (int i = 0; i < x.m * c.n; ++i) {
      for (int r = 0; r < 5 && bits & 8; ++r) {
        const Sum &from = low[i / c.n * 5 + r];
        const double by = up.value[i % c.n * 5 + r] * (bits & 16 ? double(scale[r]) : 1);
        want[i].value += from.value * by;
        want[i].error += (from.error + 24 * kU * from.size) * std::abs(by);
      }
      finish(want[i], extras, i / c.n, i % c.n, c.n);
    }
    const std::vector<char> bias = in_type(extras.bias, type), add = in_type(extras.residual, type),
                            times = in_type(extras.multiply, type);
    sfx_call call{};
    call.activation = extras.activation;
    call.threads = 2;
    call.parallel = in_threads;
    call.bias = bias.empty() ? nullptr : bias.data();
    call.multiply = times.empty() ? nullptr : times.data();
    call.residual = add.empty() ? nullptr : add.data();
    call.down = bits & 8 ? down.packed.get() : nullptr;
    call.up = bits & 8 ? up.packed.get() : nullptr;
    call.branch_scale = bits & 16 ? scale.data() : nullptr;
    compare(w, x, x.m, call, want, "epilogue " + std::to_string(bits));
  }
}

std::set<string> seen; // families with their kinds

void check_case(const Case &c, Random &random, std::vector<int> rows) {
  const Weight w(c, random);
  if (!w.packed) return;
  seen.insert(string(sfx_family(w.packed.get())) + " " + std::to_string(c.type) + "/" +
              std::to_string(c.bits));
  std::vector<int> types = {c.exact && !c.a8 ? SFX_BF16 : SFX_F32};
  if (!c.exact && !c.a8) types.push_back(SFX_F16);
  for (int type : types) {
    const Input x(type, rows.back(), c, random);
    const Matrix<Sum> want = products(x, w);
    if (type == SFX_F16) rows = {rows.back()};
    for (int m : rows) {
      sfx_call call{};
      call.threads = m % 4 ? 1 : 2;
      call.parallel = m % 8 ? in_threads : nullptr; // null: one thread runs all shares
      compare(w, x, m, call, want, c.name());
    }
  }
}

void check_products(Random &random) {
  // n, k, group, a8_group
  const int shapes[][4] = {{1, 1, 32, 0},    {16, 64, 64, 0},     {1, 4, 4, 0},  {17, 132, 32, 0},
                           {33, 600, 600, 0}, {48, 256, 64, 128}, {5, 77, 7, 0}, {3, 0, 8, 0},
                           {150, 40, 16, 8}};
  struct Codec {
    int type, bits;
  };
  const Codec codecs[] = {{SFX_CODE, 2}, {SFX_CODE, 3}, {SFX_CODE, 4}, {SFX_CODE, 5}, {SFX_CODE, 8},
                          {SFX_F32, 0},  {SFX_F16, 0},  {SFX_BF16, 0}};
  const std::vector<int> many = {2, 4, 7, 16};
  for (const Codec &codec : codecs)
    for (const auto &s : shapes)
      for (int pattern = kNone; pattern <= kAllButLast; ++pattern)
        for (int variant = 0; variant < 8; ++variant) {
          const bool zero_points = variant & 1, a8 = variant & 2, exact = variant & 4;
          const Case c{codec.type, codec.bits, zero_points, Pattern(pattern), a8, exact,
                       s[0], s[1], s[2], a8 ? s[3] : 0};
          if (codec.type != SFX_CODE && variant & 3) continue;
          check_case(c, random, variant % 3 ? std::vector<int>{1, 3, 5, 12, 33} : many);
        }
  check_case({SFX_CODE, 4, false, kAny, true, false, 40, 70, 35, 35}, random, {257, 300});
  check_case({SFX_CODE, 4, true, kColumns, false, false, 150, 70, 35, 0}, random, {257, 300});
}

bool same_kind(double got, double want) {
  if (std::isnan(want)) return std::isnan(got);
  return std::isinf(want) ? got == want : std::isfinite(got);
}

// Infinity and NaN go where they belong, and none that a call leaves in memory reach the next.
void check_not_finite(Random &random) {
  char error[SFX_ERROR] = "";
  const Case cases[] = {{SFX_CODE, 4, false, kNone, false, false, 37, 132, 32, 0},
                        {SFX_CODE, 3, true, kColumns, false, false, 37, 132, 64, 0},
                        {SFX_CODE, 4, false, kColumns, false, false, 37, 132, 132, 0},
                        {SFX_CODE, 8, true, kAny, false, false, 37, 132, 32, 0},
                        {SFX_F16, 0, false, kColumns, false, false, 37, 132, 132, 0}};
  for (const Case &c : cases) {
    const Weight w(c, random);
    const Input x(SFX_F32, 20, c, random);
    const Matrix<Sum> want = products(x, w);
    for (int m : {3, 8, 20}) {
      std::vector<float> odd(static_cast<size_t>(m) * c.k), y(static_cast<size_t>(m) * c.n);
      for (float &v : odd) v = random.real();
      for (int i = 0; i < m; ++i) {
        float *row = odd.data() + i * c.k;
        if (i % 3 == 0) row[random.below(c.k)] = i % 2 ? INFINITY : -INFINITY;
        if (i % 3 == 1) std::fill(row, row + c.k, NAN);
      }
      sfx_call call{};
      call.x = odd.data();
      call.y = y.data();
      call.m = m;
      call.x_stride = c.k;
      call.y_stride = c.n;
      call.threads = 1;
      for (const string &isa : isas()) {
        sfx_set_isa(isa.c_str(), error);
        bool good = !sfx_linear(w.packed.get(), &call, error);
        for (int i = 0; i < m * c.n && c.pattern == kNone; ++i) {
          double sum = 0;
          for (int j = 0; j < c.k; ++j)
            sum += double(odd[i / c.n * c.k + j]) * w.value[i % c.n * c.k + j];
          good = good && same_kind(y[i], sum);
        }
        expect(good, isa + " infinity and NaN " + c.name());
        compare(w, x, m, call, want, "after NaN " + c.name(), {isa});
      }
    }
  }
}

// Weights that are tiny, infinite or not numbers, in the second to fourth of many rows.
void check_odd_weights(Random &random) {
  const uint16_t odd[] = {0x0001, 0x007f, 0x7f80, 0x7fc0}; // of bfloat16
  const int k = 70;
  for (uint16_t bits : odd) {
    const Case c{SFX_BF16, 0, false, kNone, false, false, 132, k, k, 0};
    Weight w(c, random);
    for (int j = 0; j < k; ++j) w.narrow[k + j] = j % 3 ? 0x3f80 : 0;
    w.narrow[2 * k + 5] = bits;
    for (int j = 0; j < k; ++j) w.narrow[3 * k + j] = j == 5 ? bits : 0;
    sfx_source source{};
    source.n = c.n;
    source.k = source.group_size = k;
    source.type = SFX_BF16;
    source.values = w.narrow.data();
    char error[SFX_ERROR] = "";
    w.packed.reset(sfx_pack(&source, error));
    const std::vector<float> x(20 * k, 1.5f);
    for (const string &isa : isas())
      for (int m : {1, 6, 20}) {
        std::vector<float> y(m * c.n);
        sfx_call call{};
        call.x = x.data();
        call.y = y.data();
        call.m = m;
        call.x_stride = k;
        call.y_stride = c.n;
        sfx_set_isa(isa.c_str(), error);
        bool good = !sfx_linear(w.packed.get(), &call, error);
        const double want = 1.5 * widen(bits, SFX_BF16);
        for (int i = 0; i < m; ++i) {
          const float *row = y.data() + i * c.n;
          good = good && row[1] == 1.5f * 46 && same_kind(row[2], want);
          good = good && (std::isfinite(want) ? row[3] == want : same_kind(row[3], want));
        }
        expect(good, isa + " weight of bits " + std::to_string(bits) + " m=" + std::to_string(m));
      }
  }
}

// Codes and scales of activations, to the bit: a row of ones picks each of them.
void check_quantize(Random &random) {
  const int k = 80;
  Case c{SFX_CODE, 8, false, kNone, true, true, k, k, k, 0};
  Weight w(c, random);
  std::vector<uint8_t> ones(k * k, 0);
  for (int i = 0; i < k; ++i) ones[i * k + i] = 1;
  sfx_source source{};
  source.n = source.k = source.group_size = k;
  source.type = SFX_CODE;
  source.bits = 8;
  source.values = ones.data();
  source.scales = w.scales.data();
  char error[SFX_ERROR] = "";
  w.packed.reset(sfx_pack(&source, error));
  c.exact = false;
  Input x(SFX_F32, 40, c, random);
  const float odd[] = {0, INFINITY, NAN, 1e-44f, 1e38f};
  for (int i = 0; i < 40; ++i)
    for (int j = 0; j < k; ++j) {
      float &v = x.wide[i * x.stride + j];
      if (i < 5) v = odd[i] * (i < 3 && j != 7 ? 0.0f : 1.0f);
      if (i > 20) v = j ? static_cast<float>(random.below(253)) - 126.5f : 127.0f; // ties
      x.value[i * k + j] = v;
    }
  for (const string &isa : isas()) {
    sfx_set_isa(isa.c_str(), error);
    std::vector<float> y(40 * k);
    sfx_call call{};
    call.x = x.wide.data();
    call.y = y.data();
    call.m = 40;
    call.x_stride = x.stride;
    call.y_stride = k;
    call.a8 = 1;
    expect(!sfx_linear(w.packed.get(), &call, error), isa + error);
    for (int i = 0; i < 40; ++i) {
      const std::vector<double> want = x.rounded(i, 0);
      for (int j = 0; j < k; ++j) {
        const float got = y[i * k + j];
        const bool good = i == 1 || i == 2 ? std::isnan(got) : got == static_cast<float>(want[j]);
        expect(good, isa + " quantize row " + std::to_string(i) + " column " + std::to_string(j));
      }
    }
  }
}

// One weight in several threads at once, each with rows of its own.
void check_sharing(Random &random) {
  const Case c{SFX_CODE, 4, true, kAny, true, true, 40, 256, 64, 0};
  const Weight w(c, random);
  const Input x(SFX_F32, 8, c, random);
  const Matrix<Sum> want = products(x, w);
  std::vector<float> y(8 * c.n);
  std::vector<std::thread> threads;
  std::atomic<int> failed{0};
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      char error[SFX_ERROR];
      sfx_call call{};
      call.x = x.wide.data() + 2 * t * x.stride;
      call.y = y.data() + 2 * t * c.n;
      call.m = 2;
      call.x_stride = x.stride;
      call.y_stride = c.n;
      call.a8 = 1;
      for (int i = 0; i < 50; ++i) failed += sfx_linear(w.packed.get(), &call, error);
    });
  for (std::thread &thread : threads) thread.join();
  bool same = !failed;
  for (int i = 0; i < 8 * c.n; ++i) same = same && y[i] == static_cast<float>(want[i].value);
  expect(same, "one weight in four threads");
}

void check_refusals(Random &random) {
  char error[SFX_ERROR] = "";
  sfx_source source{};
  source.n = source.k = 4;
  source.type = SFX_CODE;
  source.bits = 4;
  expect(!sfx_pack(&source, error) && *error, "a group_size of 0 is refused");
  source.group_size = 4;
  expect(!sfx_pack(&source, error), "codes without values are refused");
  const Case c{SFX_F32, 0, false, kNone, false, false, 4, 4, 4, 0};
  const Weight w(c, random);
  sfx_call call{};
  call.m = 1;
  expect(sfx_linear(w.packed.get(), &call, error), "x of null is refused");
  call.m = 0;
  expect(!sfx_linear(w.packed.get(), &call, error), "no rows are fine");
  expect(sfx_set_isa("abacus", error), "an unknown instruction set is refused");
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1) only = argv[1];
  expect(!isas().empty(), "this machine runs " + only);
  Random random{20240229};
  check_refusals(random);
  check_floats();
  for (const string &isa : isas()) check_activations(isa), check_norms(isa, in_threads, random);
  check_quantize(random);
  check_not_finite(random);
  check_products(random);
  for (int type : {SFX_F32, SFX_F16, SFX_BF16}) check_epilogues(type, random);
  check_sharing(random);
  check_parts(random, isas(), in_threads);
  check_wrong_parts(random);
  check_odd_weights(random);
  // dense and columns of 8 codecs, lanes of all but 3 and 5 bits, which share 4's and 8's; bytes.
  expect(seen.size() >= 8 + 8 + 6 + 5, "every family of every kind was packed");
  std::printf("%s: %d checks, %d failed\n", sfx_isas(), checks, failures);
  return failures != 0;
}

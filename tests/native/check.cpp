// Checks the CPU engine against plain loops, on every instruction set of the machine: each family,
// kind of code, type of activations and boundary shape. Small integers must come out exact; random
// numbers within bounds that follow from the number of roundings. No arguments; 1 if any check fails.
#include <atomic>
#include <cstdio>
#include <set>
#include <thread>

#include "reference.h"

namespace {
int checks = 0, failures = 0;
}

void expect(bool good, const string &what) {
  ++checks;
  if (good) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
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
    out.push_back(all.substr(from, end - from));
    from = end + 1;
  }
  return out;
}

// Numbers in the type of x, from the rounded doubles that they are.
std::vector<char> in_type(const std::vector<double> &values, int type) {
  std::vector<char> out(values.size() * static_cast<size_t>(sfx::size_of(type)));
  std::vector<float> floats(values.begin(), values.end());
  if (!floats.empty())
    sfx::write(out.data(), 0, floats.data(), static_cast<int64_t>(floats.size()), type);
  return out;
}

// Runs the call on every set for the first m rows of x and compares with `want`.
void compare(const Weight &w, const Input &x, int m, sfx_call call, const Matrix<Sum> &want,
             const string &name) {
  const int n = w.c.n, stride = n + 2;
  for (const string &isa : isas()) {
    char error[SFX_ERROR] = "";
    sfx_set_isa(isa.c_str(), error);
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
    std::vector<float> got(before.size());
    sfx::read(got.data(), y.data(), 0, static_cast<int64_t>(got.size()), x.type);
    const double narrow = x.type == SFX_F32 ? 0 : x.type == SFX_F16 ? 0x1p-11 : 0x1p-8;
    double worst = 0, off = 0;
    bool whole = true;
    for (int i = 0; i < m * stride; ++i) {
      if (i % stride >= n) {
        whole = whole && got[i] == round_to(777, x.type);
        continue;
      }
      const Sum &s = want[i / stride * n + i % stride];
      const double most = s.error + narrow * (std::abs(s.value) + s.error) + 0x1p-25 * (narrow > 0);
      const double far = std::abs(got[i] - s.value);
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
  const Input x(type, 13, c, random);
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
  const Input x(c.exact && !c.a8 ? SFX_BF16 : SFX_F32, rows.back(), c, random);
  const Matrix<Sum> want = products(x, w);
  for (int m : rows) {
    sfx_call call{};
    call.threads = m % 4 ? 1 : 2;
    call.parallel = in_threads;
    compare(w, x, m, call, want, c.name());
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
      for (int pattern = kNone; pattern <= kEmpty; ++pattern)
        for (int variant = 0; variant < 8; ++variant) {
          Case c{codec.type,    codec.bits, (variant & 1) != 0, Pattern(pattern), (variant & 2) != 0,
                 variant & 4 ? true : false, s[0], s[1], s[2], variant & 2 ? s[3] : 0};
          if (codec.type != SFX_CODE && variant & 3) continue;
          check_case(c, random, variant % 3 ? std::vector<int>{1, 3, 5, 12, 33} : many);
        }
  check_case({SFX_CODE, 4, false, kAny, true, false, 40, 70, 35, 35}, random, {257, 300});
  check_case({SFX_CODE, 4, true, kColumns, false, false, 150, 70, 35, 0}, random, {257, 300});
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

int main() {
  Random random{20240229};
  check_refusals(random);
  check_quantize(random);
  check_products(random);
  for (int type : {SFX_F32, SFX_F16, SFX_BF16}) check_epilogues(type, random);
  check_sharing(random);
  // dense and columns of 8 codecs, lanes of all but 3 and 5 bits, which share 4's and 8's; bytes.
  expect(seen.size() >= 8 + 8 + 6 + 5, "every family of every kind was packed");
  std::printf("%s: %d checks, %d failed\n", sfx_isas(), checks, failures);
  return failures != 0;
}

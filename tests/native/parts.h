// Checks of sfx_linear_parts: bit for bit what sfx_linear gives of each part alone.
#pragma once

#include <cstring>

#include "reference.h"

struct Alone { // a part, and what of it sfx_linear computes
  const Weight *w, *down, *up;
  std::vector<float> bias, y;

  Alone(const Weight &of, const Weight *low, const Weight *high, bool biased, Random &random)
      : w(&of), down(low), up(high) {
    for (int i = 0; i < of.c.n && biased; ++i) bias.push_back(random.real());
  }
  sfx_part part(float *to, int stride) const {
    return {w->packed.get(),
            bias.empty() ? nullptr : bias.data(),
            down ? down->packed.get() : nullptr,
            up ? up->packed.get() : nullptr,
            nullptr,
            to,
            stride};
  }
  bool run(sfx_call call) {
    char error[SFX_ERROR] = "";
    y.assign(static_cast<size_t>(call.m) * w->c.n, 0);
    const sfx_part own = part(y.data(), w->c.n);
    call.y = own.y;
    call.y_stride = own.y_stride;
    call.bias = own.bias;
    call.down = own.down;
    call.up = own.up;
    return !sfx_linear(own.weight, &call, error);
  }
};

inline sfx_call call_of(const Input &x, int m, bool a8, int threads, sfx_parallel parallel) {
  sfx_call call{};
  call.x = x.data();
  call.m = m;
  call.x_stride = x.stride;
  call.x_type = SFX_F32;
  call.a8 = a8;
  call.threads = threads;
  call.parallel = parallel;
  return call;
}

// Weights of every family side by side, some with a bias and a branch; y's rows are apart.
inline void check_side_by_side(const sfx_call &like, std::vector<Alone> &parts) {
  char error[SFX_ERROR] = "";
  bool ran = true, same = true;
  std::vector<std::vector<float>> together;
  std::vector<sfx_part> given;
  for (Alone &p : parts) {
    ran = ran && p.run(like);
    together.emplace_back(static_cast<size_t>(like.m) * (p.w->c.n + 3), 777.0f);
  }
  for (size_t i = 0; i < parts.size(); ++i)
    given.push_back(parts[i].part(together[i].data(), parts[i].w->c.n + 3));
  const int count = static_cast<int>(given.size());
  ran = ran && !sfx_linear_parts(given.data(), count, 0, &like, error);
  for (size_t i = 0; i < parts.size(); ++i)
    for (int row = 0, n = parts[i].w->c.n; row < like.m; ++row) {
      const float *got = together[i].data() + row * (n + 3);
      same = same && !std::memcmp(got, parts[i].y.data() + row * n, n * 4);
      same = same && got[n] == 777.0f && got[n + 2] == 777.0f;
    }
  const string how = " a8 " + std::to_string(like.a8) + " m=" + std::to_string(like.m);
  expect(ran && same, "parts side by side" + how + error);
}

// relu(first) * second + residual: each step rounds once, alone or in the engine.
inline void check_gate(Random &random, sfx_call call, Alone &first, Alone &second) {
  char error[SFX_ERROR] = "";
  const size_t size = static_cast<size_t>(call.m) * first.w->c.n;
  std::vector<float> residual(size), got(size);
  for (float &v : residual) v = random.real();
  bool same = first.run(call) && second.run(call);
  call.activation = SFX_RELU;
  call.residual = residual.data();
  const sfx_part parts[] = {first.part(got.data(), first.w->c.n), second.part(nullptr, 0)};
  same = same && !sfx_linear_parts(parts, 2, 1, &call, error);
  for (size_t i = 0; i < size; ++i) {
    const float gate = first.y[i] < 0 ? 0.0f : first.y[i];
    const float product = gate * second.y[i];
    same = same && got[i] == product + residual[i];
  }
  expect(same, "a gate, m=" + std::to_string(call.m) + error);
}

inline void check_parts(Random &random, const std::vector<string> &sets, sfx_parallel pool) {
  const int k = 140; // in groups of 35 activations are padded, in groups of 64 they are not
  const Case thin{SFX_F32, 0, false, kNone, false, false, 5, k, 1, 0};
  const Case tall{SFX_F32, 0, false, kNone, false, false, 150, 5, 1, 0};
  const Weight down(thin, random), up(tall, random);
  for (bool a8 : {false, true}) {
    const Weight a({SFX_CODE, 4, false, kNone, a8, false, 150, k, 35, 0}, random);
    const Weight b({SFX_CODE, 4, false, kNone, a8, false, 150, k, 35, 0}, random);
    const Weight c({SFX_CODE, 8, true, kColumns, a8, false, 37, k, 64, 0}, random);
    const Weight d({SFX_CODE, 3, false, kAny, a8, false, 16, k, 32, 0}, random);
    std::vector<Alone> parts = {{a, nullptr, nullptr, true, random},
                                {c, nullptr, nullptr, false, random},
                                {b, &down, &up, false, random},
                                {d, nullptr, nullptr, true, random}};
    const Input x(SFX_F32, 270, a.c, random); // tiles of results have 256 rows
    for (const string &isa : sets)
      for (int m : {1, 5, 20, 270}) {
        char error[SFX_ERROR];
        expect(!sfx_set_isa(isa.c_str(), error), isa + " is chosen");
        const sfx_call call = call_of(x, m, a8, m == 1 ? 1 : 3, m == 20 ? pool : nullptr);
        check_side_by_side(call, parts);
        check_gate(random, call, parts[0], parts[2]);
      }
  }
}

inline void check_wrong_parts(Random &random) {
  const Weight a({SFX_F32, 0, false, kNone, false, false, 4, 8, 1, 0}, random);
  const Weight b({SFX_F32, 0, false, kNone, false, false, 5, 8, 1, 0}, random);
  const Weight c({SFX_F32, 0, false, kNone, false, false, 4, 9, 1, 0}, random);
  const Input x(SFX_F32, 1, a.c, random);
  const sfx_call call = call_of(x, 1, false, 1, nullptr);
  sfx_call residual = call;
  float y[8];
  residual.residual = y;
  char error[SFX_ERROR] = "";
  auto refused = [&](const Weight &p, const Weight &q, int count, int gated, const sfx_call &how) {
    const sfx_part parts[] = {{p.packed.get(), nullptr, nullptr, nullptr, nullptr, y, 4},
                              {q.packed.get(), nullptr, nullptr, nullptr, nullptr, y + 4, 4}};
    return sfx_linear_parts(parts, count, gated, &how, error) && *error;
  };
  expect(refused(a, a, 0, 0, call), "no parts are refused");
  expect(refused(a, c, 2, 0, call), "parts of two k are refused");
  expect(refused(a, b, 2, 1, call), "a gate of two n is refused");
  expect(refused(a, a, 1, 1, call), "half a gate is refused");
  expect(refused(a, a, 2, 0, residual), "one residual for two results is refused");
}

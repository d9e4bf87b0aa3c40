// sfx_norm: rows are shared out to threads; each is read, added to, normalised and written in cache.
#include <algorithm>
#include <cstdio>
#include <new>
#include <vector>

#include "floats.h"
#include "isa.h"
#include "threads.h"

namespace sfx {
namespace {

constexpr int64_t kShare = 1 << 15; // numbers that a thread is worth waking for

// Memory of one thread, so that none is allocated in the steady state: four rows of float32.
float *room(int64_t k) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < 4 * k) memory.resize(4 * k);
  return memory.data();
}

void wide_rows(const Isa &isa, const sfx_norm_call &call, int64_t first, int64_t last) {
  const int64_t k = call.k;
  auto at = [k](auto *p, int64_t row) { return p ? p + row * k : nullptr; };
  for (int64_t i = first; i < last; ++i) {
    float *sum = at(static_cast<float *>(call.sum), i);
    isa.norm({at(static_cast<const float *>(call.x), i),
              at(static_cast<const float *>(call.residual), i), sum ? sum : room(k),
              at(static_cast<float *>(call.y), i), static_cast<const float *>(call.weight),
              static_cast<const float *>(call.bias), k, call.eps, call.centred != 0});
  }
}

void half_rows(const Isa &isa, const sfx_norm_call &call, int64_t first, int64_t last) {
  const int64_t k = call.k;
  float *x = room(k), *other = x + k, *weight = x + 2 * k, *bias = x + 3 * k;
  if (call.weight) read(weight, call.weight, 0, k, call.type);
  if (call.bias) read(bias, call.bias, 0, k, call.type);
  const NormRow row{x, nullptr, nullptr, x, call.weight ? weight : nullptr,
                    call.bias ? bias : nullptr, k, call.eps, call.centred != 0};
  for (int64_t i = first; i < last; ++i) {
    read(x, call.x, i * k, k, call.type);
    if (call.residual) { // the norm is of the sum as it is rounded
      read(other, call.residual, i * k, k, call.type);
      for (int64_t j = 0; j < k; ++j) x[j] += other[j];
      write(call.sum, i * k, x, k, call.type);
      read(x, call.sum, i * k, k, call.type);
    }
    isa.norm(row);
    write(call.y, i * k, x, k, call.type);
  }
}

void all_rows(const Isa &isa, const sfx_norm_call &call) {
  sfx_call pool{};
  pool.threads = call.threads;
  pool.parallel = call.parallel;
  pool.pool = call.pool;
  const int64_t worth = std::max<int64_t>(1, call.m * call.k / kShare);
  const int64_t tasks = std::min({call.m, worth, std::max<int64_t>(1, call.threads)});
  parallel(pool, tasks, [&](int64_t t) {
    const auto some = call.type == SFX_F32 ? wide_rows : half_rows;
    some(isa, call, call.m * t / tasks, call.m * (t + 1) / tasks);
  });
}

const char *problem(const sfx_norm_call &call) {
  if (call.m < 0 || call.k < 0) return "m and k must not be negative";
  if (call.type < SFX_F32 || call.type > SFX_BF16) return "unknown type of x";
  if (call.m && call.k && (!call.x || !call.y)) return "x or y is null";
  if (call.residual && !call.sum && call.type != SFX_F32) return "sum is null";
  return nullptr;
}

} // namespace
} // namespace sfx

extern "C" int sfx_norm(const sfx_norm_call *call, char *error) {
  if (const char *why = sfx::problem(*call)) {
    std::snprintf(error, SFX_ERROR, "%s", why);
    return 1;
  }
  if (!call->m || !call->k) return 0;
  try {
    sfx::all_rows(sfx::isa(), *call);
  } catch (const std::bad_alloc &) {
    std::snprintf(error, SFX_ERROR, "out of memory");
    return 1;
  }
  return 0;
}

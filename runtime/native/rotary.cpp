// sfx_rotary: rows are shared out to threads.
#include <algorithm>
#include <cstdio>

#include "isa.h"
#include "threads.h"

namespace sfx {
namespace {

constexpr int64_t kShare = 1 << 15; // numbers that a thread is worth waking for

int64_t offset(const int64_t *stride, int64_t a, int64_t b, int64_t c) {
  return a * stride[0] + b * stride[1] + c * stride[2];
}

void some_rows(const Isa &isa, const sfx_rotary_call &call, int64_t first, int64_t last) {
  const int64_t *size = call.size;
  for (int64_t i = first; i < last; ++i) {
    const int64_t a = i / (size[1] * size[2]), b = i / size[2] % size[1], c = i % size[2];
    isa.rotate(call.x + offset(call.x_stride, a, b, c), call.cos + offset(call.cos_stride, a, b, c),
               call.sin + offset(call.sin_stride, a, b, c), call.y + offset(call.y_stride, a, b, c),
               call.half);
  }
}

} // namespace
} // namespace sfx

extern "C" int sfx_rotary(const sfx_rotary_call *call, char *error) {
  const int64_t *size = call->size, rows = size[0] * size[1] * size[2];
  if (std::min({size[0], size[1], size[2], call->half}) < 0) {
    std::snprintf(error, SFX_ERROR, "sizes must not be negative");
    return 1;
  }
  if (!rows || !call->half) return 0;
  sfx_call pool{};
  pool.threads = static_cast<int32_t>(call->threads);
  pool.parallel = call->parallel;
  pool.pool = call->pool;
  const int64_t worth = std::max<int64_t>(1, rows * call->half * 2 / sfx::kShare);
  const int64_t tasks = std::min({rows, worth, std::max<int64_t>(1, call->threads)});
  const sfx::Isa &isa = sfx::isa();
  sfx::parallel(pool, tasks, [&](int64_t t) {
    sfx::some_rows(isa, *call, rows * t / tasks, rows * (t + 1) / tasks);
  });
  return 0;
}

// sfx_add_branches: rows of a batch that each have a low-rank branch of their own. What follows one
// another and has one branch is a product; rows of others cost nothing.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "floats.h"
#include "threads.h"
#include "weight.h"

namespace sfx {
namespace {

struct Run { // rows [first, last), by branches[which]
  int64_t first, last;
  int32_t which;
};

const char *problem(const sfx_branch *branches, int32_t count, const int32_t *which, int64_t batch,
                    const sfx_call &call) {
  if (call.m < 0 || batch < 1 || call.m % batch) return "rows are no multiple of the batch";
  if (call.x_type < SFX_F32 || call.x_type > SFX_BF16) return "unknown type of x";
  for (int64_t i = 0; i < batch; ++i)
    if (which[i] < -1 || which[i] >= count) return "a row names a branch that is not there";
  for (int32_t i = 0; i < count; ++i) {
    const sfx_branch &b = branches[i];
    if (!b.down || !b.up || !b.scale) return "a branch needs down, up and scale";
    if (b.down->n != b.up->k) return "down and up differ in rank";
    if (b.down->k != call.x_stride) return "down has another k than x";
    if (b.up->n != call.y_stride) return "up has another n than y";
  }
  return nullptr;
}

// residual + ((x · downᵀ) ⊙ scale) · upᵀ over the rows of a run, in float32 up to the end.
int add(const sfx_branch &branch, const Run &run, const sfx_call &call, int32_t threads,
        char *error) {
  thread_local std::vector<float> low, wide, sum;
  const int64_t k = branch.down->k, n = branch.up->n, rank = branch.down->n;
  const int64_t rows = run.last - run.first, size = size_of(call.x_type);
  const char *x = static_cast<const char *>(call.x) + run.first * k * size;
  const char *before = static_cast<const char *>(call.residual) + run.first * n * size;
  char *y = static_cast<char *>(call.y) + run.first * n * size;
  const bool as_it_is = call.x_type == SFX_F32;
  low.resize(rows * rank);
  if (!as_it_is) {
    wide.resize(rows * k);
    sum.resize(rows * n);
    read(wide.data(), x, 0, rows * k, call.x_type);
    read(sum.data(), before, 0, rows * n, call.x_type);
  }
  sfx_call inner{};
  inner.m = rows;
  inner.threads = threads;
  inner.parallel = call.parallel;
  inner.pool = call.pool;
  inner.x = as_it_is ? x : reinterpret_cast<const char *>(wide.data());
  inner.x_stride = k;
  inner.y = low.data();
  inner.y_stride = rank;
  if (sfx_linear(branch.down, &inner, error)) return 1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < rank; ++j) low[r * rank + j] *= branch.scale[j];
  inner.x = low.data();
  inner.x_stride = rank;
  inner.y = as_it_is ? static_cast<void *>(y) : sum.data();
  inner.y_stride = n;
  inner.residual = as_it_is ? static_cast<const void *>(before) : sum.data();
  if (sfx_linear(branch.up, &inner, error)) return 1;
  if (!as_it_is) write(y, 0, sum.data(), rows * n, call.x_type);
  return 0;
}

// `add`, with no exception to leave a worker.
int guarded(const sfx_branch &branch, const Run &run, const sfx_call &call, int32_t threads,
            char *error) {
  try {
    return add(branch, run, call, threads, error);
  } catch (const std::bad_alloc &) {
    std::snprintf(error, SFX_ERROR, "out of memory");
    return 1;
  }
}

int add_all(const sfx_branch *branches, const int32_t *which, int64_t batch, const sfx_call &call,
            char *error) {
  thread_local std::vector<Run> kept;
  std::vector<Run> &runs = kept;
  runs.clear();
  const int64_t each = call.m / batch;
  for (int64_t i = 0; i < batch; ++i) {
    if (runs.empty() || runs.back().which != which[i])
      runs.push_back({i * each, i * each, which[i]});
    runs.back().last += each;
  }
  const int64_t count = static_cast<int64_t>(runs.size()), n = call.y_stride;
  const int64_t workers = count < call.threads ? 1 : count; // few runs share theirs out themselves
  std::atomic<int> failed{0};
  parallel(call, workers, [&](int64_t t) {
    for (int64_t i = count * t / workers; i < count * (t + 1) / workers; ++i) {
      const Run &run = runs[i];
      const int64_t size = size_of(call.x_type), from = run.first * n * size;
      if (run.which < 0)
        std::memcpy(static_cast<char *>(call.y) + from,
                    static_cast<const char *>(call.residual) + from,
                    (run.last - run.first) * n * size);
      else if (char why[SFX_ERROR];
               guarded(branches[run.which], run, call, workers == 1 ? call.threads : 1, why) &&
               !failed.exchange(1))
        std::memcpy(error, why, SFX_ERROR); // of the first one only: others fail at the same time
    }
  });
  return failed;
}

} // namespace
} // namespace sfx

extern "C" int sfx_add_branches(const sfx_branch *branches, int32_t count, const int32_t *which,
                                int64_t batch, const sfx_call *call, char *error) {
  if (const char *why = sfx::problem(branches, count, which, batch, *call)) {
    std::snprintf(error, SFX_ERROR, "%s", why);
    return 1;
  }
  try {
    return sfx::add_all(branches, which, batch, *call, error);
  } catch (const std::bad_alloc &) {
    std::snprintf(error, SFX_ERROR, "out of memory");
    return 1;
  }
}

// libgomp's two entry points, found in the process if torch (or anything else) loaded it: a second
// pool beside torch's would fight it for the cores. LLVM's and Intel's runtimes offer the same two.
#include "threads.h"

#include <dlfcn.h>

namespace sfx {
namespace {

using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
using ThreadNumber = int (*)();

struct OpenMp {
  GompParallel run = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  ThreadNumber me = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  ThreadNumber team = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  ThreadNumber nested = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
  bool complete() const { return run && me && team && nested; }
};

const OpenMp &openmp() {
  static const OpenMp found;
  return found;
}

struct Loop {
  sfx_body body;
  void *context;
  int64_t count;
};

void share(void *loop) {
  const Loop &l = *static_cast<Loop *>(loop);
  for (int64_t i = openmp().me(); i < l.count; i += openmp().team()) l.body(l.context, i);
}

} // namespace

bool has_openmp() { return openmp().complete(); }

void parallel_raw(const sfx_call &call, int64_t count, sfx_body body, void *context) {
  if (call.parallel) return call.parallel(call.pool, body, context, count);
  if (call.threads > 1 && has_openmp() && !openmp().nested()) {
    Loop loop{body, context, count};
    const int64_t team = count < call.threads ? count : call.threads;
    return openmp().run(share, &loop, static_cast<unsigned>(team), 0);
  }
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

} // namespace sfx

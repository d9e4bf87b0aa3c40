// Parallel loops on the pool that the process already has.
#pragma once

#include <cstdint>

#include "sparsefx.h"

namespace sfx {

// True when an OpenMP runtime is in the process (torch brings one) and loops can share it.
bool has_openmp();

// Runs body(i) for i in 0 … count-1; `call` says on which pool.
template <class Body> void parallel(const sfx_call &call, int64_t count, Body &&body);

void parallel_raw(const sfx_call &call, int64_t count, sfx_body body, void *context);

template <class Body> void parallel(const sfx_call &call, int64_t count, Body &&body) {
  if (count == 1) return body(int64_t(0));
  auto invoke = [](void *context, int64_t i) { (*static_cast<Body *>(context))(i); };
  parallel_raw(call, count, invoke, &body);
}

} // namespace sfx

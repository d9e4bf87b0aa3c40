// Values at scattered positions of a weight in memory: what a switch of sparse adapters changes.

#include <cstdint>

#include "sparsefx.h"

namespace {

constexpr int64_t kAhead = 32; // positions: their lines are on the way while others are written

template <typename T, bool Put>
void exchange(T *weight, T *values, const int64_t *positions, int64_t count) {
  const int64_t whole = count > kAhead ? count - kAhead : 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i < whole) __builtin_prefetch(weight + positions[i + kAhead], Put);
    const T old = weight[positions[i]];
    if (Put) weight[positions[i]] = values[i];
    values[i] = old;
  }
}

template <bool Put>
int run(void *weight, void *values, const int64_t *positions, int64_t count, int32_t size) {
  if (size == 4)
    exchange<uint32_t, Put>(static_cast<uint32_t *>(weight), static_cast<uint32_t *>(values),
                            positions, count);
  else if (size == 2)
    exchange<uint16_t, Put>(static_cast<uint16_t *>(weight), static_cast<uint16_t *>(values),
                            positions, count);
  else
    return 1;
  return 0;
}

} // namespace

extern "C" {

// values[i] and weight[positions[i]] change places; elements of `size` 2 or 4 bytes, else 1.
SFX_API int sfx_swap(void *weight, void *values, const int64_t *positions, int64_t count,
                     int32_t size) {
  return run<true>(weight, values, positions, count, size);
}

// values[i] = weight[positions[i]].
SFX_API int sfx_gather(void *weight, void *values, const int64_t *positions, int64_t count,
                       int32_t size) {
  return run<false>(weight, values, positions, count, size);
}
}

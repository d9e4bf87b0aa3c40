// Values at scattered positions of weights in memory: what a switch of sparse adapters changes.

#include <cstdint>

#include "sparsefx.h"

extern "C" {

// A sparse delta's share of one weight, `count` positions of elements of `size` 2 or 4 bytes.
typedef struct {
  void *weight, *values;
  const int32_t *positions;
  int64_t count, size;
} sfx_change;
}

namespace {

constexpr int64_t kAhead = 32; // positions: their lines are on the way while others are written

template <typename T, bool Put> void exchange(const sfx_change &change) {
  T *weight = static_cast<T *>(change.weight), *values = static_cast<T *>(change.values);
  const int32_t *positions = change.positions;
  const int64_t whole = change.count > kAhead ? change.count - kAhead : 0;
  for (int64_t i = 0; i < change.count; ++i) {
    if (i < whole) __builtin_prefetch(weight + positions[i + kAhead], Put);
    const T old = weight[positions[i]];
    if (Put) weight[positions[i]] = values[i];
    values[i] = old;
  }
}

template <bool Put> int run(const sfx_change *changes, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (changes[i].size != 2 && changes[i].size != 4) return 1;
  for (int64_t i = 0; i < count; ++i)
    changes[i].size == 4 ? exchange<uint32_t, Put>(changes[i])
                         : exchange<uint16_t, Put>(changes[i]);
  return 0;
}

} // namespace

extern "C" {

// values[i] and weight[positions[i]] change places, in each of `count` weights; 1, and nothing is
// changed, where an element has another size.
SFX_API int sfx_swap_all(const sfx_change *changes, int64_t count) {
  return run<true>(changes, count);
}

// values[i] = weight[positions[i]].
SFX_API int sfx_gather_all(const sfx_change *changes, int64_t count) {
  return run<false>(changes, count);
}
}

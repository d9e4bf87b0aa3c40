// From the buffers in which a weight is stored in a file to what sfx_pack takes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sparsefx.h"

namespace sfx {

// How a weight (n, k) is stored; `form` may come from a hostile file.
struct Form {
  int64_t n, k;
  std::vector<int64_t> layout; // {0}: dense; {1, n, m}: n of m; {2, rows, columns}: tiles
  std::vector<int64_t> codec;  // {0}: floats; {1, bits, group size or 0, symmetric}: integers
  int64_t a8_group;

  bool dense() const { return layout[0] == 0; }
  bool integers() const { return codec[0] == 1; }
  bool symmetric() const { return codec[3] != 0; }
};

struct Stored {
  const void *data;
  int64_t count; // elements
  int type;      // of an element: SFX_F32, SFX_F16, SFX_BF16, SFX_CODE for bytes; else -1
};

// A source that points into `mask`, `values`, `zero_points` and the stored buffers.
struct Unpacked {
  sfx_source source{};
  std::vector<uint8_t> mask, values, zero_points;
};

// Names of the buffers, in order. Throws std::invalid_argument where `form` is none.
std::vector<std::string> buffers(const Form &form);

// Every length is checked before anything is read; throws std::invalid_argument.
void unpack(const Form &form, const std::vector<Stored> &stored, Unpacked &out);

} // namespace sfx

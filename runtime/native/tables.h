// For every byte of mask, where its ones go: for sets without instructions to expand or compress.
// Positions of 128 and up are what byte shuffles leave out.
#pragma once

#include <cstdint>

namespace sfx {

struct BitTables {
  // Which successive value each bit takes, 128 where it is 0. Of two masks, low of the first plus
  // high of the second do so for 16 bits; hence low ends in how many it took.
  uint8_t low[256][16];
  uint8_t high[256][16];
  // The positions of the ones, side by side; 128 behind.
  uint8_t compress[256][8];
  uint8_t ones[256];

  constexpr BitTables() : low(), high(), compress(), ones() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int i = 0; i < 8; ++i) compress[mask][i] = 0x80;
      for (int i = 0; i < 8; ++i) {
        const bool one = mask >> i & 1;
        low[mask][i] = high[mask][8 + i] = one ? ones[mask] : uint8_t(0x80);
        if (one) compress[mask][ones[mask]++] = static_cast<uint8_t>(i);
      }
      for (int i = 8; i < 16; ++i) low[mask][i] = ones[mask];
    }
  }
};
alignas(64) static constexpr BitTables kBitTables;

} // namespace sfx

// Checks of floats.h and of the activations on their own; those of norms are in norms.h.
#pragma once

#include <cstring>

#include "../../runtime/native/floats.h"
#include "../../runtime/native/isa.h"
#include "norms.h"
#include "reference.h"

// float16 and bfloat16 both ways: every pattern, and the numbers around where rounding changes.
inline void check_floats() {
  for (int type : {SFX_F16, SFX_BF16}) {
    auto narrow = [&](float v) { return type == SFX_F16 ? sfx::to_half(v) : sfx::to_bfloat(v); };
    auto wide = [&](uint16_t b) {
      return type == SFX_F16 ? sfx::from_half(b) : sfx::from_bfloat(b);
    };
    bool read = true, written = true;
    for (int i = 0; i < 1 << 16; ++i) {
      const uint16_t bits = static_cast<uint16_t>(i);
      const double v = widen(bits, type);
      read = read && (std::isnan(v) ? std::isnan(wide(bits)) : wide(bits) == v);
      const double before = widen(static_cast<uint16_t>(i - 1), type);
      const double next = widen(static_cast<uint16_t>(i + 1), type);
      const double beyond = std::isinf(next) ? 2 * v - before : next;
      const float half = static_cast<float>(std::isfinite(v) ? (v + beyond) / 2 : v);
      for (float f : {static_cast<float>(v), half, std::nextafter(half, INFINITY),
                      std::nextafter(half, -INFINITY)})
        written = written && narrow(f) == narrowed(f, type);
    }
    const string name = type == SFX_F16 ? "float16" : "bfloat16";
    expect(read, name + " to float32");
    expect(written, "float32 to " + name);
  }
}

// The functions of an epilogue on their own, more closely than products can be held to.
inline void check_activations(const string &name_of_set) {
  char error[SFX_ERROR];
  sfx_set_isa(name_of_set.c_str(), error);
  const sfx::Isa &isa = sfx::isa();
  const string set = " in " + name_of_set;
  for (int activation : {SFX_RELU, SFX_SILU, SFX_GELU, SFX_GELU_TANH}) {
    double worst = 0;
    for (float v = -12; v <= 12; v += 0x1p-6f) {
      float got = v;
      isa.activate(&got, 1, activation);
      const double far = std::abs(got - activated(v, activation));
      worst = std::max(worst, far / (kU * std::abs(v) + 1e-30));
    }
    const string name = "activation " + std::to_string(activation) + set;
    expect(worst <= (activation == SFX_RELU ? 0 : 8), name + ": " + std::to_string(worst));
    float nan = NAN;
    isa.activate(&nan, 1, activation);
    expect(std::isnan(nan), name + " of NaN");
    // Many at once take vectors, the last ones do not: all are what each is alone.
    std::vector<float> many, alone;
    for (int i = 0; i < 45; ++i) many.push_back(static_cast<float>(i - 22) * 1.7f);
    alone = many;
    isa.activate(many.data(), static_cast<int64_t>(many.size()), activation);
    for (float &v : alone) isa.activate(&v, 1, activation);
    expect(!std::memcmp(many.data(), alone.data(), 4 * many.size()), name + " of many");
    float far = 1e30f, beyond = -1e30f;
    isa.activate(&far, 1, activation);
    isa.activate(&beyond, 1, activation);
    const bool none = activation == SFX_RELU || activation == SFX_GELU;
    expect(far == 1e30f && (none ? beyond == 0 : beyond <= 0), name + " far out");
  }
}

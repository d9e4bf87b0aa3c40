// The instruction sets of this build, best first, and the choice among them.
#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "threads.h"

namespace sfx {
namespace {

const Isa *const kIsas[] = {
#if defined(__x86_64__) && defined(__linux__)
    &kAmx,
#endif
#if defined(__x86_64__)
    &kAvx512,
#endif
#if defined(SFX_AVXVNNI)
    &kAvxVnni,
#endif
#if defined(__x86_64__)
    &kAvx2,
#endif
#if defined(__aarch64__)
    &kNeon,
#endif
    &kPortable,
};

std::atomic<const Isa *> chosen{nullptr};

const Isa *find(const char *name) {
  const bool any = !name || !*name || !std::strcmp(name, "auto");
  for (const Isa *isa : kIsas)
    if (isa->runs_here() && (any || !std::strcmp(name, isa->name))) return isa;
  return nullptr;
}

} // namespace

const Isa &isa() {
  const Isa *now = chosen.load(std::memory_order_acquire);
  if (!now) chosen.store(now = find("auto"), std::memory_order_release);
  return *now;
}

} // namespace sfx

extern "C" {

int32_t sfx_abi(void) { return SFX_ABI; }
const char *sfx_isa(void) { return sfx::isa().name; }
const char *sfx_threading(void) { return sfx::has_openmp() ? "openmp" : "serial"; }

const char *sfx_isas(void) {
  static const std::string names = [] {
    std::string out;
    for (const sfx::Isa *isa : sfx::kIsas)
      if (isa->runs_here()) out += (out.empty() ? "" : " ") + std::string(isa->name);
    return out;
  }();
  return names.c_str();
}

int sfx_set_isa(const char *name, char *error) {
  const sfx::Isa *isa = sfx::find(name);
  if (!isa) {
    std::snprintf(error, SFX_ERROR, "this machine runs %s, not '%s'", sfx_isas(), name);
    return 1;
  }
  sfx::chosen.store(isa, std::memory_order_release);
  return 0;
}
}

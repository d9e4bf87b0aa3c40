// Plain C++: every machine runs it, and what the other sets compute must agree with it.
#include "weight.h"

#define SFX_ISA portable
#include "vec_portable.h"
#include "multiply.h"
#include "activate.h"
#include "norm.h"

namespace sfx {
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "lanes are taken apart in this order");
static bool runs_here() { return true; }
const Isa kPortable = {"portable",         runs_here,         no_slices, nullptr,
                       portable::quantize, portable::multiply, portable::activate,
                       portable::norm, portable::rotate};
} // namespace sfx

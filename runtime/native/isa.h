// Which instruction set is in use.
#pragma once

#include "weight.h"

namespace sfx {
const Isa &isa();
}

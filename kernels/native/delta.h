// Differences of bfloat16 bits in 8 bits each; _native.pyi says what the functions promise.
#pragma once

#include <nanobind/nanobind.h>

namespace vpo {

void bind_delta(nanobind::module_& m);

}  // namespace vpo

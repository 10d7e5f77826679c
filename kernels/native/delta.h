// Binding of ordered_delta's functions; _native.pyi says what they promise.
#pragma once

#include <nanobind/nanobind.h>

namespace vpo {

void bind_delta(nanobind::module_& m);

}  // namespace vpo

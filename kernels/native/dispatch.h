// Which kernels run, and on how many threads.
#pragma once

#include <cstdint>
#include <string>

#include "views.h"

namespace vpo {

// Throws std::invalid_argument for an instruction set that this processor has not.
const Kernels& kernels_for(const std::string& instruction_set);

// At most `threads`, fewer where there are few elements.
int useful_threads(std::int64_t elements, int threads);

}  // namespace vpo

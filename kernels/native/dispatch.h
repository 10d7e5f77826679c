// Choice of the kernels and of the number of threads.
#pragma once

#include <cstdint>
#include <string>

#include "views.h"

namespace vpo {

// Returns the kernels of an instruction set. Throws std::invalid_argument if this processor does not have it.
const Kernels& kernels_for(const std::string& instruction_set);

// Returns how many threads to use: at most `threads`, fewer where there are few elements.
int useful_threads(std::int64_t elements, int threads);

}  // namespace vpo

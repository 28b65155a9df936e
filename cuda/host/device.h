// Facts about the current device. The runtime caches them: a query costs well under 1 us.
#pragma once

#include <cuda_runtime_api.h>

namespace jaxkern {

cudaError_t multiprocessor_count(int* count);

}  // namespace jaxkern

// Facts about the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace jaxkern {

cudaError_t multiprocessor_count(int* count);

}  // namespace jaxkern

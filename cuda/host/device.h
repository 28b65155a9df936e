// Facts about the current device. The runtime caches attributes: a query costs well under 1 us.
#pragma once

#include <cuda_runtime_api.h>

namespace jaxkern {

struct DeviceInfo {
  int multiprocessors;
  int l2_bytes;
};

cudaError_t current_device(DeviceInfo* info);

}  // namespace jaxkern

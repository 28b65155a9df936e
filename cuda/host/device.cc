#include "cuda/host/device.h"

namespace jaxkern {

cudaError_t multiprocessor_count(int* count) {
  int device;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace jaxkern

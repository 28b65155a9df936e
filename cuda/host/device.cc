#include "cuda/host/device.h"

namespace jaxkern {

cudaError_t current_device(DeviceInfo* info) {
  int device;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error =
          cudaDeviceGetAttribute(&info->multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
    return error;
  }
  return cudaDeviceGetAttribute(&info->l2_bytes, cudaDevAttrL2CacheSize, device);
}

}  // namespace jaxkern

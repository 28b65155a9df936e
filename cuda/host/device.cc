#include "cuda/host/device.h"

namespace jaxkern {

cudaError_t current_device(DeviceInfo* info) {
  int device;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&info->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&info->l2_bytes, cudaDevAttrL2CacheSize, device);
}

}  // namespace jaxkern

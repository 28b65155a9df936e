// How launchers start kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jaxkern {

// Enqueues `blocks` blocks along x. Returns the error of this launch and of nobody else's, which
// cudaGetLastError would not tell apart.
template <typename... KernelArgs, typename... Args>
cudaError_t launch(void (*kernel)(KernelArgs...), int64_t blocks, dim3 threads, int shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  constexpr int kDefaultSharedBytes = 48 << 10;  // more must be asked for
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace jaxkern

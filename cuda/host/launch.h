// How launchers start kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jaxkern {

// Enqueues `blocks` blocks along x, in clusters of `cluster`, or of what the kernel is declared
// with if that is 0. Returns the error of this launch and of nobody else's, which cudaGetLastError
// would not tell apart.
template <typename... KernelArgs, typename... Args>
cudaError_t launch_clusters(void (*kernel)(KernelArgs...), int64_t blocks, int cluster,
                            dim3 threads, int shared_bytes, cudaStream_t stream,
                            const Args&... args) {
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
  cudaLaunchAttribute clusters = {};
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &clusters;
  config.numAttrs = cluster > 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename... KernelArgs, typename... Args>
cudaError_t launch(void (*kernel)(KernelArgs...), int64_t blocks, dim3 threads, int shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  return launch_clusters(kernel, blocks, 0, threads, shared_bytes, stream, args...);
}

}  // namespace jaxkern

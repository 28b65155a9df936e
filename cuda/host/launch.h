// How launchers start kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jaxkern {

// Blocks along x, in clusters of `cluster`, or of what the kernel is declared with if that is 0.
struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute clusters = {};

  LaunchConfig(int64_t blocks, int cluster, dim3 threads, int shared_bytes, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = &clusters;
    config.numAttrs = cluster > 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;  // `config` points to `clusters`
};

// Lets the kernel have as much shared memory as that.
template <class Kernel>
cudaError_t allow_shared_bytes(Kernel kernel, int shared_bytes) {
  constexpr int kDefaultSharedBytes = 32 << 10;  // 48 KB less up to 16 KB of static memory
  if (shared_bytes <= kDefaultSharedBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

// Enqueues a kernel on a LaunchConfig of these arguments. Returns the error of this launch and of
// nobody else's, which cudaGetLastError would not tell apart.
template <typename... KernelArgs, typename... Args>
cudaError_t launch_clusters(void (*kernel)(KernelArgs...), int64_t blocks, int cluster,
                            dim3 threads, int shared_bytes, cudaStream_t stream,
                            const Args&... args) {
  if (cudaError_t error = allow_shared_bytes(kernel, shared_bytes)) return error;
  const LaunchConfig launch(blocks, cluster, threads, shared_bytes, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, args...);
}

// How many clusters of `cluster` blocks the GPU has room for; 0 where it does not say.
template <typename... KernelArgs>
int resident_clusters(void (*kernel)(KernelArgs...), int cluster, dim3 threads, int shared_bytes) {
  const LaunchConfig one(cluster, cluster, threads, shared_bytes, nullptr);
  int count = 0;
  if (allow_shared_bytes(kernel, shared_bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&count, kernel, &one.config) != cudaSuccess) {
    return 0;
  }
  return count;
}

template <typename... KernelArgs, typename... Args>
cudaError_t launch(void (*kernel)(KernelArgs...), int64_t blocks, dim3 threads, int shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  return launch_clusters(kernel, blocks, 0, threads, shared_bytes, stream, args...);
}

}  // namespace jaxkern

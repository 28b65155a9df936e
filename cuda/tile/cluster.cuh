// Clusters: blocks that run at the same time and reach each other's shared memory.
#pragma once

#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/ptx/copy.cuh"
#include "cuda/tile/reg.cuh"

namespace jaxkern::tile {

// Runs of kBlocks_ blocks along x. The kernel is declared with __cluster_dims__(kBlocks_, 1, 1).
template <int kBlocks_>
struct Cluster {
  static constexpr int kBlocks = kBlocks_;
  static_assert(kBlocks >= 1 && kBlocks <= 8, "larger clusters are not portable");
  static constexpr uint16_t kAll = (1 << kBlocks) - 1;  // one bit a block

  __device__ __forceinline__ static int rank() { return blockIdx.x % kBlocks; }
  __device__ __forceinline__ static int index() { return blockIdx.x / kBlocks; }
  __device__ __forceinline__ static int count() { return gridDim.x / kBlocks; }

  // Waits for all threads of the cluster that have not exited. Once before a block reaches into
  // another, which may not have started yet; once before any exits, as others may still reach it.
  __device__ __forceinline__ static void sync() {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }

  // One arrival for the calling warp at this barrier of every block.
  __device__ __forceinline__ static void arrive_warp(Barrier& barrier) {
    if constexpr (kBlocks == 1) {
      barrier.arrive_warp();
    } else {
      __syncwarp();
      const int lane = threadIdx.x % kWarpSize;
      if (lane < kBlocks) {
        ptx::mbarrier_arrive_cluster(ptx::cluster_address(&barrier.word, lane));
      }
    }
  }

  // Copies a span of this block's shared memory to where block `to_rank` has `to`, and completes on
  // `barrier` there, which must expect the bytes. One thread calls it, after tma::fence_writes().
  __device__ __forceinline__ static void copy(void* to, const void* from, int bytes,
                                              Barrier& barrier, int to_rank) {
    ptx::bulk_copy_cluster(ptx::cluster_address(to, to_rank), from, bytes,
                           ptx::cluster_address(&barrier.word, to_rank));
  }
};

// x += what store_fragments() left at `y` in block `rank` of the cluster, by one warpgroup; in
// columns from `first` on, up to `end`, multiples of 8.
template <int kCols>
__device__ __forceinline__ void add_fragments_of(RegisterTile<float, 64, kCols>& x, const float* y,
                                                 int rank, int first = 0, int end = kCols) {
  const uint32_t from =
      ptx::cluster_address(y, rank) + 16 * static_cast<uint32_t>(threadIdx.x % kWarpgroupSize);
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    if (8 * j < first || 8 * j >= end) continue;
    const float4 d = ptx::load_cluster(from + 16 * kWarpgroupSize * j);
    x.data[4 * j] += d.x;
    x.data[4 * j + 1] += d.y;
    x.data[4 * j + 2] += d.z;
    x.data[4 * j + 3] += d.w;
  }
}

}  // namespace jaxkern::tile

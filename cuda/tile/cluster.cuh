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

// The start of a cluster whose size is a launch parameter: waits for all its threads, after which
// every block finds the barriers of the others, initialised before fence_mbarrier_init(). That
// fence is the release; what else threads have written this does not publish. NOTE: not for a
// cluster's end. Nothing would order it after arrivals on their way to a block, which must be there
// to get them: that block waits for them.
__device__ __forceinline__ void start_cluster() {
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
}

// One arrival at the barrier that block `rank` of the cluster has at the same place.
__device__ __forceinline__ void arrive_at(Barrier& barrier, int rank) {
  ptx::mbarrier_arrive_cluster(ptx::cluster_address(&barrier.word, rank));
}

// What store_fragments() would write of kCount columns of x, from `first` on, multiples of 8: sent
// to where block `rank` has `y`. The bytes complete on `barrier` there, which must expect them.
// Neither block needs another barrier for what it waits for there.
template <int kCount, int kCols>
__device__ __forceinline__ void send_fragments(float* y, const RegisterTile<float, 64, kCols>& x,
                                               int first, Barrier& barrier, int rank) {
  const uint32_t to =
      ptx::cluster_address(y, rank) + 16 * static_cast<uint32_t>(threadIdx.x % kWarpgroupSize);
  const uint32_t done = ptx::cluster_address(&barrier.word, rank);
#pragma unroll
  for (int j = 0; j < kCount / 8; ++j) {
    const float* d = x.data + first / 2 + 4 * j;
    ptx::store_cluster_async(to + 16 * kWarpgroupSize * j, d[0], d[1], d[2], d[3], done);
  }
}

// x += that, when it has come, in the same columns.
template <int kCount, int kCols>
__device__ __forceinline__ void add_fragments_at(RegisterTile<float, 64, kCols>& x, int first,
                                                 const float* y) {
  const float4* from = reinterpret_cast<const float4*>(y) + threadIdx.x % kWarpgroupSize;
#pragma unroll
  for (int j = 0; j < kCount / 8; ++j) {
    const float4 d = from[j * kWarpgroupSize];
    float* to = x.data + first / 2 + 4 * j;
    to[0] += d.x;
    to[1] += d.y;
    to[2] += d.z;
    to[3] += d.w;
  }
}

}  // namespace jaxkern::tile

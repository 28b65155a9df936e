// Thread block clusters: blocks that run at the same time and reach one another's shared memory.
// A barrier or tile of another block is named by one's own at the same place, and a rank.
//
// A block must not touch another's shared memory before both have passed a first sync(), nor leave
// before a last one.
#pragma once

#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/ptx/cluster.cuh"
#include "cuda/tile/tma.cuh"

namespace jaxkern::tile::cluster {

// All threads of all blocks of the cluster.
__device__ __forceinline__ void sync() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// One arrival for the calling warp at this barrier in each of the cluster's blocks.
template <int kBlocks>
__device__ __forceinline__ void arrive_warp(const Barrier& barrier) {
  __syncwarp();
  const uint32_t lane = threadIdx.x % kWarpSize;
  if (lane < kBlocks) ptx::mbarrier_arrive_cluster(ptx::map_shared(&barrier.word, lane));
}

// Copies a span of this block's shared memory to `to` of block `rank`, whose `barrier` must expect
// the bytes. One thread calls it, after fence_writes().
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, const Barrier& barrier,
                                     int rank) {
  ptx::bulk_copy_cluster(ptx::map_shared(to, rank), from, bytes,
                         ptx::map_shared(&barrier.word, rank));
}

// Loads block `rank`'s share of the tile's panels into all of the cluster's blocks. When each block
// has called it every block has the whole tile, and that is what its barrier must expect.
template <int kBlocks, class T, int kRows, int kCols>
__device__ __forceinline__ void load(SharedTile<T, kRows, kCols>& y, const CUtensorMap& x,
                                     tma::Coordinate at, Barrier& barrier, int rank) {
  using Tile = SharedTile<T, kRows, kCols>;
  constexpr int kShare = Tile::kPanels / kBlocks;
  static_assert(kShare * kBlocks == Tile::kPanels, "blocks share the panels evenly");
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int panel = rank * kShare + i;
    ptx::bulk_tensor_load_multicast(y.data + panel * Tile::kPanelCols * kRows, &x, &barrier.word,
                                    (1u << kBlocks) - 1, panel * Tile::kPanelCols, at.head, at.row,
                                    at.batch);
  }
}

}  // namespace jaxkern::tile::cluster

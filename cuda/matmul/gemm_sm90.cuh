// Matrix product on Hopper: D = A B, all row-major, 16-bit elements, summed in float32.
//
// Persistent clusters of blocks work through tiles of D. The blocks of a cluster lie below each
// other: each has rows of A of its own, and they bring each other the columns of B they share.
// docs/tile.md builds this kernel step by step.
#pragma once

#include "cuda/tile/tile.cuh"

namespace jaxkern {

template <class T_, int kBlockN_, int kStages_, int kBlocks>
struct Gemm {
  using T = T_;
  using Cluster = tile::Cluster<kBlocks>;
  using Corner = tile::tma::Corner;
  static constexpr int kConsumers = 2;
  static constexpr int kBlockM = 64 * kConsumers, kBlockN = kBlockN_, kBlockK = 64;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  using TileA = tile::SharedTile<T, kBlockM, kBlockK>;  // (kBlockM, kBlockK)
  using TileB = tile::SharedTile<T, kBlockK, kBlockN>;  // (kBlockK, kBlockN)
  using TileD = tile::SharedTile<T, 64, 64>;            // a piece on its way out

  struct Storage {
    TileA a[kStages];
    TileB b[kStages];
    TileD d[kConsumers][2];
    tile::Ring<kStages> ring;
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");

  struct Params {
    CUtensorMap a, b, d;      // boxes: one panel of a tile
    tile::MatrixOrder order;  // of a cluster's tiles: kBlockM * kBlocks rows, kBlockN columns
    int K;
  };

  // Where this block's part of a cluster's tile begins in D.
  __device__ __forceinline__ static Corner corner(const Params& p, int index) {
    const auto at = p.order.at(index);
    return {(at.row * kBlocks + Cluster::rank()) * kBlockM, at.col * kBlockN};
  }

  __device__ __forceinline__ static void load(const Params& p, Storage& shared) {
    tile::Slot<kStages> slot;
    for (int index = Cluster::index(); index < p.order.count(); index += Cluster::count()) {
      const auto at = corner(p, index);
      for (int k = 0; k < p.K; k += kBlockK, slot.advance()) {
        slot.wait_empty(shared.ring);
        auto& full = shared.ring.full[slot.stage()];
        full.arrive_expect(TileA::kBytes + TileB::kBytes);
        tile::tma::load(shared.a[slot.stage()], p.a, Corner{at.row, k}, full);
        tile::tma::load_multicast<Cluster>(shared.b[slot.stage()], p.b, Corner{k, at.col}, full);
      }
    }
  }

  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared, int consumer) {
    tile::Slot<kStages> slot;
    tile::RegisterTile<float, 64, kBlockN> sum;  // rows 64 * consumer and on of the tile
    for (int index = Cluster::index(); index < p.order.count(); index += Cluster::count()) {
      for (int k = 0; k < p.K; k += kBlockK, slot.advance()) {
        slot.wait_full(shared.ring);
        const auto a = tile::k_major<64>(shared.a[slot.stage()], 64 * consumer);
        const auto b = tile::mn_major<kBlockN>(shared.b[slot.stage()]);
        tile::mma_fence();
        tile::mma(sum, a, b, k > 0);
        tile::mma_commit();
        tile::mma_wait<1>();  // the product before this one
        if (k > 0) Cluster::arrive_warp(shared.ring.empty[slot.previous().stage()]);
      }
      tile::mma_wait<0>(sum);
      Cluster::arrive_warp(shared.ring.empty[slot.previous().stage()]);
      store(p, shared.d[consumer], corner(p, index), sum, consumer);
    }
    if (threadIdx.x % tile::kWarpgroupSize == 0) tile::tma::wait_stores_read();
  }

  // Rounds 64 x 64 pieces and sends them out through two buffers; the last two are still on their
  // way when the next tile's products begin.
  __device__ __forceinline__ static void store(const Params& p, TileD (&d)[2], Corner at,
                                               const tile::RegisterTile<float, 64, kBlockN>& sum,
                                               int consumer) {
    const bool leader = threadIdx.x % tile::kWarpgroupSize == 0;
    const auto sync = [&] { tile::ptx::named_barrier_sync(1 + consumer, tile::kWarpgroupSize); };
#pragma unroll
    for (int piece = 0; piece < kBlockN / 64; ++piece) {
      tile::RegisterTile<T, 64, 64> rounded;
      tile::convert(rounded, sum, 64 * piece);
      if (leader) tile::tma::wait_stores_read<1>();
      sync();  // the buffer is free
      tile::store(d[piece % 2], 0, rounded);
      tile::tma::fence_writes();
      sync();  // and full
      if (leader) {
        tile::tma::store(p.d, Corner{at.row + 64 * consumer, at.col + 64 * piece}, d[piece % 2]);
      }
    }
  }
};

template <class Gemm>
__global__ void __cluster_dims__(Gemm::Cluster::kBlocks, 1, 1) __launch_bounds__(Gemm::kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ typename Gemm::Params p) {
  auto& shared = tile::shared_storage<typename Gemm::Storage>();
  const int warpgroup = threadIdx.x / tile::kWarpgroupSize;

  if (threadIdx.x == 0) {
    shared.ring.init(1, 4 * Gemm::kConsumers * Gemm::Cluster::kBlocks);  // warps of the cluster
    tile::ptx::fence_mbarrier_init();
  }
  Gemm::Cluster::sync();

  if (warpgroup == 0) {
    tile::ptx::setmaxnreg_decrease<Gemm::kProducerRegisters>();
    if (threadIdx.x == 0) Gemm::load(p, shared);
  } else {
    tile::ptx::setmaxnreg_increase<Gemm::kConsumerRegisters>();
    Gemm::multiply(p, shared, warpgroup - 1);
  }
  Gemm::Cluster::sync();
}

}  // namespace jaxkern

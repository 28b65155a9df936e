// Attention backward on Hopper for head dim 256: five products, a warpgroup to each gradient.
//
// A 64 x 256 accumulator fills half the registers of a warpgroup, so a block owns 64 keys of one
// key/value head, and its warpgroups differ in what they make. Per block of kBlockT queries
//   dV     S^T = K Q^T,  P^T = exp(S^T - lse),           dV += P^T dO   P^T to dK's warpgroup
//   dK     dP^T = V dO^T,  dS^T = P^T * (dP^T - delta),  dK += dS^T Q   dS^T to dQ's warpgroups
//   dQ     dQ = dS K                                                    added in global memory
// Each waits for its own products and overlaps nothing: the three run at different steps, joined by
// rings, and one's arithmetic falls in the others' products.
// Sums of dQ in the L2 cache are scarce, and blocks of few keys make many. So two blocks form a
// cluster of 128 keys: they exchange dS^T through distributed shared memory, and each makes half of
// dQ's columns over the keys of both. They also load each query and dO once for both (multicast).
//   producer    warp 0 loads keys, streams queries with lse and delta, and stores dK and dV; warp 1
//               loads values and streams dO.
// docs/attention.md draws it.
#pragma once

#include "cuda/attention/backward_work.cuh"
#include "cuda/attention/config.h"
#include "cuda/attention/softmax.cuh"
#include "cuda/tile/cluster.cuh"

namespace jaxkern {

template <class T_, int kHeadDim_, MaskKind kMask_, bool kSoftCap_>
struct AttentionBackwardWide
    : AttentionBackwardWork<kMask_, attention_bwd_wide_config(kSoftCap_).block_t, 8> {
  using T = T_;
  static constexpr AttentionBwdWideConfig kConfig = attention_bwd_wide_config(kSoftCap_);
  static constexpr int kTurnParts = 8;  // a warp of a block each
  using Base = AttentionBackwardWork<kMask_, kConfig.block_t, kTurnParts>;
  using typename Base::Params, typename Base::Work;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr MaskKind kMask = kMask_;
  static constexpr bool kSoftCap = kSoftCap_;
  static constexpr int kClusterBlocks = Base::kParts;
  using Cluster = tile::Cluster<kClusterBlocks>;
  static constexpr int kBlockS = 64;  // keys of a block
  static constexpr int kBlockT = kConfig.block_t;
  static constexpr int kPartH = kHeadDim / kClusterBlocks;  // columns of dQ that a block makes
  static constexpr int kPart = kBlockT * kPartH;
  static constexpr int kStages = 2;
  static constexpr int kConsumers = 3;
  static constexpr int kWarps = tile::kWarpgroupSize / tile::kWarpSize;
  static constexpr bool kTransposed = false;
  static_assert(kTurnParts == kClusterBlocks * kWarps);
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);
  static_assert(kConfig.producer_registers + kConfig.dvalue_registers + kConfig.dkey_registers +
                    kConfig.dquery_registers <=
                (1 + kConsumers) * tile::launch_registers(kThreads));
  static_assert(kBlockT == 64, "dQ has the 64 rows of a warpgroup");

  using QueryTile = tile::SharedTile<T, kBlockT, kHeadDim>;  // (kBlockT, H)
  using KeyTile = tile::SharedTile<T, kBlockS, kHeadDim>;    // (kBlockS, H)
  using KeyPartTile = tile::SharedTile<T, kBlockS, kPartH>;  // (kBlockS, kPartH)
  using ScoreTile = tile::SharedTile<T, kBlockS, kBlockT>;   // (kBlockS, kBlockT)
  enum Keys { kOwn, kPeers };                                // of this block and of the other

  // NOTE: two stages of dO would not fit. Queries have the longer life, from S of one step to dK
  // of the next; dO is read by two products that run side by side.
  struct Storage {
    KeyTile key, value;     // take dK and dV at the end
    KeyPartTile peers_key;  // the columns that this block's dQ needs
    QueryTile query[kStages], dout;
    ScoreTile dscores[kStages][2];                       // dS^T of Keys
    alignas(128) T weights[kStages][kBlockS * kBlockT];  // P^T in fragment order
    alignas(128) float lse_log2[kStages][kBlockT];
    alignas(128) float delta[kStages][kBlockT];
    tile::Ring<kStages> query_ring, weights_ring, dscores_ring;
    tile::Ring<1> dout_ring;
    tile::Barrier key_full, value_full, operands_read, gradients_full;
    Work work;  // the same for the blocks of a cluster
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");

  // The accumulator of dK or dV, in halves of the head dim.
  // NOTE: one instruction of N 256 has more operands than a thread has registers at launch, 128
  // with 512 threads, and ptxas refuses it although setmaxnreg gives more.
  struct Gradient {
    tile::RegisterTile<float, 64, kHeadDim / 2> half[2];  // (64, H)

    __device__ __forceinline__ void zero() {
#pragma unroll
      for (auto& x : half) tile::zero(x);
    }
    // Issues += a b, for b of all the head dim.
    __device__ __forceinline__ void add_product(const tile::RegisterTile<T, 64, kBlockT>& a,
                                                QueryTile& b) {
      tile::mma_fence(half[0], half[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        tile::mma(half[i], a, tile::mn_major<kHeadDim / 2>(b, i * kHeadDim / 2), true);
      }
    }
    // Rounds, and writes it for TMA to store.
    __device__ __forceinline__ void store(KeyTile& y) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        tile::RegisterTile<T, 64, kHeadDim / 2> rounded;
        tile::convert(rounded, half[i]);
        tile::store(y, 0, rounded, i * kHeadDim / 2);
      }
      tile::tma::fence_writes();
    }
  };

  __device__ __forceinline__ static int peer() { return Cluster::rank() ^ 1; }

  // Both blocks fill a stage of queries or dO, and all who read it, in both, must have left it.
  // P^T goes from thread to thread, each of which arrives for itself.
  __device__ __forceinline__ static void init(Storage& shared) {
    constexpr int kReaders = 2 * kWarps * kClusterBlocks;
    shared.query_ring.init(1, kReaders);
    shared.dout_ring.init(1, kReaders);
    shared.weights_ring.init(tile::kWarpgroupSize, tile::kWarpgroupSize);
    shared.dscores_ring.init(kWarps, kWarps * kClusterBlocks);
    shared.key_full.init(1);
    shared.value_full.init(1);
    shared.operands_read.init(kConsumers * kWarps);
    shared.gradients_full.init(2 * kWarps);
    tile::ptx::fence_mbarrier_init();
  }

  __device__ __forceinline__ static void load_keys_and_queries(const Params& p, Storage& shared) {
    const Work work = shared.work;
    shared.key_full.arrive_expect(KeyTile::kBytes + KeyPartTile::kBytes);
    tile::tma::load(shared.key, p.key, work.keys(Cluster::rank()), shared.key_full);
    tile::tma::load(shared.peers_key, p.key, work.keys(peer()), shared.key_full,
                    Cluster::rank() * kPartH);
    tile::Slot<kStages> slot;
    work.for_each(p, [&](int member, int block) {
      const int stage = slot.stage(), head = work.query_head(p, member);
      auto& full = shared.query_ring.full[stage];
      slot.wait_empty(shared.query_ring);
      full.arrive_expect(QueryTile::kBytes + sizeof(shared.lse_log2[0]) + sizeof(shared.delta[0]));
      tile::tma::load_multicast<Cluster>(shared.query[stage], p.query,
                                         work.queries(p, member, block), full);
      tile::tma::load(shared.lse_log2[stage], p.lse_log2, head, block * kBlockT, full);
      tile::tma::load(shared.delta[stage], p.delta, head, block * kBlockT, full);
      slot.advance();
    });
  }

  __device__ __forceinline__ static void load_values_and_dout(const Params& p, Storage& shared) {
    const Work work = shared.work;
    shared.value_full.arrive_expect(KeyTile::kBytes);
    tile::tma::load(shared.value, p.value, work.keys(Cluster::rank()), shared.value_full);
    tile::Slot<1> slot;
    work.for_each(p, [&](int member, int block) {
      auto& full = shared.dout_ring.full[0];
      slot.wait_empty(shared.dout_ring);
      full.arrive_expect(QueryTile::kBytes);
      tile::tma::load_multicast<Cluster>(shared.dout, p.dout, work.queries(p, member, block), full);
      slot.advance();
    });
  }

  __device__ __forceinline__ static void store_gradients(const Params& p, Storage& shared) {
    const Work work = shared.work;
    shared.gradients_full.wait(0);
    tile::tma::store(p.dkey, work.keys(Cluster::rank()), shared.key);
    tile::tma::store(p.dvalue, work.keys(Cluster::rank()), shared.value);
    tile::tma::wait_stores_read();
  }

  __device__ __forceinline__ static void make_dvalue(const Params& p, Storage& shared) {
    const Work& work = shared.work;
    Gradient dvalue;                                // (64, H)
    tile::RegisterTile<float, 64, kBlockT> scores;  // (64, kBlockT): S^T
    tile::RegisterTile<T, 64, kBlockT> weights;     // (64, kBlockT): P^T
    dvalue.zero();
    const auto key = tile::k_major<64>(shared.key);
    tile::Slot<kStages> slot;
    shared.key_full.wait(0);
    work.for_each(p, [&](int, int block) {
      const int stage = slot.stage();
      slot.wait_full(shared.query_ring);
      tile::mma_fence(scores);
      tile::mma(scores, key, tile::k_major<kBlockT>(shared.query[stage]), false);
      tile::mma_commit();
      tile::mma_wait<0>(scores);

      // P^T = 2^(S^T * scale_log2 - lse_log2)
      if constexpr (kSoftCap) cap_logits(scores, p.cap_factor);
      if (work.needs_mask(Cluster::rank(), block)) {
        const int key0 = work.keys(Cluster::rank()).row;
        p.mask.apply(scores, work.batch, key0, block * kBlockT);
      }
      exponentiate<kSoftCap>(scores, weights, shared.lse_log2[stage], p.scale_log2);
      Cluster::arrive_warp(shared.query_ring.empty[stage]);
      slot.wait_empty(shared.weights_ring);
      if constexpr (kSoftCap) {  // dS takes the slope of the cap too
        tile::RegisterTile<T, 64, kBlockT> factors;
        tile::convert(factors, scores);
        tile::store_fragments(shared.weights[stage], factors);
      } else {
        tile::store_fragments(shared.weights[stage], weights);
      }
      shared.weights_ring.full[stage].arrive();

      tile::Slot<1>{slot.count}.wait_full(shared.dout_ring);
      dvalue.add_product(weights, shared.dout);
      tile::mma_commit();
      tile::mma_wait<0>(dvalue.half[0], dvalue.half[1]);
      Cluster::arrive_warp(shared.dout_ring.empty[0]);
      slot.advance();
    });

    if (p.hidden_dout != nullptr) {
      const float* row = p.hidden_dout + int64_t{work.key_head(p)} * kHeadDim;
#pragma unroll
      for (int i = 0; i < 2; ++i) tile::add_row(dvalue.half[i], row + i * kHeadDim / 2);
    }
    shared.operands_read.arrive_warp();
    shared.operands_read.wait(0);
    dvalue.store(shared.value);
    shared.gradients_full.arrive_warp();
  }

  __device__ __forceinline__ static void make_dkey(const Params& p, Storage& shared) {
    const Work work = shared.work;
    Gradient dkey;                                        // (64, H)
    tile::RegisterTile<float, 64, kBlockT> dweights;      // (64, kBlockT): dP^T
    tile::RegisterTile<T, 64, kBlockT> weights, dscores;  // (64, kBlockT): P^T, dS^T
    dkey.zero();
    const auto value = tile::k_major<64>(shared.value);
    const int warp = threadIdx.x % tile::kWarpgroupSize / tile::kWarpSize;
    const bool leader = threadIdx.x % tile::kWarpSize == 0;

    tile::Slot<kStages> slot;
    shared.value_full.wait(0);
    work.for_each(p, [&](int, int) {
      const int stage = slot.stage();
      tile::Slot<1>{slot.count}.wait_full(shared.dout_ring);
      tile::mma_fence(dweights);
      tile::mma(dweights, value, tile::k_major<kBlockT>(shared.dout), false);
      tile::mma_commit();
      tile::mma_wait<0>(dweights);
      Cluster::arrive_warp(shared.dout_ring.empty[0]);

      slot.wait_full(shared.weights_ring);
      tile::load_fragments(weights, shared.weights[stage]);
      shared.weights_ring.empty[stage].arrive();
      slot.wait_full(shared.query_ring);
      multiply_centered(dweights, weights, shared.delta[stage]);
      tile::convert(dscores, dweights);

      // A warp's 16 rows are one span. It sends them to where the peer's dQ looks for them, and
      // expects as many from the warp that is its counterpart there.
      slot.wait_empty(shared.dscores_ring);
      auto& own = shared.dscores[stage][kOwn];
      auto& peers = shared.dscores[stage][kPeers];
      tile::store(own, 0, dscores);
      tile::tma::fence_writes();
      __syncwarp();
      if (leader) {
        constexpr int kBytes = ScoreTile::kBytes / kWarps;
        auto& full = shared.dscores_ring.full[stage];
        const int row = kBlockS / kWarps * warp;
        full.arrive_expect(kBytes);
        Cluster::copy(peers.chunk(row, 0), own.chunk(row, 0), kBytes, full, peer());
      }

      dkey.add_product(dscores, shared.query[stage]);
      tile::mma_commit();
      tile::mma_wait<0>(dkey.half[0], dkey.half[1]);
      Cluster::arrive_warp(shared.query_ring.empty[stage]);
      slot.advance();
    });

#pragma unroll
    for (auto& half : dkey.half) tile::scale(half, p.scale);
    shared.operands_read.arrive_warp();
    shared.operands_read.wait(0);
    dkey.store(shared.key);
    shared.gradients_full.arrive_warp();
  }

  __device__ __forceinline__ static void make_dquery(const Params& p, Storage& shared) {
    const Work work = shared.work;
    constexpr int kCols = kConfig.dquery_cols;
    tile::RegisterTile<float, 64, kCols> dquery;  // (kBlockT, kCols), kPartH / kCols times
    const bool leader = threadIdx.x % tile::kWarpSize == 0;
    const int part =
        Cluster::rank() * kWarps + threadIdx.x % tile::kWarpgroupSize / tile::kWarpSize;

    tile::Slot<kStages> slot;
    shared.key_full.wait(0);
    work.for_each(p, [&](int member, int block) {
      auto& dscores = shared.dscores[slot.stage()];
      const int64_t row = Base::accum_row(p, work, member, block);
      float* accum = p.dquery_accum + row * kHeadDim + Cluster::rank() * kPart;
      slot.wait_full(shared.dscores_ring);
#pragma unroll
      for (int col = 0; col < kPartH; col += kCols) {
        const int own_col = Cluster::rank() * kPartH + col;
        tile::mma_fence(dquery);
        tile::mma(dquery, tile::mn_major<64>(dscores[kOwn]),
                  tile::mn_major<kCols>(shared.key, own_col), false);
        tile::mma(dquery, tile::mn_major<64>(dscores[kPeers]),
                  tile::mn_major<kCols>(shared.peers_key, col), true);
        tile::mma_commit();
        tile::mma_wait<0>(dquery);
        if (col == 0 && p.turns != nullptr) {
          if (leader) Base::wait_turn(p, work, row, part);
          __syncwarp();
        }
        if (col + kCols == kPartH) {
          Cluster::arrive_warp(shared.dscores_ring.empty[slot.stage()]);
        }
        tile::add_fragments(accum + kBlockT * col, dquery);
      }
      if (p.turns != nullptr) {
        __threadfence();
        __syncwarp();
        if (leader) Base::pass_turn(p, row, part);
      }
      slot.advance();
    });
    shared.operands_read.arrive_warp();
  }
};

template <class Backward>
__global__ void __cluster_dims__(Backward::kClusterBlocks) __launch_bounds__(Backward::kThreads, 1)
    attention_bwd_wide_sm90_kernel(const __grid_constant__ typename Backward::Params p) {
  auto& shared = tile::shared_storage<typename Backward::Storage>();
  if (threadIdx.x == 0) {
    Backward::init(shared);
    shared.work = typename Backward::Work(p, p.order.at(Backward::Cluster::index()));
  }
  Backward::Cluster::sync();

  switch (threadIdx.x / tile::kWarpgroupSize) {
    case 0:
      tile::ptx::setmaxnreg_decrease<Backward::kConfig.producer_registers>();
      if (threadIdx.x == 0) {
        Backward::load_keys_and_queries(p, shared);
        Backward::store_gradients(p, shared);
      } else if (threadIdx.x == tile::kWarpSize) {
        Backward::load_values_and_dout(p, shared);
      }
      break;
    case 1:
      tile::ptx::setmaxnreg_increase<Backward::kConfig.dvalue_registers>();
      Backward::make_dvalue(p, shared);
      break;
    case 2:
      tile::ptx::setmaxnreg_increase<Backward::kConfig.dkey_registers>();
      Backward::make_dkey(p, shared);
      break;
    default:
      tile::ptx::setmaxnreg_decrease<Backward::kConfig.dquery_registers>();
      Backward::make_dquery(p, shared);
  }
  Backward::Cluster::sync();  // until here the other block reads and writes this one's shared
                              // memory
}

}  // namespace jaxkern

// Attention backward on Hopper: gradients of query, key and value in one pass, five products.
//
// A block owns 128 keys of one key/value head (two consumer warpgroups, 64 keys each) and walks
// over blocks of kBlockT queries of every query head in its group. Per query block a consumer does
//   S^T = K Q^T,  dP^T = V dO^T                                 keys are the rows
//   P^T = exp(S^T - lse),  dS^T = P^T * (dP^T - delta)          in registers
//   dV += P^T dO,  dK += dS^T Q                                 P^T, dS^T straight from registers
//   dQ  = dS K                                                  dS of both consumers, through
//   shared
// With keys as rows, P^T and dS^T are wgmma's A operand where they stand; only dS takes the way
// through shared memory, because dQ sums over all 128 keys. Each consumer makes the 64 x 64 part of
// dQ that panel `consumer` of dS (H 64) or of K (H 128) gives, and TMA adds it to a float32
// accumulator in global memory, in fragment order: nothing but the post-process kernel reads it.
//   producer    warp 0 loads keys and values, streams queries with their lse, and stores dK and dV;
//               warp 1 streams dO with delta; warps 2 and 3 add the two consumers' dQ.
// The order of products is FlashAttention-3's (Shah et al. 2024). docs/attention.md draws it.
#pragma once

#include "cuda/attention/config.h"
#include "cuda/attention/mask.cuh"
#include "cuda/attention/params.h"
#include "cuda/attention/softmax.cuh"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

template <class T_, int kHeadDim_, bool kCausal_>
struct AttentionBackward {
  using T = T_;
  static constexpr AttentionBwdConfig kConfig = attention_bwd_config(kHeadDim_);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kCausal = kCausal_;
  static constexpr int kConsumers = 2;
  static constexpr int kClusterBlocks = 1;
  static constexpr int kBlockS = 64 * kConsumers;
  static constexpr int kClusterS = kBlockS;
  static constexpr int kBlockT = kConfig.block_t;
  static constexpr int kStages = 2;
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);
  static constexpr int kPart = 64 * 64;  // dQ elements a consumer makes per query block
  static_assert(kBlockT * kHeadDim == kConsumers * kPart, "dQ is one 64 x 64 part per consumer");
  static_assert(kAttentionPadding % kBlockT == 0, "workspaces hold whole query blocks");

  using QueryTile = tile::SharedTile<T, kBlockT, kHeadDim>;  // (kBlockT, H)
  using KeyTile = tile::SharedTile<T, kBlockS, kHeadDim>;    // (kBlockS, H)
  using ScoreTile = tile::SharedTile<T, kBlockS, kBlockT>;   // (kBlockS, kBlockT)

  struct Storage {
    KeyTile key, value;  // take dK and dV at the end
    QueryTile query[kStages], dout[kStages];
    ScoreTile dscores[kStages];  // dS^T
    alignas(128) float dquery[kConsumers][kPart];
    alignas(128) float lse_log2[kStages][kBlockT];
    alignas(128) float delta[kStages][kBlockT];
    tile::Ring<kStages> query_ring, dout_ring;
    tile::Ring<1> dquery_ring[kConsumers];
    tile::Barrier key_value_full, gradients_full;
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");

  struct Params {
    CUtensorMap query, dout;               // boxes: one panel of kBlockT queries
    CUtensorMap key, value, dkey, dvalue;  // boxes: one panel of kBlockS keys
    CUtensorMap lse_log2, delta;           // boxes: kBlockT values of (B * N, Tp)
    float* dquery_accum;                   // (B, N, Tp / kBlockT, kConsumers, kPart)
    float scale, scale_log2;
    AttentionMask<kCausal> mask;
    tile::TileOrder order;
    int kv_heads, group, padded_T;  // K, N / K, Tp
  };

  // One block's work. Query blocks run from `first` to `last`, for each head of the group.
  struct Work {
    int key, head_of_all, first, last;  // head_of_all counts through batch and key/value heads

    __device__ __forceinline__ explicit Work(const Params& p) {
      const auto at = p.order.at(blockIdx.x);
      key = at.block * kBlockS;  // with a causal mask the first keys have the most queries
      head_of_all = at.head;
      first = min(p.mask.query_begin(key), p.mask.T) / kBlockT;
      last = tile::ceil_div(p.mask.T, kBlockT);
    }
    __device__ __forceinline__ tile::tma::Coordinate keys(const Params& p) const {
      return {head_of_all / p.kv_heads, key, head_of_all % p.kv_heads};
    }
    __device__ __forceinline__ tile::tma::Coordinate queries(const Params& p, int member,
                                                             int block) const {
      const int kv_head = head_of_all % p.kv_heads;
      return {head_of_all / p.kv_heads, block * kBlockT, kv_head * p.group + member};
    }
    // Counts through batch and query heads.
    __device__ __forceinline__ int query_head(const Params& p, int member) const {
      return head_of_all * p.group + member;
    }
  };

  enum NamedBarrier { kScores = 1 };

  __device__ __forceinline__ static void load_keys(const Params& p, Storage& shared) {
    const Work work(p);
    const auto at = work.keys(p);
    shared.key_value_full.arrive_expect(2 * KeyTile::kBytes);
    tile::tma::load(shared.key, p.key, at, shared.key_value_full);
    tile::tma::load(shared.value, p.value, at, shared.key_value_full);
  }

  __device__ __forceinline__ static void store_gradients(const Params& p, Storage& shared) {
    const Work work(p);
    const auto at = work.keys(p);
    shared.gradients_full.wait(0);
    tile::tma::store(p.dkey, at, shared.key);
    tile::tma::store(p.dvalue, at, shared.value);
    tile::tma::wait_stores_read();
  }

  // Streams query blocks of one operand (queries or dO) and their row statistics (lse or delta).
  __device__ __forceinline__ static void load_queries(const Params& p, const CUtensorMap& map,
                                                      const CUtensorMap& row_map,
                                                      tile::Ring<kStages>& ring,
                                                      QueryTile (&tiles)[kStages],
                                                      float (&rows)[kStages][kBlockT]) {
    const Work work(p);
    tile::Slot<kStages> slot;
    for (int member = 0; member < p.group; ++member) {
      for (int block = work.first; block < work.last; ++block, slot.advance()) {
        slot.wait_empty(ring);
        auto& full = ring.full[slot.stage()];
        full.arrive_expect(QueryTile::kBytes + sizeof(rows[0]));
        tile::tma::load(tiles[slot.stage()], map, work.queries(p, member, block), full);
        tile::tma::load(rows[slot.stage()], row_map, work.query_head(p, member), block * kBlockT,
                        full);
      }
    }
  }

  __device__ __forceinline__ static void add_dquery(const Params& p, Storage& shared,
                                                    int consumer) {
    const Work work(p);
    auto& ring = shared.dquery_ring[consumer];
    tile::Slot<1> slot;
    for (int member = 0; member < p.group; ++member) {
      for (int block = work.first; block < work.last; ++block, slot.advance()) {
        slot.wait_full(ring);
        const int64_t row = int64_t{work.query_head(p, member)} * p.padded_T + block * kBlockT;
        float* accum = p.dquery_accum + row * kHeadDim + consumer * kPart;
        tile::tma::add(accum, shared.dquery[consumer], kPart);
        tile::tma::wait_stores_read();
        ring.empty[0].arrive();
      }
    }
  }

  __device__ __forceinline__ static void consume(const Params& p, Storage& shared, int consumer) {
    const Work work(p);
    const int key0 = work.key + 64 * consumer;
    tile::RegisterTile<float, 64, kHeadDim> dkey, dvalue;     // (64, H)
    tile::RegisterTile<float, 64, kBlockT> scores, dweights;  // (64, kBlockT): S^T, dP^T
    tile::RegisterTile<T, 64, kBlockT> weights, dscores;      // (64, kBlockT): P^T, dS^T
    tile::RegisterTile<float, 64, 64> dquery;
    tile::zero(dkey);
    tile::zero(dvalue);
    shared.key_value_full.wait(0);
    const auto key = tile::k_major<64>(shared.key, 64 * consumer);
    const auto value = tile::k_major<64>(shared.value, 64 * consumer);
    // The first query block that sees all 64 keys.
    const int dense_query = key0 + 64 > p.mask.S ? p.mask.T : p.mask.dense_query_begin(key0 + 64);
    const int dense = min(tile::ceil_div(dense_query, kBlockT), work.last);

    tile::Slot<kStages> slot;
    const auto step = [&](int block) {
      auto& query_tile = shared.query[slot.stage()];
      auto& dout_tile = shared.dout[slot.stage()];
      auto& dscores_tile = shared.dscores[slot.stage()];

      slot.wait_full(shared.query_ring);
      tile::mma_fence(scores);
      tile::mma(scores, key, tile::k_major<kBlockT>(query_tile), false);
      tile::mma_commit();
      slot.wait_full(shared.dout_ring);
      tile::mma_fence(dweights);
      tile::mma(dweights, value, tile::k_major<kBlockT>(dout_tile), false);
      tile::mma_commit();

      // P^T = 2^(S^T * scale_log2 - lse_log2), while dP^T is multiplied.
      tile::mma_wait<1>(scores);
      if (block < dense) p.mask.apply_transposed(scores, key0, block * kBlockT);
      subtract_and_exponentiate(scores, shared.lse_log2[slot.stage()], p.scale_log2);
      tile::convert(weights, scores);
      tile::mma_fence(dvalue);
      tile::mma(dvalue, weights, tile::mn_major<kHeadDim>(dout_tile), true);
      tile::mma_commit();

      // dS^T = P^T * (dP^T - delta), while dV is multiplied.
      tile::mma_wait<1>(dweights);
      if constexpr (kConfig.exact_weights) {
        multiply_centered(dweights, scores, shared.delta[slot.stage()]);
      } else {
        multiply_centered(dweights, weights, shared.delta[slot.stage()]);
      }
      tile::convert(dscores, dweights);

      // Two buffers and one barrier a step: whoever writes a buffer again has passed the barrier of
      // the step between, which the other consumer reached after it had read the buffer.
      tile::store(dscores_tile, 64 * consumer, dscores);
      tile::tma::fence_writes();
      tile::ptx::named_barrier_sync(kScores, kConsumers * tile::kWarpgroupSize);

      tile::mma_fence(dquery);
      if constexpr (kHeadDim == 64) {
        tile::mma(dquery, tile::mn_major<64>(dscores_tile, 64 * consumer),
                  tile::mn_major<64>(shared.key), false);
      } else {
        tile::mma(dquery, tile::mn_major<64>(dscores_tile),
                  tile::mn_major<64>(shared.key, 64 * consumer), false);
      }
      tile::mma_commit();
      tile::mma_fence(dkey);
      tile::mma(dkey, dscores, tile::mn_major<kHeadDim>(query_tile), true);
      tile::mma_commit();

      tile::mma_wait<2>(dvalue);
      shared.dout_ring.empty[slot.stage()].arrive_warp();
      tile::mma_wait<1>(dquery);
      tile::Slot<1>{slot.count}.wait_empty(shared.dquery_ring[consumer]);
      tile::store_fragments(shared.dquery[consumer], dquery);
      tile::tma::fence_writes();
      shared.dquery_ring[consumer].full[0].arrive_warp();
      tile::mma_wait<0>(dkey);
      shared.query_ring.empty[slot.stage()].arrive_warp();
      slot.advance();
    };

    for (int member = 0; member < p.group; ++member) {
      for (int block = work.first; block < work.last; ++block) step(block);
    }

    tile::scale(dkey, p.scale);
    tile::RegisterTile<T, 64, kHeadDim> rounded;
    tile::ptx::named_barrier_sync(kScores, kConsumers * tile::kWarpgroupSize);  // K, V are read
    tile::convert(rounded, dkey);
    tile::store(shared.key, 64 * consumer, rounded);
    tile::convert(rounded, dvalue);
    tile::store(shared.value, 64 * consumer, rounded);
    tile::tma::fence_writes();
    shared.gradients_full.arrive_warp();
  }
};

template <class Backward>
__global__ void __launch_bounds__(Backward::kThreads, 1)
    attention_bwd_sm90_kernel(const __grid_constant__ typename Backward::Params p) {
  auto& shared = tile::shared_storage<typename Backward::Storage>();
  const int warpgroup = threadIdx.x / tile::kWarpgroupSize;

  if (threadIdx.x == 0) {
    constexpr int kWarps = 4;
    shared.query_ring.init(1, kWarps * Backward::kConsumers);
    shared.dout_ring.init(1, kWarps * Backward::kConsumers);
    for (auto& ring : shared.dquery_ring) ring.init(kWarps, 1);
    shared.key_value_full.init(1);
    shared.gradients_full.init(kWarps * Backward::kConsumers);
    tile::ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    tile::ptx::setmaxnreg_decrease<Backward::kConfig.producer_registers>();
    if (threadIdx.x == 0) {
      Backward::load_keys(p, shared);
      Backward::load_queries(p, p.query, p.lse_log2, shared.query_ring, shared.query,
                             shared.lse_log2);
      Backward::store_gradients(p, shared);
    } else if (threadIdx.x == tile::kWarpSize) {
      Backward::load_queries(p, p.dout, p.delta, shared.dout_ring, shared.dout, shared.delta);
    } else if (threadIdx.x % tile::kWarpSize == 0) {
      Backward::add_dquery(p, shared, threadIdx.x / tile::kWarpSize - 2);
    }
  } else {
    tile::ptx::setmaxnreg_increase<Backward::kConfig.consumer_registers>();
    Backward::consume(p, shared, warpgroup - 1);
  }
}

}  // namespace jaxkern

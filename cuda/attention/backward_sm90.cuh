// Attention backward on Hopper: gradients of query, key and value in one pass, five products.
//
// A block owns 128 keys of one key/value head (two consumer warpgroups, 64 keys each) and walks
// over blocks of kBlockT queries of every query head in its group. Per query block a consumer does
//   S^T = K Q^T,  dP^T = V dO^T                                 keys are the rows
//   P^T = exp(S^T - lse),  dS^T = P^T * (dP^T - delta)          in registers
//   dV += P^T dO,  dK += dS^T Q                                 P^T, dS^T straight from registers
//   dQ  = dS K                                                  dS of both consumers, from shared
// With keys as rows, P^T and dS^T are wgmma's A operand where they stand; only dS takes the way
// through shared memory, because dQ sums over all 128 keys. Each consumer makes the part of dQ that
// half of the queries (H 64) or of the head dim (H 128) gives, and TMA adds it to a float32
// accumulator in global memory, in fragment order: nothing but the post-process kernel reads it.
// Instructions have 64 rows, so 80 queries can only be columns: then it makes dQ^T = K^T dS^T.
//   producer    warp 0 loads keys and values, streams queries with their lse, and stores dK and dV;
//               warp 1 streams dO with delta; warps 2 and 3 add the two consumers' dQ.
// The order of products is FlashAttention-3's (Shah et al. 2024). docs/attention.md draws it.
#pragma once

#include <type_traits>

#include "cuda/attention/backward_work.cuh"
#include "cuda/attention/config.h"
#include "cuda/attention/softmax.cuh"

namespace jaxkern {

template <class T_, int kHeadDim_, MaskKind kMask_, bool kSoftCap_, bool kTall>
struct AttentionBackward
    : AttentionBackwardWork<kMask_, attention_bwd_config(kHeadDim_, kTall).block_t, 2> {
  using T = T_;
  static constexpr AttentionBwdConfig kConfig = attention_bwd_config(kHeadDim_, kTall);
  static constexpr int kTurnParts = 2;
  using Base = AttentionBackwardWork<kMask_, kConfig.block_t, kTurnParts>;
  using typename Base::Params, typename Base::Work;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr MaskKind kMask = kMask_;
  static constexpr bool kSoftCap = kSoftCap_;
  static constexpr int kConsumers = Base::kParts;
  static constexpr bool kTransposed = kConfig.transposed;
  static constexpr int kClusterBlocks = 1;
  static constexpr int kBlockS = Base::kWorkS;
  static constexpr int kBlockT = kConfig.block_t;
  static constexpr int kStages = 2;
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);
  static_assert(kConfig.producer_registers + kConsumers * kConfig.consumer_registers <=
                (1 + kConsumers) * tile::launch_registers(kThreads));
  static constexpr int kPart = kBlockT * kHeadDim / kConsumers;  // of dQ, made by a consumer
  static constexpr int kPartCols = kPart / 64;
  static constexpr int kRowSpan = tile::ceil_div(kBlockT, 32) * 32;  // TMA writes 128-byte aligned

  using QueryTile = tile::SharedTile<T, kBlockT, kHeadDim>;  // (kBlockT, H)
  using KeyTile = tile::SharedTile<T, kBlockS, kHeadDim>;    // (kBlockS, H)
  using ScoreTile = std::conditional_t<kTransposed, tile::SharedTile<T, kBlockT, kBlockS>,
                                       tile::SharedTile<T, kBlockS, kBlockT>>;

  struct Storage {
    KeyTile key, value;  // take dK and dV at the end
    QueryTile query[kStages], dout[kStages];
    ScoreTile dscores[kStages];  // dS if transposed, else dS^T
    alignas(128) float dquery[kConsumers][kPart];
    alignas(128) float lse_log2[kStages][kRowSpan];
    alignas(128) float delta[kStages][kRowSpan];
    tile::Ring<kStages> query_ring, dout_ring, dscores_ring;
    tile::Ring<1> dquery_ring[kConsumers];
    tile::Barrier key_value_full, gradients_full;
    Work work;
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");

  enum NamedBarrier { kScores = 1 };

  __device__ __forceinline__ static void load_keys(const Params& p, Storage& shared) {
    const auto at = shared.work.keys();
    shared.key_value_full.arrive_expect(2 * KeyTile::kBytes);
    tile::tma::load(shared.key, p.key, at, shared.key_value_full);
    tile::tma::load(shared.value, p.value, at, shared.key_value_full);
  }

  __device__ __forceinline__ static void store_gradients(const Params& p, Storage& shared) {
    const auto at = shared.work.keys();
    shared.gradients_full.wait(0);
    tile::tma::store(p.dkey, at, shared.key);
    tile::tma::store(p.dvalue, at, shared.value);
    tile::tma::wait_stores_read();
  }

  // Streams query blocks of one operand (queries or dO) and their row statistics (lse or delta).
  __device__ __forceinline__ static void load_queries(
      const Params& p, const Work& work, const CUtensorMap& map, const CUtensorMap& row_map,
      tile::Ring<kStages>& ring, QueryTile (&tiles)[kStages], float (&rows)[kStages][kRowSpan]) {
    tile::Slot<kStages> slot;
    work.for_each(p, [&](int member, int block) {
      slot.wait_empty(ring);
      auto& full = ring.full[slot.stage()];
      full.arrive_expect(QueryTile::kBytes + kBlockT * sizeof(float));
      tile::tma::load(tiles[slot.stage()], map, work.queries(p, member, block), full);
      tile::tma::load(rows[slot.stage()], row_map, work.query_head(p, member), block * kBlockT,
                      full);
      slot.advance();
    });
  }

  // Adds one consumer's parts of dQ.
  __device__ __forceinline__ static void add_dquery(const Params& p, Storage& shared,
                                                    int consumer) {
    const Work& work = shared.work;
    auto& ring = shared.dquery_ring[consumer];
    tile::Slot<1> slot;
    work.for_each(p, [&](int member, int block) {
      slot.wait_full(ring);
      const int64_t row = Base::accum_row(p, work, member, block);
      if (p.turns != nullptr) Base::wait_turn(p, work, row, consumer);
      tile::tma::add(p.dquery_accum + row * kHeadDim + consumer * kPart, shared.dquery[consumer],
                     kPart);
      tile::tma::wait_stores_read();
      ring.empty[0].arrive();
      if (p.turns != nullptr) {
        tile::tma::wait_stores();
        Base::pass_turn(p, row, consumer);
      }
      slot.advance();
    });
  }

  __device__ __forceinline__ static void consume(const Params& p, Storage& shared, int consumer) {
    const Work& work = shared.work;
    const int key0 = work.key + 64 * consumer;
    tile::RegisterTile<float, 64, kHeadDim> dkey, dvalue;     // (64, H)
    tile::RegisterTile<float, 64, kBlockT> scores, dweights;  // (64, kBlockT): S^T, dP^T
    tile::RegisterTile<T, 64, kBlockT> weights, dscores;      // (64, kBlockT): P^T, dS^T
    tile::RegisterTile<float, 64, kPartCols> dquery;          // (64, kPartCols) of dQ or dQ^T
    tile::zero(dkey);
    tile::zero(dvalue);
    shared.key_value_full.wait(0);
    const auto key = tile::k_major<64>(shared.key, 64 * consumer);
    const auto value = tile::k_major<64>(shared.value, 64 * consumer);
    tile::Slot<kStages> slot;

    // dQ of a block is made a step after its dS, when the other consumer has long stored its part:
    // nobody waits, and the two drift apart until one's softmax falls in the other's products. That
    // made head dim 64 4-7% faster than a barrier in every step.
    const auto issue_dquery = [&](tile::Slot<kStages> of) {
      auto& dscores_tile = shared.dscores[of.stage()];
      of.wait_full(shared.dscores_ring);
      tile::mma_fence(dquery);
      if constexpr (kTransposed) {
        tile::mma(dquery, tile::mn_major<64>(shared.key, 64 * consumer),
                  tile::k_major<kPartCols>(dscores_tile), false);
      } else if constexpr (kHeadDim == 64) {
        tile::mma(dquery, tile::mn_major<64>(dscores_tile, 64 * consumer),
                  tile::mn_major<64>(shared.key), false);
      } else {
        tile::mma(dquery, tile::mn_major<64>(dscores_tile),
                  tile::mn_major<64>(shared.key, 64 * consumer), false);
      }
      tile::mma_commit();
    };
    const auto store_dquery = [&](tile::Slot<kStages> of) {
      shared.dscores_ring.empty[of.stage()].arrive_warp();
      tile::Slot<1>{of.count}.wait_empty(shared.dquery_ring[consumer]);
      tile::store_fragments(shared.dquery[consumer], dquery);
      tile::tma::fence_writes();
      shared.dquery_ring[consumer].full[0].arrive_warp();
    };

    const auto step = [&](int block, auto is_first) {
      constexpr bool kFirst = decltype(is_first)::value;
      auto& query_tile = shared.query[slot.stage()];
      auto& dout_tile = shared.dout[slot.stage()];
      const bool masked = work.needs_mask(consumer, block);

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
      if constexpr (kSoftCap) cap_logits(scores, p.cap_factor);
      if (masked) p.mask.apply(scores, work.batch, key0, block * kBlockT);
      exponentiate<kSoftCap>(scores, weights, shared.lse_log2[slot.stage()], p.scale_log2);
      if constexpr (kSoftCap) tile::convert(dscores, scores);
      tile::mma_fence(dvalue);
      tile::mma(dvalue, weights, tile::mn_major<kHeadDim>(dout_tile), true);
      tile::mma_commit();

      // dS^T = P^T * (dP^T - delta), while dV is multiplied.
      tile::mma_wait<1>(dweights);
      const float* delta = shared.delta[slot.stage()];
      if constexpr (kSoftCap) {
        multiply_centered(dweights, dscores, delta);
      } else if constexpr (kConfig.exact_weights) {
        multiply_centered(dweights, scores, delta);
      } else {
        multiply_centered(dweights, weights, delta);
      }
      tile::convert(dscores, dweights);

      slot.wait_empty(shared.dscores_ring);
      if constexpr (kTransposed) {
        tile::store_transposed(shared.dscores[slot.stage()], dscores, 64 * consumer);
      } else {
        tile::store(shared.dscores[slot.stage()], 64 * consumer, dscores);
      }
      tile::tma::fence_writes();
      shared.dscores_ring.full[slot.stage()].arrive_warp();

      if constexpr (!kFirst) issue_dquery(slot.previous());
      tile::mma_fence(dkey);
      tile::mma(dkey, dscores, tile::mn_major<kHeadDim>(query_tile), true);
      tile::mma_commit();

      tile::mma_wait<kFirst ? 1 : 2>(dvalue);
      shared.dout_ring.empty[slot.stage()].arrive_warp();
      if constexpr (!kFirst) {
        tile::mma_wait<1>(dquery);
        store_dquery(slot.previous());
      }
      tile::mma_wait<0>(dkey);
      shared.query_ring.empty[slot.stage()].arrive_warp();
      slot.advance();
    };

    // With a soft cap it stays in shared memory: there are no registers to spare.
    using Range = typename Base::BlockRange;
    const std::conditional_t<kSoftCap, const Range&, Range> range = work.blocks;
    if (range.begin < range.end) {
      int member = 0, block = range.begin;
      const auto advance = [&] {
        if (++block == range.end) block = range.begin, ++member;
      };
      step(block, std::true_type{});
      for (advance(); member < p.group; advance()) step(block, std::false_type{});
      issue_dquery(slot.previous());
      tile::mma_wait<0>(dquery);
      store_dquery(slot.previous());
    }

    tile::scale(dkey, p.scale);
    if (p.hidden_dout != nullptr) {
      tile::add_row(dvalue, p.hidden_dout + int64_t{work.key_head(p)} * kHeadDim);
    }
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

  if (threadIdx.x == 0) {
    constexpr int kWarps = 4;
    shared.query_ring.init(1, kWarps * Backward::kConsumers);
    shared.dout_ring.init(1, kWarps * Backward::kConsumers);
    shared.dscores_ring.init(kWarps * Backward::kConsumers, kWarps * Backward::kConsumers);
    for (auto& ring : shared.dquery_ring) ring.init(kWarps, 1);
    shared.key_value_full.init(1);
    shared.gradients_full.init(kWarps * Backward::kConsumers);
    shared.work = typename Backward::Work(p, p.order.at(blockIdx.x));
    tile::ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (tile::warpgroup_index() == 0) {
    tile::ptx::setmaxnreg_decrease<Backward::kConfig.producer_registers>();
    if (threadIdx.x == 0) {
      Backward::load_keys(p, shared);
      Backward::load_queries(p, shared.work, p.query, p.lse_log2, shared.query_ring, shared.query,
                             shared.lse_log2);
      Backward::store_gradients(p, shared);
    } else if (threadIdx.x == tile::kWarpSize) {
      Backward::load_queries(p, shared.work, p.dout, p.delta, shared.dout_ring, shared.dout,
                             shared.delta);
    } else if (threadIdx.x % tile::kWarpSize == 0) {
      Backward::add_dquery(p, shared, threadIdx.x / tile::kWarpSize - 2);
    }
  } else {
    tile::ptx::setmaxnreg_increase<Backward::kConfig.consumer_registers>();
    Backward::consume(p, shared, tile::warpgroup_index() - 1);
  }
}

}  // namespace jaxkern

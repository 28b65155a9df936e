// Attention forward on Hopper: out = softmax(scale * query key^T) value, one pass over the keys.
//
// A persistent block works through tiles of kBlockT queries of one head. Its warpgroups have roles:
//   producer    warp 0 loads the query tile and streams key and value blocks into rings of stages,
//               warp 1 stores finished output tiles;
//   consumers   each own 64 query rows: S = Q K^T, online softmax, O += P V, with P in registers.
// A consumer issues S of the next block before O += P V of this one, so its softmax runs while the
// tensor cores multiply; consumers also take turns in issuing, so that one's softmax falls in the
// other's products. docs/attention.md draws the schedule.
// The two overlaps are FlashAttention-3's (Shah et al. 2024).
#pragma once

#include "cuda/attention/config.h"
#include "cuda/attention/mask.cuh"
#include "cuda/attention/params.h"
#include "cuda/attention/softmax.cuh"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

template <class T_, int kHeadDim_, bool kCausal_>
struct AttentionForward {
  using T = T_;
  static constexpr AttentionFwdConfig kConfig = attention_fwd_config(kHeadDim_, kCausal_);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kCausal = kCausal_;
  static constexpr int kConsumers = kConfig.consumers;
  static constexpr int kBlockT = 64 * kConsumers;
  static constexpr int kBlockS = kConfig.block_s;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kQueryStages = kConfig.query_stages;
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);

  using QueryTile = tile::SharedTile<T, kBlockT, kHeadDim>;  // (kBlockT, H)
  using KeyTile = tile::SharedTile<T, kBlockS, kHeadDim>;    // (kBlockS, H)

  struct Storage {
    QueryTile query[kQueryStages];  // a consumer's rows take its output once its last S is done
    KeyTile key[kStages];
    KeyTile value[kStages];
    tile::Ring<kQueryStages> query_ring;
    tile::Ring<kStages> key_ring;
    tile::Ring<kStages> value_ring;
    tile::Barrier out_full[kQueryStages];
    tile::TileQueue tiles;
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");

  struct Params {
    CUtensorMap query, key, value, out;  // boxes: one panel of a query, key, value, query tile
    float* lse;                          // (B, N, T)
    float scale_log2;
    AttentionMask<kCausal> mask;
    tile::TileOrder order;
    int* tile_counter;  // zero
    int heads, group;   // N, N / K
  };

  // One tile of work, the same for every role.
  struct Work {
    int row, head_of_all, key_blocks;  // head_of_all counts through batch and heads

    __device__ __forceinline__ Work(const Params& p, int index) {
      const auto at = p.order.at(index);
      const int block = kCausal ? p.order.blocks - 1 - at.block : at.block;  // longest first
      row = block * kBlockT;
      head_of_all = at.head;
      key_blocks = tile::ceil_div(p.mask.key_end(min(row + kBlockT, p.mask.T)), kBlockS);
    }
    __device__ __forceinline__ tile::tma::Coordinate query(const Params& p) const {
      return {head_of_all / p.heads, row, head_of_all % p.heads};
    }
    __device__ __forceinline__ tile::tma::Coordinate key(const Params& p, int block) const {
      return {head_of_all / p.heads, block * kBlockS, head_of_all % p.heads / p.group};
    }
  };

  enum NamedBarrier { kTurn = 1, kOutput = kTurn + kConsumers };

  __device__ __forceinline__ static void load(const Params& p, Storage& shared) {
    tile::Slot<kQueryStages> query;
    tile::Slot<kStages> key, value;
    tile::TileWriter tiles(p.tile_counter);
    for (int index = tiles.put(shared.tiles); index < p.order.count();
         index = tiles.put(shared.tiles)) {
      const Work work(p, index);
      tiles.draw();
      const auto load_key = [&](int block) {
        key.wait_empty(shared.key_ring);
        shared.key_ring.full[key.stage()].arrive_expect(KeyTile::kBytes);
        tile::tma::load(shared.key[key.stage()], p.key, work.key(p, block),
                        shared.key_ring.full[key.stage()]);
        key.advance();
      };
      const auto load_value = [&](int block) {
        value.wait_empty(shared.value_ring);
        shared.value_ring.full[value.stage()].arrive_expect(KeyTile::kBytes);
        tile::tma::load(shared.value[value.stage()], p.value, work.key(p, block),
                        shared.value_ring.full[value.stage()]);
        value.advance();
      };

      query.wait_empty(shared.query_ring);
      shared.query_ring.full[query.stage()].arrive_expect(QueryTile::kBytes);
      tile::tma::load(shared.query[query.stage()], p.query, work.query(p),
                      shared.query_ring.full[query.stage()]);
      query.advance();

      load_key(work.key_blocks - 1);
      for (int block = work.key_blocks - 1; block > 0; --block) {
        load_key(block - 1);
        load_value(block);
      }
      load_value(0);
    }
  }

  __device__ __forceinline__ static void store(const Params& p, Storage& shared) {
    tile::Slot<kQueryStages> out;
    tile::TileReader tiles;
    for (int index = tiles.take(shared.tiles); index < p.order.count();
         index = tiles.take(shared.tiles), out.advance()) {
      const Work work(p, index);
      shared.out_full[out.stage()].wait(out.parity());
      if (threadIdx.x % tile::kWarpSize == 0) {
        tile::tma::store(p.out, work.query(p), shared.query[out.stage()]);
        tile::tma::wait_stores_read();
        shared.query_ring.empty[out.stage()].arrive();
      }
    }
  }

  __device__ __forceinline__ static void consume(const Params& p, Storage& shared, int consumer) {
    tile::Slot<kQueryStages> query;
    tile::Slot<kStages> key;                        // values lag one block behind
    tile::RegisterTile<float, 64, kHeadDim> out;    // (64, H)
    tile::RegisterTile<float, 64, kBlockS> logits;  // (64, kBlockS), then exponentials
    tile::RegisterTile<T, 64, kBlockS> weights;     // (64, kBlockS)

    const auto take_turn = [&] {
      tile::ptx::named_barrier_sync(kTurn + consumer, 2 * tile::kWarpgroupSize);
    };
    const auto pass_turn = [&] {
      tile::ptx::named_barrier_arrive(kTurn + (consumer + 1) % kConsumers,
                                      2 * tile::kWarpgroupSize);
    };
    if (consumer == kConsumers - 1) pass_turn();

    tile::TileReader tiles;
    for (int index = tiles.take(shared.tiles); index < p.order.count();
         index = tiles.take(shared.tiles)) {
      const Work work(p, index);
      const int row = work.row + 64 * consumer;
      OnlineSoftmax softmax(p.scale_log2);
      query.wait_full(shared.query_ring);
      const auto q = tile::k_major<64>(shared.query[query.stage()], 64 * consumer);

      const auto issue_logits = [&] {
        key.wait_full(shared.key_ring);
        tile::mma_fence(logits);
        tile::mma(logits, q, tile::k_major<kBlockS>(shared.key[key.stage()]), false);
        tile::mma_commit();
      };
      const auto release_key = [&] { shared.key_ring.empty[key.stage()].arrive_warp(); };
      const auto issue_out = [&] {
        const auto value = key.previous();
        value.wait_full(shared.value_ring);
        tile::mma_fence(out);
        tile::mma(out, weights, tile::mn_major<kHeadDim>(shared.value[value.stage()]), true);
        tile::mma_commit();
      };
      const auto release_value = [&] {
        shared.value_ring.empty[key.previous().stage()].arrive_warp();
      };

      int block = work.key_blocks - 1;
      tile::zero(out);
      issue_logits();
      tile::mma_wait<0>(logits);
      release_key();
      key.advance();
      p.mask.apply(logits, row, block * kBlockS);
      softmax.template update<true>(logits);
      tile::convert(weights, logits);

      const auto step = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        take_turn();
        issue_logits();
        issue_out();
        pass_turn();
        tile::mma_wait<1>(logits);
        release_key();
        if constexpr (kMasked) p.mask.apply(logits, row, block * kBlockS);
        const tile::RowVector rescale = softmax.template update<kMasked>(logits);
        tile::mma_wait<0>(out);
        release_value();
        key.advance();
        tile::scale_rows(out, rescale);
        tile::convert(weights, logits);
      };
      const int dense_blocks = p.mask.dense_key_end(work.row) / kBlockS;
      for (--block; block >= dense_blocks; --block) step(std::true_type{});
      for (; block >= 0; --block) step(std::false_type{});

      issue_out();
      tile::RowVector lse;
      const tile::RowVector inverse = softmax.finish(lse);
      float* lse_row = p.lse + int64_t{work.head_of_all} * p.mask.T;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = row + tile::fragment_row(i);
        if (threadIdx.x % 4 == 0 && t < p.mask.T) lse_row[t] = lse[i];
      }
      tile::mma_wait<0>(out);
      release_value();
      tile::scale_rows(out, inverse);

      tile::RegisterTile<T, 64, kHeadDim> rounded;
      tile::convert(rounded, out);
      tile::ptx::named_barrier_sync(kOutput + consumer, tile::kWarpgroupSize);  // Q is read
      tile::store(shared.query[query.stage()], 64 * consumer, rounded);
      tile::tma::fence_writes();
      shared.out_full[query.stage()].arrive_warp();
      query.advance();
    }
  }
};

template <class Forward>
__global__ void __launch_bounds__(Forward::kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ typename Forward::Params p) {
  auto& shared = tile::shared_storage<typename Forward::Storage>();
  const int warpgroup = threadIdx.x / tile::kWarpgroupSize;

  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Forward::kConsumers;
    shared.query_ring.init(1, 1);
    shared.key_ring.init(1, kConsumerWarps);
    shared.value_ring.init(1, kConsumerWarps);
    for (auto& barrier : shared.out_full) barrier.init(kConsumerWarps);
    shared.tiles.init(kConsumerWarps + 1);
    tile::ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warpgroup == 0) {
    tile::ptx::setmaxnreg_decrease<Forward::kConfig.producer_registers>();
    if (threadIdx.x == 0) Forward::load(p, shared);
    if (threadIdx.x / tile::kWarpSize == 1) Forward::store(p, shared);
  } else {
    tile::ptx::setmaxnreg_increase<Forward::kConfig.consumer_registers>();
    Forward::consume(p, shared, warpgroup - 1);
  }
}

}  // namespace jaxkern

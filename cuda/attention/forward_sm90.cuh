// Attention forward on Hopper: out = softmax(scale * query key^T) value, one pass over the keys.
//
// A persistent block works through tiles of kBlockT queries of one head. Its warpgroups have roles:
//   producer    warp 0 loads the query tile and streams key and value blocks into rings of stages,
//               warp 1 stores finished output tiles, warp 2 draws the next tile and works out
//               which blocks of keys its mask leaves;
//   consumers   each own 64 query rows: S = Q K^T, online softmax, O += P V, with P in registers.
// A consumer issues S of the next block before O += P V of this one, so its softmax runs while the
// tensor cores multiply; consumers also take turns in issuing, so that one's softmax falls in the
// other's products. Blocks of a cluster work on neighbouring tiles and share keys and values.
// docs/attention.md draws the schedule.
// The two overlaps are FlashAttention-3's (Shah et al. 2024).
#pragma once

#include "cuda/attention/config.h"
#include "cuda/attention/mask.cuh"
#include "cuda/attention/params.h"
#include "cuda/attention/softmax.cuh"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

template <class T_, int kHeadDim_, MaskKind kMask, bool kSoftCap_, int kClusterBlocks_>
struct AttentionForward {
  using T = T_;
  static constexpr int kClusterBlocks = kClusterBlocks_;
  using Cluster = tile::Cluster<kClusterBlocks>;
  using Mask = AttentionMask<kMask, false>;
  static constexpr AttentionFwdConfig kConfig = attention_fwd_config(kHeadDim_, kMask, kSoftCap_);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kSoftCap = kSoftCap_;
  static constexpr bool kLongestFirst = kMask != MaskKind::kFull;
  static constexpr int kConsumers = kConfig.consumers;
  static constexpr int kBlockT = 64 * kConsumers;
  static constexpr int kWorkT = kBlockT * kClusterBlocks;
  static constexpr int kBlockS = kConfig.block_s;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kQueryStages = kConfig.query_stages;
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);
  static_assert(kConfig.producer_registers + kConsumers * kConfig.consumer_registers <=
                (1 + kConsumers) * tile::launch_registers(kThreads));
  // Ranges of keys are worked out for each consumer where its own may be shorter than the tile's.
  static constexpr int kRanges =
      kMask == MaskKind::kBand || (kLongestFirst && kBlockS % kBlockT != 0) ? kConsumers : 1;

  using QueryTile = tile::SharedTile<T, kBlockT, kHeadDim>;  // (kBlockT, H)
  using KeyTile = tile::SharedTile<T, kBlockS, kHeadDim>;    // (kBlockS, H)

  struct Params {
    CUtensorMap query, key, value, out;  // boxes: one panel of a query, key, value, query tile
    const T* value_data;                 // (B, S, K, H)
    float* lse;                          // (B, N, T)
    float scale_log2, cap_factor;        // with a soft cap: of the capped logits, scale / cap
    Mask mask;
    tile::TileOrder order;
    int* tile_counter;  // zero
    int heads, group;   // N, N / K
  };

  // Blocks of keys from `first` up to `last`, of which those from `dense_first` up to `dense_last`
  // need no mask.
  struct BlockRange {
    int first, last, dense_first, dense_last;

    BlockRange() = default;
    __device__ __forceinline__ explicit BlockRange(const ColumnRange& keys) {
      first = keys.empty() ? 0 : keys.begin / kBlockS;
      last = keys.empty() ? 1 : tile::ceil_div(keys.end, kBlockS);  // one block, all of it hidden
      dense_last = max(first, min(last, keys.dense_end / kBlockS));
      dense_first = max(first, min(dense_last, tile::ceil_div(keys.dense_begin, kBlockS)));
    }
  };

  // One tile of work, the same for every role: the blocks of keys that its queries visit, and what
  // the 64 queries of each consumer do.
  struct Work {
    int batch, row, head, kv_head;
    int first, last;
    BlockRange own[kRanges];

    Work() = default;
    __device__ __forceinline__ Work(const Params& p, tile::TileOrder::Tile at)
        : batch(at.head / p.heads),
          row((kLongestFirst ? p.order.blocks - 1 - at.block : at.block) * kWorkT +
              Cluster::rank() * kBlockT),
          head(at.head % p.heads),
          kv_head(head / p.group) {
      constexpr int kRows = kBlockT / kRanges;
#pragma unroll
      for (int i = 0; i < kRanges; ++i) {
        own[i] = BlockRange(p.mask.template columns<kRows>(batch, row + kRows * i));
        first = i == 0 ? own[i].first : min(first, own[i].first);
        last = i == 0 ? own[i].last : max(last, own[i].last);
      }
    }
    __device__ __forceinline__ static Work none() { return {}; }  // follows the last tile
    __device__ __forceinline__ explicit operator bool() const { return last > 0; }
    __device__ __forceinline__ tile::tma::Coordinate query() const { return {batch, row, head}; }
    __device__ __forceinline__ tile::tma::Coordinate key(int block) const {
      return {batch, block * kBlockS, kv_head};
    }
  };

  struct Storage {
    QueryTile query[kQueryStages];  // a consumer's rows take its output once its last S is done
    KeyTile key[kStages];
    KeyTile value[kStages];
    tile::Ring<kQueryStages> query_ring;
    tile::Ring<kStages> key_ring;
    tile::Ring<kStages> value_ring;
    tile::Barrier out_full[kQueryStages];
    tile::WorkQueue<Work> queue;
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");

  enum NamedBarrier { kTurn = 1, kOutput = kTurn + kConsumers };

  __device__ __forceinline__ static void schedule(const Params& p, Storage& shared) {
    tile::WorkWriter<Work> works;
    if constexpr (kClusterBlocks == 1) {
      tile::TileDraw draw(p.tile_counter);
      for (; draw.tile < p.order.count(); draw.advance()) {
        works.put(shared.queue, Work(p, p.order.at(draw.tile)));
      }
    } else {  // tiles are alike without a mask
      for (int tile = Cluster::index(); tile < p.order.count(); tile += Cluster::count()) {
        works.put(shared.queue, Work(p, p.order.at(tile)));
      }
    }
    works.put(shared.queue, Work::none());
  }

  __device__ __forceinline__ static void load(const Params& p, Storage& shared) {
    tile::Slot<kQueryStages> query;
    tile::Slot<kStages> key, value;
    for (tile::WorkReader<Work> works; const Work& work = works.take(shared.queue);
         works.release(shared.queue)) {
      const auto load_key = [&](int block) {
        key.wait_empty(shared.key_ring);
        shared.key_ring.full[key.stage()].arrive_expect(KeyTile::kBytes);
        tile::tma::load_multicast<Cluster>(shared.key[key.stage()], p.key, work.key(block),
                                           shared.key_ring.full[key.stage()]);
        key.advance();
      };
      const auto load_value = [&](int block) {
        value.wait_empty(shared.value_ring);
        shared.value_ring.full[value.stage()].arrive_expect(KeyTile::kBytes);
        tile::tma::load_multicast<Cluster>(shared.value[value.stage()], p.value, work.key(block),
                                           shared.value_ring.full[value.stage()]);
        value.advance();
      };

      load_key(work.last - 1);
      query.wait_empty(shared.query_ring);
      shared.query_ring.full[query.stage()].arrive_expect(QueryTile::kBytes);
      tile::tma::load(shared.query[query.stage()], p.query, work.query(),
                      shared.query_ring.full[query.stage()]);
      query.advance();

      for (int block = work.last - 1; block > work.first; --block) {
        load_key(block - 1);
        load_value(block);
      }
      load_value(work.first);
    }
  }

  __device__ __forceinline__ static void store(const Params& p, Storage& shared) {
    tile::Slot<kQueryStages> out;
    for (tile::WorkReader<Work> works; const Work& work = works.take(shared.queue);
         works.release(shared.queue), out.advance()) {
      shared.out_full[out.stage()].wait(out.parity());
      tile::tma::store(p.out, work.query(), shared.query[out.stage()]);
      tile::tma::wait_stores_read();
      shared.query_ring.empty[out.stage()].arrive();
    }
  }

  __device__ __forceinline__ static void take_turn(int consumer) {
    if constexpr (!kConfig.takes_turns) return;
    tile::ptx::named_barrier_sync(kTurn + consumer, 2 * tile::kWarpgroupSize);
  }
  __device__ __forceinline__ static void pass_turn(int consumer) {
    if constexpr (!kConfig.takes_turns) return;
    tile::ptx::named_barrier_arrive(kTurn + (consumer + 1) % kConsumers, 2 * tile::kWarpgroupSize);
  }

  __device__ __forceinline__ static void consume(const Params& p, Storage& shared) {
    tile::Slot<kStages> key;                        // values lag one block behind
    tile::RegisterTile<float, 64, kHeadDim> out;    // (64, H)
    tile::RegisterTile<float, 64, kBlockS> logits;  // (64, kBlockS), then exponentials
    tile::RegisterTile<T, 64, kBlockS> weights;     // (64, kBlockS)

    if (tile::warpgroup_index() == kConsumers) pass_turn(kConsumers - 1);

    for (tile::WorkReader<Work> works; const Work& work = works.take(shared.queue);
         works.release_warp(shared.queue)) {
      const int consumer = tile::warpgroup_index() - 1;
      const int row = work.row + 64 * consumer;
      OnlineSoftmax softmax(p.scale_log2);
      const tile::Slot<kQueryStages> query{works.slot.count};
      query.wait_full(shared.query_ring);
      const auto q = tile::k_major<64>(shared.query[query.stage()], 64 * consumer);

      const auto issue_logits = [&] {
        key.wait_full(shared.key_ring);
        tile::mma_fence(logits);
        tile::mma(logits, q, tile::k_major<kBlockS>(shared.key[key.stage()]), false);
        tile::mma_commit();
      };
      const auto release_key = [&] { Cluster::arrive_warp(shared.key_ring.empty[key.stage()]); };
      const auto issue_out = [&] {
        const auto value = key.previous();
        value.wait_full(shared.value_ring);
        tile::mma_fence(out);
        tile::mma(out, weights, tile::mn_major<kHeadDim>(shared.value[value.stage()]), true);
        tile::mma_commit();
      };
      const auto release_value = [&] {
        Cluster::arrive_warp(shared.value_ring.empty[key.previous().stage()]);
      };

      // A block of keys that only other consumers visit.
      const auto skip_block = [&] {
        take_turn(consumer);
        pass_turn(consumer);
        key.wait_full(shared.key_ring);
        release_key();
        key.wait_full(shared.value_ring);
        key.advance();
        release_value();
      };

      const BlockRange own = work.own[kRanges == 1 ? 0 : consumer];
      int block = work.last - 1;
      for (; kRanges > 1 && block >= own.last; --block) skip_block();
      tile::zero(out);
      issue_logits();
      tile::mma_wait<0>(logits);
      release_key();
      key.advance();
      if constexpr (kSoftCap) cap_logits(logits, p.cap_factor);
      p.mask.apply(logits, work.batch, row, block * kBlockS);
      softmax.template update<true>(logits);
      tile::convert(weights, logits);

      const auto step = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        take_turn(consumer);
        issue_logits();
        issue_out();
        pass_turn(consumer);
        tile::mma_wait<1>(logits);
        release_key();
        if constexpr (kSoftCap) cap_logits(logits, p.cap_factor);
        if constexpr (kMasked) p.mask.apply(logits, work.batch, row, block * kBlockS);
        const tile::RowVector rescale = softmax.template update<kMasked>(logits);
        tile::mma_wait<0>(out);
        release_value();
        key.advance();
        tile::scale_rows(out, rescale);
        tile::convert(weights, logits);
      };
      for (--block; block >= own.dense_last; --block) step(std::true_type{});
      if constexpr (Mask::kLower) {
        for (; block >= own.dense_first; --block) step(std::false_type{});
        for (; block >= own.first; --block) step(std::true_type{});
      } else {
        for (; block >= 0; --block) step(std::false_type{});
      }

      issue_out();
      tile::RowVector lse;
      tile::RowVector inverse = softmax.finish(lse);
      const int length = p.mask.sequence(work.batch).rows;
      float* lse_row = p.lse + (int64_t{work.batch} * p.heads + work.head) * p.mask.rows;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = row + tile::fragment_row(i);
        if (t >= length) lse[i] = kHiddenLse, inverse[i] = 0.0f;
        if (threadIdx.x % 4 == 0 && t < p.mask.rows) lse_row[t] = lse[i];
      }
      tile::mma_wait<0>(out);
      release_value();
      for (; kRanges > 1 && Mask::kLower && block >= work.first; --block) skip_block();
      tile::scale_rows(out, inverse);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (inverse[i] != 0.0f) continue;
        fill_hidden_row(p, work, out, i, row + tile::fragment_row(i) < length);
      }

      tile::RegisterTile<T, 64, kHeadDim> rounded;
      tile::convert(rounded, out);
      tile::ptx::named_barrier_sync(kOutput + consumer, tile::kWarpgroupSize);  // Q is read
      tile::store(shared.query[query.stage()], 64 * consumer, rounded);
      tile::tma::fence_writes();
      shared.out_full[query.stage()].arrive_warp();
    }
  }

  // A query past the sequence's length gets zeros, one that sees no key the mean of all values, as
  // in the reference. The latter is rare and reads them straight from global memory.
  __device__ __forceinline__ static void fill_hidden_row(
      const Params& p, const Work& work, tile::RegisterTile<float, 64, kHeadDim>& out, int i,
      bool inside) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) out.at(j, i, 0) = out.at(j, i, 1) = 0.0f;
    if (!inside) return;
    const auto at = work.key(0);
    const int64_t stride = int64_t{p.heads / p.group} * kHeadDim;
    const T* value = p.value_data + at.batch * p.mask.cols * stride + at.head * kHeadDim;
    const float weight = 1.0f / p.mask.cols;
    for (int s = 0; s < p.mask.cols; ++s, value += stride) {
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const auto* pair = reinterpret_cast<const uint32_t*>(value + tile::fragment_col(j));
        const float2 v = tile::unpack<T>(*pair);
        out.at(j, i, 0) += weight * v.x;
        out.at(j, i, 1) += weight * v.y;
      }
    }
  }
};

template <class Forward>
__global__ void __cluster_dims__(Forward::kClusterBlocks) __launch_bounds__(Forward::kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ typename Forward::Params p) {
  auto& shared = tile::shared_storage<typename Forward::Storage>();

  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Forward::kConsumers;
    constexpr int kReaders = kConsumerWarps * Forward::kClusterBlocks;
    shared.query_ring.init(1, 1);
    shared.key_ring.init(1, kReaders);
    shared.value_ring.init(1, kReaders);
    for (auto& barrier : shared.out_full) barrier.init(kConsumerWarps);
    shared.queue.init(kConsumerWarps + 2);
    tile::ptx::fence_mbarrier_init();
  }
  Forward::Cluster::sync();

  if (tile::warpgroup_index() == 0) {
    tile::ptx::setmaxnreg_decrease<Forward::kConfig.producer_registers>();
    if (threadIdx.x == 0) Forward::load(p, shared);
    if (threadIdx.x == tile::kWarpSize) Forward::store(p, shared);
    if (threadIdx.x == 2 * tile::kWarpSize) Forward::schedule(p, shared);
  } else {
    tile::ptx::setmaxnreg_increase<Forward::kConfig.consumer_registers>();
    Forward::consume(p, shared);
  }
  if constexpr (Forward::kClusterBlocks > 1) Forward::Cluster::sync();
}

}  // namespace jaxkern

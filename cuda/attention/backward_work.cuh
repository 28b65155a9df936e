// What the backward kernels share: their parameters, and the work of kWorkS keys of one key/value
// head, by one block or by a cluster of two.
#pragma once

#include "cuda/attention/mask.cuh"
#include "cuda/tile/ptx/atomic.cuh"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

// kTurnParts: of a block of dQ, each added by one thread or warp.
template <MaskKind kMask, int kBlockT, int kTurnParts>
struct AttentionBackwardWork {
  using Mask = AttentionMask<kMask, true>;
  static constexpr int kParts = 2;  // of the keys, and of a block of dQ, each made by one warpgroup
  static constexpr int kWorkS = 64 * kParts;

  struct Params {
    CUtensorMap query, dout;               // boxes: one panel of kBlockT queries
    CUtensorMap key, value, dkey, dvalue;  // boxes: one panel of the keys of a block
    CUtensorMap lse_log2, delta;           // boxes: kBlockT values of (B * N, Tp)
    float* dquery_accum;                   // (B, N, Tp / kBlockT, kParts, kBlockT * H / kParts)
    const float* hidden_dout;              // (B, K, H) or null
    int* turns;                            // (B, N, Tp / kBlockT, kTurnParts) or null
    float scale, scale_log2, cap_factor;   // with a soft cap: of the capped logits, scale / cap
    Mask mask;
    tile::TileOrder order;
    bool last_keys_first;
    int kv_heads, group, padded_T;  // K, N / K, Tp
  };

  // Blocks of queries, none if begin >= end.
  struct BlockRange {
    int begin, end;
  };

  // Those that the keys from `key` on visit. Neither end falls from one run of kWorkS keys to the
  // next, so a query block is visited by consecutive ones.
  __device__ __forceinline__ static BlockRange query_blocks(const Mask& mask, int batch, int key) {
    const ColumnRange queries = mask.template columns<kWorkS>(batch, key);
    return {queries.begin / kBlockT, tile::ceil_div(queries.end, kBlockT)};
  }

  // Under a causal mask the first keys have the most queries, and so come first.
  __device__ __forceinline__ static int first_key(const Params& p, int index) {
    return (p.last_keys_first ? p.order.blocks - 1 - index : index) * kWorkS;
  }

  // It is kept in shared memory, since 24 registers of a producer are too few to work a mask out.
  struct Work {
    int batch, kv_head, index, key;  // of kWorkS keys from `key` on, the index-th of its head
    BlockRange blocks;               // visited, for each head of the group
    BlockRange dense[kParts];        // need no mask for 64 of the keys

    __device__ __forceinline__ Work(const Params& p, tile::TileOrder::Tile at)
        : batch(at.head / p.kv_heads),
          kv_head(at.head % p.kv_heads),
          index(at.block),
          key(first_key(p, index)),
          blocks(query_blocks(p.mask, batch, key)) {
      for (int i = 0; i < kParts; ++i) {
        const ColumnRange own = p.mask.template columns<64>(batch, key + 64 * i);
        dense[i] = {tile::ceil_div(own.dense_begin, kBlockT), own.dense_end / kBlockT};
      }
    }
    __device__ __forceinline__ tile::tma::Coordinate keys(int part = 0) const {
      return {batch, key + 64 * part, kv_head};
    }
    __device__ __forceinline__ tile::tma::Coordinate queries(const Params& p, int member,
                                                             int block) const {
      return {batch, block * kBlockT, kv_head * p.group + member};
    }
    // Counts through batch and heads.
    __device__ __forceinline__ int key_head(const Params& p) const {
      return batch * p.kv_heads + kv_head;
    }
    __device__ __forceinline__ int query_head(const Params& p, int member) const {
      return key_head(p) * p.group + member;
    }
    __device__ __forceinline__ bool needs_mask(int part, int block) const {
      return block < dense[part].begin || (Mask::kUpper && block >= dense[part].end);
    }
    // Calls step(member, block) for every block of queries.
    template <class Step>
    __device__ __forceinline__ void for_each(const Params& p, const Step& step) const {
      const BlockRange range = blocks;
      for (int member = 0; member < p.group; ++member) {
        for (int block = range.begin; block < range.end; ++block) step(member, block);
      }
    }
  };

  // The row of the accumulator where a block of queries begins.
  __device__ __forceinline__ static int64_t accum_row(const Params& p, const Work& work, int member,
                                                      int block) {
    return int64_t{work.query_head(p, member)} * p.padded_T + block * kBlockT;
  }

  // If there are turns, dQ is added in the order of works, which is that of the grid: a block only
  // ever waits for one that has started. A turn belongs to a part of a block of queries, and is the
  // index of the work that may add to it.
  __device__ __forceinline__ static int* turn(const Params& p, int64_t row, int part) {
    return p.turns + row / kBlockT * kTurnParts + part;
  }
  __device__ __forceinline__ static void wait_turn(const Params& p, const Work& work, int64_t row,
                                                   int part) {
    while (tile::ptx::load_acquire(turn(p, row, part)) != work.index) {
    }
  }
  __device__ __forceinline__ static void pass_turn(const Params& p, int64_t row, int part) {
    tile::ptx::add_release(turn(p, row, part), 1);
  }
};

}  // namespace jaxkern

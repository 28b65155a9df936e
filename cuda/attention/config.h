// Tile sizes and register budgets of the attention kernels.
#pragma once

namespace jaxkern {

// Forward: `consumers` warpgroups of 64 queries each walk over blocks of `block_s` keys, of which
// `stages` are on their way; so are `query_stages` tiles of queries. Registers are those of a
// producer and of a consumer thread: 65536 in all, in steps of 8.
struct AttentionFwdConfig {
  int consumers, block_s, stages, query_stages;
  int producer_registers, consumer_registers;
};

constexpr AttentionFwdConfig attention_fwd_config(int head_dim, bool causal) {
  constexpr AttentionFwdConfig kTwo = {2, 128, 2, 2, 40, 232};
  constexpr AttentionFwdConfig kThree = {3, 128, 2, 2, 32, 160};
  // Three consumers read keys and values less often, but three accumulators of head dim 128 do not
  // fit; and under a causal mask short tiles waste less and balance better.
  return head_dim == 64 && !causal ? kThree : kTwo;
}

// Backward: two consumer warpgroups own 64 keys each and walk over blocks of `block_t` queries.
// exact_weights: dS takes P in float32. At head dim 64 there are no registers left to keep it
// beside the rounded P that dV takes, so both take the rounded one.
struct AttentionBwdConfig {
  int block_t;
  bool exact_weights;
  int producer_registers, consumer_registers;
};

constexpr AttentionBwdConfig attention_bwd_config(int head_dim) {
  return head_dim == 64 ? AttentionBwdConfig{128, false, 24, 240}
                        : AttentionBwdConfig{64, true, 24, 240};
}

// Backward at head dim 256: one producer and three consumer warpgroups, each with a product and
// registers of its own.
struct AttentionBwdWideConfig {
  int block_t;
  int producer_registers, dvalue_registers, dkey_registers, dquery_registers;
};

constexpr AttentionBwdWideConfig kAttentionBwdWideConfig = {64, 24, 200, 192, 96};

}  // namespace jaxkern

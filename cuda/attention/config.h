// Tile sizes and register budgets of the attention kernels.
#pragma once

#include "cuda/attention/mask.cuh"

namespace jaxkern {

// Forward: `consumers` warpgroups of 64 queries each walk over blocks of `block_s` keys, of which
// `stages` are on their way; so are `query_stages` tiles of queries. takes_turns: one consumer
// issues its products at a time. Registers are those of a producer and of a consumer thread, in
// steps of 8.
struct AttentionFwdConfig {
  int consumers, block_s, stages, query_stages;
  bool takes_turns;
  int producer_registers, consumer_registers;
};

constexpr AttentionFwdConfig attention_fwd_config(int head_dim, MaskKind mask, bool soft_cap) {
  constexpr AttentionFwdConfig kTwo = {2, 128, 2, 2, true, 40, 232};
  constexpr AttentionFwdConfig kThree = {3, 128, 2, 2, true, 32, 160};
  // At head dim 256 these are all the keys that shared memory and, under a band mask, registers
  // hold.
  constexpr AttentionFwdConfig kWide = {2, 80, 2, 1, false, 24, 240};
  constexpr AttentionFwdConfig kWideBand = {2, 64, 2, 1, false, 40, 232};
  if (head_dim == 256) return mask == MaskKind::kBand ? kWideBand : kWide;
  // Three consumers read keys and values less often and leave the tensor cores idle less often, but
  // three accumulators of head dim 128 do not fit, nor does the code of a soft cap.
  return head_dim == 64 && !soft_cap ? kThree : kTwo;
}

// Backward: two consumer warpgroups own 64 keys each and walk over blocks of `block_t` queries.
// exact_weights: dS takes P in float32. Where there are no registers left to keep it beside the
// rounded P that dV takes, both take that; with a soft cap dS takes its own, rounded.
// transposed: dQ^T is made, for blocks that are no multiple of 64.
struct AttentionBwdConfig {
  int block_t;
  bool exact_weights, transposed;
  int producer_registers, consumer_registers;
};

// At head dim 128 tall blocks read keys and values from shared memory less often, which is what
// limits the kernel; short rows, where more of the last block is padding, want low ones.
constexpr AttentionBwdConfig attention_bwd_config(int head_dim, bool tall) {
  constexpr AttentionBwdConfig kLow = {64, true, false, 24, 240};
  constexpr AttentionBwdConfig kTall = {kAttentionTallBlockT, false, true, 24, 240};
  if (head_dim == 64) return {128, false, false, 24, 240};
  return tall ? kTall : kLow;
}

// From how many queries on blocks are tall. With a soft cap registers do not suffice.
constexpr int64_t attention_bwd_tall_from(MaskKind mask) {
  return mask == MaskKind::kFull ? 1024 : 2048;
}

// Backward at head dim 256: one producer and three consumer warpgroups, each with a product and
// registers of its own. dquery_cols: of dQ that are made at a time. With a soft cap, dV needs what
// the shorter accumulator of dQ leaves.
struct AttentionBwdWideConfig {
  int block_t, dquery_cols;
  int producer_registers, dvalue_registers, dkey_registers, dquery_registers;
};

constexpr AttentionBwdWideConfig attention_bwd_wide_config(bool soft_cap) {
  return soft_cap ? AttentionBwdWideConfig{64, 64, 24, 232, 192, 64}
                  : AttentionBwdWideConfig{64, 128, 24, 200, 192, 96};
}

}  // namespace jaxkern

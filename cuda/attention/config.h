// Tile sizes of the attention kernels, one row per head dim and mask.
#pragma once

namespace jaxkern {

// Forward: kConsumers warpgroups of 64 query rows each walk over blocks of kBlockS keys.
template <int kHeadDim, bool kCausal>
struct AttentionFwdConfig;

template <>
struct AttentionFwdConfig<64, false> {
  static constexpr int kConsumers = 3;
  static constexpr int kBlockS = 128;
  static constexpr int kStages = 2;
  static constexpr int kQueryStages = 2;
};

// Under a causal mask short tiles waste less and balance better.
template <>
struct AttentionFwdConfig<64, true> {
  static constexpr int kConsumers = 2;
  static constexpr int kBlockS = 128;
  static constexpr int kStages = 2;
  static constexpr int kQueryStages = 2;
};

template <bool kCausal>
struct AttentionFwdConfig<128, kCausal> {
  static constexpr int kConsumers = 2;
  static constexpr int kBlockS = 128;
  static constexpr int kStages = 2;
  static constexpr int kQueryStages = 2;
};

// Backward: two consumer warpgroups own 64 keys each and walk over blocks of kBlockT queries.
// kExactWeights: dS takes P in float32. At head dim 64 there are no registers left to keep it
// beside the rounded P that dV takes, so both take the rounded one.
template <int kHeadDim>
struct AttentionBwdConfig;

template <>
struct AttentionBwdConfig<64> {
  static constexpr int kBlockT = 128;
  static constexpr bool kExactWeights = false;
};

template <>
struct AttentionBwdConfig<128> {
  static constexpr int kBlockT = 64;
  static constexpr bool kExactWeights = true;
};

// Registers of a producer and of a consumer thread: 65536 in all, in steps of 8.
template <int kConsumers>
struct AttentionFwdRegisters;

template <>
struct AttentionFwdRegisters<2> {
  static constexpr int kProducer = 40, kConsumer = 232;
};

template <>
struct AttentionFwdRegisters<3> {
  static constexpr int kProducer = 32, kConsumer = 160;
};

struct AttentionBwdRegisters {
  static constexpr int kProducer = 24, kConsumer = 240;
};

}  // namespace jaxkern

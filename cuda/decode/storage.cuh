// Where a block keeps what it has: shared memory, and weights in registers.
#pragma once

#include "cuda/decode/attention.cuh"
#include "cuda/decode/draw.cuh"
#include "cuda/decode/probe.cuh"

namespace jaxkern::decode {

// The shared memory of a block.
template <int kHeadDim, int kBatch, int kStages, int kScaleBytes>
struct StepStorage {
  decode::Stream<kStages, kHeadDim, kScaleBytes> stream;
  decode::Sums<kBatch, max_rows(kHeadDim)> sums;
  // Hidden state of the rows that the block has of out and of down.
  float residual[kBatch][max_rows(kHeadDim)];
  float rstd[kBatch];                           // of the hidden state
  float squares[kBatch * Team<kBatch>::kSize];  // of the first one, sums of warps
  float2 rotation[kBatch][kHeadDim / 2];        // cosines and sines of the positions
  int lengths[kBatch], status[kBatch];          // lengths before the first step
  Units units;
  DrawStorage<kBatch> draw;
  uint32_t before[kHead], layers;  // of the steps before this one, see WorkspaceHeader
  // From consumers to the producer, once a step: keys and values of the step before are there.
  tile::Barrier turn;
  bool ended;  // or there is no step
  // To helpers, when all may have sent the hidden state, and from them, when there is its `rstd`.
  // Twice a layer: of what out gave, and of what down gave.
  tile::Barrier hidden_sent, rstd_ready;
  Probe probe;
  // Vectors of the products, and between them what attention needs. As large as is asked for.
  alignas(128) char scratch[];
};

// Where there is a result of a phase among those of all sequences: for qkv those of one lie
// together, others are vectors.
__device__ __forceinline__ int result_place(const Rows& rows, Phase phase, int batch, int n,
                                            int row) {
  return phase == kQkv ? n * rows.count() + row : vector_place(batch, n, row);
}

// Where there are the places for what blocks send, of a layer, which counts on from step to step.
template <int kHeadDim, int kBatch>
struct Sent {
  using bf16 = tile::bf16;
  const StepParams& p;
  uint32_t layer;

  __device__ __forceinline__ bf16* results(Phase phase) const { return p.results[phase].of(layer); }
  // Of the hidden state that kOut or kDown gives.
  __device__ __forceinline__ float* squares(Phase phase) const {
    return (phase == kOut ? p.out_squares : p.down_squares).of(layer);
  }
  // The first value of a unit of attention, and how much further on another of its values is.
  __device__ __forceinline__ bf16* head(const Unit& unit) const {
    const int k = unit.kv_head * unit.group * kHeadDim;
    return results(kAttention) + vector_place(batch(), unit.sequence, k);
  }
  __device__ __forceinline__ int head_place(int index) const {
    static_assert(kHeadDim % kSlice == 0);
    return vector_place(batch(), 0, index);
  }
  // What a split of it has.
  __device__ __forceinline__ bf16* partial(const Unit& unit, int split) const {
    const int64_t all = int64_t{batch()} * p.model.heads;
    return p.partials.of(layer) + (split * all + unit.first_head(p.model)) * kHeadDim;
  }
  __device__ __forceinline__ float* log(const Unit& unit, int split) const {
    const int64_t all = int64_t{batch()} * p.model.heads;
    return p.logs.of(layer) + split * all + unit.first_head(p.model);
  }

 private:
  __device__ __forceinline__ int batch() const { return kBatch == 1 ? 1 : p.model.batch; }
};

// Columns of several sequences that are multiplied at once.
inline constexpr int kPartColumns = 2048;

// What registers have room for: of qkv, and of out beside what attention needs.
template <class Weight>
using HeldQkv = HeldWeights<Weight, 3, 8>;
template <class Weight, int kHeadDim>
using HeldOut =
    HeldWeights<Weight, 2, (kHeadDim == 64 || Weights<Weight>::kScaleBytes != 0) ? 8 : 6>;

}  // namespace jaxkern::decode

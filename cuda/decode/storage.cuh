// Where a block keeps what it has: shared memory, and weights in registers.
#pragma once

#include "cuda/decode/attention.cuh"
#include "cuda/decode/draw.cuh"

namespace jaxkern::decode {

// The shared memory of a block.
template <int kHeadDim, int kBatch, int kStages>
struct StepStorage {
  Stream<kStages, chunk_bytes(kHeadDim)> stream;
  Sums<kBatch> sums;
  float residual[kBatch][kMaxRows];  // hidden state of the rows that the block has of out, down
  float rstd[kBatch];                // of the hidden state
  float squares[kWarps];             // of the first one, sums of warps
  float2 rotation[kBatch][kHeadDim / 2];  // cosines and sines of the positions
  int lengths[kBatch], status[kBatch];    // lengths before the first step
  Units units;
  DrawStorage<kBatch> draw;
  uint32_t before[kHead], layers;  // of the steps before this one, see WorkspaceHeader
  // From consumers to the producer, once a step: keys and values of the step before are there.
  tile::Barrier turn;
  bool ended;  // or there is no step
  // Vectors of the products, and between them what attention needs. As large as is asked for.
  alignas(128) char scratch[];
};

// What registers have room for: of qkv, and of out beside what attention needs.
template <class Weight>
using HeldQkv = HeldWeights<Weight, 3, 8>;
template <class Weight, int kHeadDim>
using HeldOut = HeldWeights<Weight, 2, kHeadDim == 64 ? 8 : 6>;

}  // namespace jaxkern::decode

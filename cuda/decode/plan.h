// What the kernel takes: the arguments, and what follows from them.
#pragma once

#include "cuda/decode/params.h"
#include "cuda/decode/rows.h"
#include "cuda/tile/types.cuh"

namespace jaxkern::decode {

// An array of what blocks send, twice, for layers in turn; or as often as is a power of two.
template <class T>
struct Places {
  T* data;
  int64_t size;   // of one
  uint32_t mask;  // how many, less one

#ifdef __CUDACC__
  __device__ __forceinline__ T* of(uint32_t layer) const { return data + (layer & mask) * size; }
#endif
};

// What the kernel takes, from plan_step().
struct StepParams {
  DecodeParams model;
  Rows rows[kPhases];                       // of the product of a phase; attention has none
  Places<tile::bf16> results[kHead];        // [B, values] of a phase
  Places<tile::bf16> partials;              // [kMaxSplits, B, N H] of attention
  Places<float> logs;                       // [kMaxSplits, B, N] of the sums of their weights
  Places<float> out_squares, down_squares;  // [B, blocks'] of the hidden state, sums of blocks
  Places<uint64_t> ranks;                   // [B, blocks'], for exchanges of sampling in turn
  uint64_t* histograms;                     // [4, B, kBins], for its rounds in turn
  int squares_stride;                       // blocks', a multiple of 4
  bool hold_qkv, hold_out;                  // in registers, before what they multiply is there
  int part;                                 // columns of vectors that shared memory has room for
};

}  // namespace jaxkern::decode

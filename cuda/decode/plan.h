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

// How the 16 bits of scales that a row of e2m1 has for 32 columns become numbers: those of two
// blocks of 16, or one of bfloat16.
struct ScaleCode {
  // float32: (bits * factors[block] & mask) | bits.
  uint32_t factors[2], mask, bits;
  // A pair of bfloat16 from 16 bits and the same again: turned to the left, & pair_mask |
  // pair_bits.
  uint32_t turns[2], pair_mask, pair_bits;
};
constexpr ScaleCode scale_code(WeightFormat format) {
  if (format == WeightFormat::kNvfp4) {  // bytes, of which five bits are an exponent
    return {{1 << 20, 1 << 12}, 0x0ff00000, 0x60000000, {4, 28}, 0x0ff00ff0, 0x60006000};
  }
  return {{1 << 16, 1 << 16}, 0xffff0000, 0, {0, 0}, 0xffffffff, 0};
}

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
  ScaleCode scale_code;
};

}  // namespace jaxkern::decode

// Sums across threads. The order of additions is fixed, so results are bitwise repeatable.
#pragma once

#include "cuda/tile/types.cuh"

namespace jaxkern::tile {

inline constexpr int kMaxWarps = 32;  // per block

// The sum over aligned groups of `width` lanes, in every lane. width: a power of two, at most 32.
__device__ inline float warp_sum(float value, int width = kWarpSize) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum over the threads that share threadIdx.y, in each of them. blockDim.x is a power of two
// and the block is whole warps. Every thread of the block calls; two calls in a row need different
// scratch, so that one barrier per call is enough.
__device__ inline float row_sum(float value, float (&scratch)[kMaxWarps]) {
  if (blockDim.x <= kWarpSize) return warp_sum(value, blockDim.x);
  const int warps = blockDim.x / kWarpSize;  // of this row
  const int lane = threadIdx.x % kWarpSize;
  float* row_scratch = scratch + threadIdx.y * warps;
  value = warp_sum(value);
  if (lane == 0) row_scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return warp_sum(lane < warps ? row_scratch[lane] : 0.0f);
}

}  // namespace jaxkern::tile

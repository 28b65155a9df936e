// Sums and maxima across threads. The order of additions is fixed, so results are bitwise
// repeatable.
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

// The largest over the same lanes.
__device__ inline uint32_t warp_max(uint32_t value, int width = kWarpSize) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// reduce(value, width) over the threads that share threadIdx.y, in each of them; T{} is neutral.
// blockDim.x is a power of two and the block is whole warps. Every thread of the block calls; two
// calls in a row need different scratch, so that one barrier per call is enough.
template <class T, class Reduce>
__device__ __forceinline__ T row_reduce(T value, T (&scratch)[kMaxWarps], Reduce reduce) {
  if (blockDim.x <= kWarpSize) return reduce(value, blockDim.x);
  const int warps = blockDim.x / kWarpSize;  // of this row
  const int lane = threadIdx.x % kWarpSize;
  T* row_scratch = scratch + threadIdx.y * warps;
  value = reduce(value, kWarpSize);
  if (lane == 0) row_scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return reduce(lane < warps ? row_scratch[lane] : T{}, kWarpSize);
}

__device__ inline float row_sum(float value, float (&scratch)[kMaxWarps]) {
  return row_reduce(value, scratch, [](float x, int width) { return warp_sum(x, width); });
}

__device__ inline uint32_t row_max(uint32_t value, uint32_t (&scratch)[kMaxWarps]) {
  return row_reduce(value, scratch, [](uint32_t x, int width) { return warp_max(x, width); });
}

}  // namespace jaxkern::tile

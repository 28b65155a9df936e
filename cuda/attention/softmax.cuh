// Softmax over a row of logits that arrives in blocks (Milakov and Gimelshein 2018; Dao 2022).
#pragma once

#include <cmath>

#include "cuda/tile/ptx/special.cuh"
#include "cuda/tile/reg.cuh"

namespace jaxkern {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

struct OnlineSoftmax {
  float scale_log2;     // logits are multiplied by it: scale * log2(e), positive
  tile::RowVector max;  // of the unscaled logits so far
  tile::RowVector sum;  // of this thread's exponentials so far; joined in finish()

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2)
      : scale_log2(scale_log2), max{{-INFINITY, -INFINITY}}, sum{{0.0f, 0.0f}} {}

  // Replaces a block of logits by exp(scale * (logit - max)) and returns the factor by which what
  // has been summed up to now must be multiplied. kMasked: a row may have seen no key yet.
  template <bool kMasked, int kCols>
  __device__ __forceinline__ tile::RowVector update(tile::RegisterTile<float, 64, kCols>& x) {
    tile::RowVector rescale;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float block_max = x.at(0, i, 0);
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        block_max = fmaxf(block_max, fmaxf(x.at(j, i, 0), x.at(j, i, 1)));
      }
      const float new_max = fmaxf(max[i], tile::row_max(block_max));
      const float origin = (kMasked && new_max == -INFINITY) ? 0.0f : new_max * scale_log2;
      rescale[i] = tile::ptx::exp2_approx(max[i] * scale_log2 - origin);
      max[i] = new_max;
      float block_sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x.at(j, i, c) = tile::ptx::exp2_approx(x.at(j, i, c) * scale_log2 - origin);
          block_sum += x.at(j, i, c);
        }
      }
      sum[i] = sum[i] * rescale[i] + block_sum;
    }
    return rescale;
  }

  // The factors that normalise the output, and the natural log-sum-exp of the scaled logits.
  __device__ __forceinline__ tile::RowVector finish(tile::RowVector& lse) {
    tile::RowVector inverse;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] = tile::row_sum(sum[i]);
      inverse[i] = sum[i] > 0.0f ? 1.0f / sum[i] : 0.0f;
      lse[i] = (max[i] * scale_log2 + log2f(sum[i])) * kLn2;
    }
    return inverse;
  }
};

// Backward, on tiles whose rows are keys and whose columns are queries.

// x(key, query) = 2^(x * scale_log2 - lse_log2[query])
template <int kCols>
__device__ __forceinline__ void subtract_and_exponentiate(tile::RegisterTile<float, 64, kCols>& x,
                                                          const float* lse_log2, float scale_log2) {
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    const float2 lse = *reinterpret_cast<const float2*>(lse_log2 + tile::fragment_col(j));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x.at(j, i, 0) = tile::ptx::exp2_approx(x.at(j, i, 0) * scale_log2 - lse.x);
      x.at(j, i, 1) = tile::ptx::exp2_approx(x.at(j, i, 1) * scale_log2 - lse.y);
    }
  }
}

// x(key, query) = (x(key, query) - delta[query]) * y(key, query)
template <int kCols, class Weights>
__device__ __forceinline__ void multiply_centered(tile::RegisterTile<float, 64, kCols>& x,
                                                  const Weights& y, const float* delta) {
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    const float2 d = *reinterpret_cast<const float2*>(delta + tile::fragment_col(j));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 w = tile::pair(y, j, i);
      x.at(j, i, 0) = (x.at(j, i, 0) - d.x) * w.x;
      x.at(j, i, 1) = (x.at(j, i, 1) - d.y) * w.y;
    }
  }
}

}  // namespace jaxkern

// Softmax over a row of logits that arrives in blocks (Milakov and Gimelshein 2018; Dao 2022).
#pragma once

#include <cmath>

#include "cuda/tile/ptx/special.cuh"
#include "cuda/tile/reg.cuh"

namespace jaxkern {

// lse of a query that sees no key, as the reference has it: its hidden logits are 0.7 of the lowest
// float32, and the logarithm of their number is lost in rounding.
constexpr float kHiddenLse = -0.7f * 3.40282346638528859812e38f;

// tanh, absolute error below 1e-6: tanh.approx, with 2^-11 relative, would be felt in float16.
__device__ __forceinline__ float tanh_accurate(float x) {
  return 1.0f -
         2.0f * tile::ptx::reciprocal_approx(tile::ptx::exp2_approx(x * (2 * tile::kLog2E)) + 1.0f);
}

// x = tanh(x * factor), the capped logits in units of the cap.
template <int kCols>
__device__ __forceinline__ void cap_logits(tile::RegisterTile<float, 64, kCols>& x, float factor) {
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) x.data[i] = tanh_accurate(x.data[i] * factor);
}

// The largest of this thread's elements of row i, in four chains: one would wait for each result.
template <int kCols>
__device__ __forceinline__ float thread_max(const tile::RegisterTile<float, 64, kCols>& x, int i) {
  float max[4] = {x.at(0, i, 0), x.at(0, i, 1), x.at(1, i, 0), x.at(1, i, 1)};
#pragma unroll
  for (int j = 2; j < kCols / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float& chain = max[2 * (j % 2) + c];
      chain = fmaxf(chain, x.at(j, i, c));
    }
  }
  return fmaxf(fmaxf(max[0], max[1]), fmaxf(max[2], max[3]));
}

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
    tile::RowVector rescale, origin;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float new_max = fmaxf(max[i], tile::row_max(thread_max(x, i)));
      origin[i] = (kMasked && new_max == -INFINITY) ? 0.0f : new_max * scale_log2;
      rescale[i] = tile::ptx::exp2_approx(max[i] * scale_log2 - origin[i]);
      max[i] = new_max;
    }
    // Sums run some exponentials behind, so that none waits for its summand, which takes some 20
    // cycles: +3% to +5% at head dim 128.
    constexpr int kPairs = kCols / 8, kBehind = 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float even = 0.0f, odd = 0.0f;
#pragma unroll
      for (int j = 0; j < kPairs + kBehind; ++j) {
        if (j < kPairs) {
          x.at(j, i, 0) = tile::ptx::exp2_approx(x.at(j, i, 0) * scale_log2 - origin[i]);
          x.at(j, i, 1) = tile::ptx::exp2_approx(x.at(j, i, 1) * scale_log2 - origin[i]);
        }
        if (j >= kBehind) even += x.at(j - kBehind, i, 0), odd += x.at(j - kBehind, i, 1);
      }
      sum[i] = sum[i] * rescale[i] + (even + odd);
    }
    return rescale;
  }

  // The factors that normalise the output, 0 for rows that saw no key, and the natural log-sum-exp
  // of the scaled logits.
  __device__ __forceinline__ tile::RowVector finish(tile::RowVector& lse) {
    tile::RowVector inverse;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] = tile::row_sum(sum[i]);
      const bool hidden = sum[i] == 0.0f;
      inverse[i] = hidden ? 0.0f : 1.0f / sum[i];
      lse[i] = hidden ? kHiddenLse : (max[i] * scale_log2 + log2f(sum[i])) * tile::kLn2;
    }
    return inverse;
  }
};

// Backward, on tiles whose rows are keys and whose columns are queries.

// x(key, query) = 2^(x * scale_log2 - lse_log2[query]), and the same rounded. With a soft cap,
// whose logits come in units of the cap, x is multiplied by the cap's slope too: what dP - delta
// takes.
template <bool kSoftCap, class T, int kCols>
__device__ __forceinline__ void exponentiate(tile::RegisterTile<float, 64, kCols>& x,
                                             tile::RegisterTile<T, 64, kCols>& rounded,
                                             const float* lse_log2, float scale_log2) {
#pragma unroll
  for (int j = 0; j < kCols / 8; ++j) {
    const float2 lse = *reinterpret_cast<const float2*>(lse_log2 + tile::fragment_col(j));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 logit = tile::pair(x, j, i);
      float a = tile::ptx::exp2_approx(logit.x * scale_log2 - lse.x);
      float b = tile::ptx::exp2_approx(logit.y * scale_log2 - lse.y);
      rounded.data[2 * j + i] = tile::pack<T>(a, b);
      if constexpr (kSoftCap) {  // the slope of a hidden logit would be -inf
        a *= fmaxf(1.0f - logit.x * logit.x, 0.0f);
        b *= fmaxf(1.0f - logit.y * logit.y, 0.0f);
      }
      x.at(j, i, 0) = a;
      x.at(j, i, 1) = b;
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

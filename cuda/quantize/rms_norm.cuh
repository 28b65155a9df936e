// What RmsNorm (Zhang and Sennrich, 2019) does with a run: x * rstd * weight, and the squares for
// rstd = 1 / sqrt(mean(x^2) + epsilon).
#pragma once

#include "cuda/quantize/sources.cuh"
#include "cuda/tile/reduce.cuh"

namespace jaxkern::quantize {

// The weights from column `col` on.
template <class T>
__device__ __forceinline__ Weights<T> load_weights(const QuantizeParams& p, int64_t col, int inside,
                                                   bool aligned) {
  Weights<T> weights;
  weights.load(reinterpret_cast<const uint32_t*>(p.weight) + col, inside, aligned);
  return weights;
}

// In the order of rms_norm, rounded to T.
template <class T>
__device__ __forceinline__ void normalise(Load<T>& x, float rstd, const Weights<T>& weights) {
#pragma unroll
  for (int w = 0; w < kLoadBytes / 4; ++w) {
    float y[kPerWord<T>];
#pragma unroll
    for (int e = 0; e < kPerWord<T>; ++e) {
      const float weight = __uint_as_float(weights.words.data[w * kPerWord<T> + e]);
      y[e] = element<T>(x.words.data[w], e) * rstd * weight;
    }
    x.words.data[w] = word_of<T>(y);
  }
}

template <class T>
__device__ __forceinline__ float sum_of_squares(const Load<T>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kVec<T>; ++e) sum += element<T>(x, e) * element<T>(x, e);
  return sum;
}

// rstd of a row whose squares have this sum.
__device__ __forceinline__ float rstd_of(float sum, const QuantizeParams& p) {
  return rsqrtf(sum / static_cast<float>(p.cols) + p.epsilon);
}

}  // namespace jaxkern::quantize

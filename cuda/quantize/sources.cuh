// Where the elements that are quantised come from. A source has
//
//   kInputs, kOutputs   the numbers of arrays it reads and of matrices it makes
//   kThreadsPerSm       that share its registers in kernels of tiles
//   kRowsAtOnce         of a thread's patch of a tile, whose loads are under way together
//   compute(in, out)    runs of the outputs from those of the inputs at the same place
//
// Results are rounded to T, so that they are quantised as if they had been in memory. Runs that do
// not exist are zeros, and so is what comes from them.
#pragma once

#include "cuda/quantize/elements.cuh"
#include "cuda/tile/ptx/special.cuh"

namespace jaxkern::quantize {

// A word of the elements next to each other.
template <class T>
__device__ __forceinline__ uint32_t word_of(const float (&x)[kPerWord<T>]) {
  if constexpr (kPerWord<T> == 1) {
    return __float_as_uint(x[0]);
  } else {
    return tile::pack<T>(x[0], x[1]);
  }
}

// out[o][e] = compute(in[0][e], in[1][e], ...)[o] for all elements e.
template <class T, int kInputs, int kOutputs, class Compute>
__device__ __forceinline__ void for_each_element(const Load<T> (&in)[kInputs],
                                                 Load<T> (&out)[kOutputs], const Compute& compute) {
#pragma unroll
  for (int w = 0; w < kLoadBytes / 4; ++w) {
    float results[kOutputs][kPerWord<T>];
#pragma unroll
    for (int e = 0; e < kPerWord<T>; ++e) {
      float x[kInputs], y[kOutputs];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) x[i] = element<T>(in[i].words.data[w], e);
      compute(x, y);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) results[o][e] = y[o];
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) out[o].words.data[w] = word_of<T>(results[o]);
  }
}

// 1 / (1 + e^-x), relative error 2^-21; exactly 0, 0.5 and 1 at -100, 0 and 100.
__device__ __forceinline__ float sigmoid(float x) {
  return tile::ptx::reciprocal_approx(1.0f + tile::ptx::exp2_approx(-tile::kLog2E * x));
}

struct Matrix {
  static constexpr int kInputs = 1, kOutputs = 1;
  static constexpr int kThreadsPerSm = 1024, kRowsAtOnce = 8;

  template <class T>
  __device__ __forceinline__ static void compute(const Load<T> (&in)[1], Load<T> (&out)[1]) {
    out[0] = in[0];
  }
};

// silu(gate) * up, with silu(x) = x * sigmoid(x).
struct Swiglu {
  static constexpr int kInputs = 2, kOutputs = 1;
  static constexpr int kThreadsPerSm = 512, kRowsAtOnce = 4;

  template <class T>
  __device__ __forceinline__ static void compute(const Load<T> (&in)[2], Load<T> (&out)[1]) {
    for_each_element<T>(in, out, [](const float (&x)[2], float (&y)[1]) {
      const auto [gate, up] = x;
      y[0] = gate * sigmoid(gate) * up;
    });
  }
};

// The gradients of gate and up, from gate, up and the gradient of the product.
struct SwigluGrad {
  static constexpr int kInputs = 3, kOutputs = 2;
  static constexpr int kThreadsPerSm = 512, kRowsAtOnce = 4;

  template <class T>
  __device__ __forceinline__ static void compute(const Load<T> (&in)[3], Load<T> (&out)[2]) {
    for_each_element<T>(in, out, [](const float (&x)[3], float (&y)[2]) {
      const auto [gate, up, dh] = x;
      const float s = sigmoid(gate);
      y[0] = dh * up * (s * (1.0f + gate * (1.0f - s)));
      y[1] = dh * (gate * s);
    });
  }
};

// x * rstd * weight. Kernels load x like a matrix, and normalise it (rms_norm.cuh) once they have
// rstd, which takes all of a row.
struct RmsNorm : Matrix {
  static constexpr int kThreadsPerSm = 768;
};

template <class Source>
inline constexpr bool kNormalises = std::is_same_v<Source, RmsNorm>;

// The weights of a run's columns: float32, whatever T is.
template <class T>
using Weights = Run<uint32_t, kVec<T>>;

// Whether runs of all inputs are aligned.
template <class Source, class T>
__host__ __device__ __forceinline__ bool inputs_aligned(const QuantizeParams& p) {
  bool aligned = !kNormalises<Source> || Weights<T>::aligned(p.weight, p.cols);
  for (int i = 0; i < Source::kInputs; ++i) aligned &= Load<T>::aligned(p.inputs[i], p.cols);
  return aligned;
}

}  // namespace jaxkern::quantize

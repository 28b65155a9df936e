// Quantisation with a scale for each row, in the natural orientation alone.
//
// Blocks are (threads of a row, rows): the threads that share threadIdx.y own one row of x. Each
// keeps kSlots runs of it in registers from the maximum to the cast; the rest of a wider row is
// read twice.
#pragma once

#include "cuda/quantize/sources.cuh"
#include "cuda/tile/reduce.cuh"

namespace jaxkern::quantize {

template <class Source>
inline constexpr int kSlots = 4 / Source::kOutputs;
inline constexpr int kMaxThreadsPerRow = 1024;

template <class Source, class T, class F>
__global__ void __launch_bounds__(kMaxThreadsPerRow) quantize_rows_kernel(const QuantizeParams p) {
  constexpr int kInputs = Source::kInputs, kOutputs = Source::kOutputs;
  using Out = Run<uint8_t, kVec<T>>;
  __shared__ uint32_t scratch[kOutputs][tile::kMaxWarps];
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t cols = row < p.rows ? p.cols : 0;  // a row past the end is empty
  const bool aligned = inputs_aligned<Source, T>(p);

  // The first column in slot s; slot kSlots is the first that is not kept.
  auto slot_col = [](int s) { return (s * int64_t{blockDim.x} + threadIdx.x) * kVec<T>; };
  const int64_t stride = int64_t{blockDim.x} * kVec<T>;

  auto load = [&](Load<T>(&in)[kInputs], int64_t col) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      const auto* from = static_cast<const Bits<T>*>(p.inputs[i]) + row * p.cols;
      in[i].load(from + col, inside(col, cols), aligned);
    }
  };
  uint32_t most[kOutputs] = {};
  auto see = [&](const Load<T>(&x)[kOutputs]) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      for (const uint32_t word : x[o].words.data) most[o] = larger<T>(most[o], magnitudes<T>(word));
    }
  };
  auto write = [&](int64_t col, const Load<T>(&x)[kOutputs], const Scale(&scale)[kOutputs]) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      void* values = p.outputs[o].values;
      uint8_t* to = static_cast<uint8_t*>(values) + row * p.cols;
      cast<F, T>(x[o], scale[o].inverse)
          .store(to + col, inside(col, cols), Out::aligned(values, p.cols));
    }
  };

  Load<T> in[kSlots<Source>][kInputs], x[kSlots<Source>][kOutputs];
#pragma unroll
  for (int s = 0; s < kSlots<Source>; ++s) load(in[s], slot_col(s));
#pragma unroll
  for (int s = 0; s < kSlots<Source>; ++s) {
    Source::template compute<T>(in[s], x[s]);
    see(x[s]);
  }
  for (int64_t col = slot_col(kSlots<Source>); col < cols; col += stride) {
    load(in[0], col);
    Load<T> beyond[kOutputs];
    Source::template compute<T>(in[0], beyond);
    see(beyond);
  }
  Scale scale[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    scale[o] = scale_of<F>(tile::row_max(largest<T>(most[o]), scratch[o]));
    if (threadIdx.x == 0 && row < p.rows) p.outputs[o].scale[row] = __uint_as_float(scale[o].bits);
  }
#pragma unroll
  for (int s = 0; s < kSlots<Source>; ++s) write(slot_col(s), x[s], scale);
  for (int64_t col = slot_col(kSlots<Source>); col < cols; col += stride) {
    load(in[0], col);
    Source::template compute<T>(in[0], x[0]);
    write(col, x[0], scale);
  }
}

}  // namespace jaxkern::quantize

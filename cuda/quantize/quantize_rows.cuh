// Quantisation in the natural orientation alone, with a scale for each row or, where rstd takes all
// of a row anyway, for each 128 columns of it.
//
// Blocks are (threads of a row, rows): the threads that share threadIdx.y own one row of x. Each
// keeps kSlots runs of it in registers from the maximum to the cast; the rest of a wider row is
// read again for each pass.
#pragma once

#include "cuda/quantize/rms_norm.cuh"

namespace jaxkern::quantize {

template <class Source>
inline constexpr int kSlots = 4 / Source::kOutputs;
inline constexpr int kMaxThreadsPerRow = 1024;

// A thread's part of a row.
template <class Source, class T>
struct RowPart {
  using Inputs = Load<T>[Source::kInputs];

  const QuantizeParams& p;
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t cols = row < p.rows ? p.cols : 0;  // a row past the end is empty
  const int64_t stride = int64_t{blockDim.x} * kVec<T>;
  const bool aligned = inputs_aligned<Source, T>(p);

  // The first column in slot s; slot kSlots is the first that is not kept.
  __device__ __forceinline__ int64_t col(int s) const { return s * stride + threadIdx.x * kVec<T>; }
  __device__ __forceinline__ void load(Inputs& in, int64_t col) const {
#pragma unroll
    for (int i = 0; i < Source::kInputs; ++i) {
      const auto* from = static_cast<const Bits<T>*>(p.inputs[i]) + row * p.cols;
      in[i].load(from + col, inside(col, cols), aligned);
    }
  }
  __device__ __forceinline__ void load_slots(Inputs (&in)[kSlots<Source>]) const {
#pragma unroll
    for (int s = 0; s < kSlots<Source>; ++s) load(in[s], col(s));
  }
  // Calls pass(col) for what the slots do not hold, by all threads of the row as often.
  template <class Pass>
  __device__ __forceinline__ void beyond_slots(const Pass& pass) const {
    int64_t first = kSlots<Source> * stride;
    for (; first < cols; first += stride) pass(first + threadIdx.x * kVec<T>);
  }
};

// rstd of the row, in all of its threads: as given, or computed, and then in p.rstd too.
template <class T>
__device__ __forceinline__ float row_rstd(const RowPart<RmsNorm, T>& part,
                                          const Load<T> (&in)[kSlots<RmsNorm>][1]) {
  __shared__ float scratch[tile::kMaxWarps];
  const QuantizeParams& p = part.p;
  if (p.rstd_in != nullptr) return part.row < p.rows ? p.rstd_in[part.row] : 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < kSlots<RmsNorm>; ++s) sum += sum_of_squares<T>(in[s][0]);
  part.beyond_slots([&](int64_t col) {
    Load<T> x[1];
    part.load(x, col);
    sum += sum_of_squares<T>(x[0]);
  });
  const float rstd = rstd_of(tile::row_sum(sum, scratch), p);
  if (threadIdx.x == 0 && part.row < p.rows) p.rstd[part.row] = rstd;
  return rstd;
}

// kBlock1x128: blockDim.x is at least kGroupLanes.
template <class Source, class T, class F, Scaling kScaling>
__global__ void __launch_bounds__(kMaxThreadsPerRow) quantize_rows_kernel(const QuantizeParams p) {
  constexpr int kInputs = Source::kInputs, kOutputs = Source::kOutputs;
  using Outputs = Load<T>[kOutputs];
  using Scales = Scale[kOutputs];
  using Out = Run<uint8_t, kVec<T>>;
  __shared__ uint32_t scratch[kOutputs][tile::kMaxWarps];
  const RowPart<Source, T> part{p};

  Load<T> in[kSlots<Source>][kInputs], x[kSlots<Source>][kOutputs];
  part.load_slots(in);
  float rstd = 0.0f;
  if constexpr (kNormalises<Source>) rstd = row_rstd(part, in);

  auto compute = [&](int64_t col, const Load<T>(&from)[kInputs], Outputs& to) {
    Source::template compute<T>(from, to);
    if constexpr (kNormalises<Source>) {
      normalise<T>(to[0], rstd, load_weights<T>(p, col, inside(col, part.cols), part.aligned));
    }
  };
  auto raise = [](uint32_t& most, const Load<T>& run) {
    for (const uint32_t word : run.words.data) most = larger<T>(most, magnitudes<T>(word));
  };
  auto write = [&](int64_t col, const Outputs& runs, const Scales& scale) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      void* values = p.outputs[o].values;
      uint8_t* to = static_cast<uint8_t*>(values) + part.row * p.cols;
      cast<F, T>(runs[o], scale[o].inverse)
          .store(to + col, inside(col, part.cols), Out::aligned(values, p.cols));
    }
  };

  Scales scale;
  if constexpr (kScaling == Scaling::kRow) {
    uint32_t most[kOutputs] = {};
    auto see = [&](const Outputs& runs) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) raise(most[o], runs[o]);
    };
#pragma unroll
    for (int s = 0; s < kSlots<Source>; ++s) {
      compute(part.col(s), in[s], x[s]);
      see(x[s]);
    }
    part.beyond_slots([&](int64_t col) {
      part.load(in[0], col);
      Outputs beyond;
      compute(col, in[0], beyond);
      see(beyond);
    });
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      scale[o] = scale_of<F>(tile::row_max(largest<T>(most[o]), scratch[o]));
      if (threadIdx.x == 0 && part.row < p.rows) {
        p.outputs[o].scale[part.row] = __uint_as_float(scale[o].bits);
      }
    }
#pragma unroll
    for (int s = 0; s < kSlots<Source>; ++s) write(part.col(s), x[s], scale);
    part.beyond_slots([&](int64_t col) {
      part.load(in[0], col);
      compute(col, in[0], x[0]);
      write(col, x[0], scale);
    });
  } else {
    static_assert(kScaling == Scaling::kBlock1x128);
    auto write_groups = [&](int64_t col, const Outputs& runs) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        uint32_t most = 0;
        raise(most, runs[o]);
        scale[o] = scale_of<F>(tile::warp_max(largest<T>(most), kGroupLanes<T>));
        if (threadIdx.x % kGroupLanes<T> == 0 && col < part.cols) {
          p.outputs[o].scale[col / kScaleBlock * scale_pitch(p.rows) + part.row] =
              __uint_as_float(scale[o].bits);
        }
      }
      write(col, runs, scale);
    };
#pragma unroll
    for (int s = 0; s < kSlots<Source>; ++s) {
      compute(part.col(s), in[s], x[s]);
      write_groups(part.col(s), x[s]);
    }
    part.beyond_slots([&](int64_t col) {
      part.load(in[0], col);
      compute(col, in[0], x[0]);
      write_groups(col, x[0]);
    });
  }
}

}  // namespace jaxkern::quantize

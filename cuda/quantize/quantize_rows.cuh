// Quantisation in the natural orientation alone, with a scale for each row or, where rstd takes all
// of a row anyway, for each 128 columns of it.
//
// Blocks are (threads of a row, rows): the threads that share threadIdx.y own one row of x. Each
// keeps kSlots runs of it in registers from the maximum to the cast; the rest of a wider row is
// read again for each pass. With rstd, which takes one more reduction, blocks go from row to row:
// the next one is on its way while this one is cast.
#pragma once

#include "cuda/quantize/rms_norm.cuh"

namespace jaxkern::quantize {

template <class Source>
inline constexpr int kSlots = 4 / Source::kOutputs;
template <class Source>
inline constexpr int kMaxThreadsPerRow = kNormalises<Source> ? 512 : 1024;
template <class Source>
inline constexpr int kRowsRegisters = kNormalises<Source> ? 80 : 64;  // 768 threads an SM, or 1024

// A thread's part of a row.
template <class Source, class T>
struct RowPart {
  using Inputs = Load<T>[Source::kInputs];

  const QuantizeParams& p;
  const int64_t row;
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
                                          const Load<T> (&in)[kSlots<RmsNorm>][1],
                                          float (&scratch)[tile::kMaxWarps]) {
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
__global__ void __maxnreg__(kRowsRegisters<Source>) quantize_rows_kernel(const QuantizeParams p) {
  constexpr int kInputs = Source::kInputs, kOutputs = Source::kOutputs;
  constexpr bool kStays = kNormalises<Source>;
  using Part = RowPart<Source, T>;
  using Inputs = typename Part::Inputs;
  using Outputs = Load<T>[kOutputs];
  using Scales = Scale[kOutputs];
  using Out = Run<uint8_t, kVec<T>>;
  __shared__ uint32_t scratch[kOutputs][tile::kMaxWarps];
  __shared__ float rstd_scratch[2][tile::kMaxWarps];  // of this row and the next one

  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  Load<T> in[kSlots<Source>][kInputs], x[kSlots<Source>][kOutputs];
  const Part first{p, row};
  first.load_slots(in);
  auto weights_at = [&](int64_t col) {
    return load_weights<T>(p, col, inside(col, p.cols), first.aligned);
  };

  for (int turn = 0;; ++turn) {
    const Part part{p, row};
    float rstd = 0.0f;
    if constexpr (kStays) rstd = row_rstd(part, in, rstd_scratch[turn % 2]);
#pragma unroll
    for (int s = 0; s < kSlots<Source>; ++s) {
      Source::template compute<T>(in[s], x[s]);
      if constexpr (kStays) normalise<T>(x[s][0], rstd, weights_at(part.col(s)));
    }
    if constexpr (kStays) {
      row += int64_t{gridDim.x} * blockDim.y;
      Part{p, row}.load_slots(in);
    }
    auto compute_beyond = [&](int64_t col, Outputs& to) {
      Inputs from;
      part.load(from, col);
      Source::template compute<T>(from, to);
      if constexpr (kStays) normalise<T>(to[0], rstd, weights_at(col));
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
      for (int s = 0; s < kSlots<Source>; ++s) see(x[s]);
      part.beyond_slots([&](int64_t col) {
        Outputs beyond;
        compute_beyond(col, beyond);
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
        Outputs beyond;
        compute_beyond(col, beyond);
        write(col, beyond, scale);
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
      for (int s = 0; s < kSlots<Source>; ++s) write_groups(part.col(s), x[s]);
      part.beyond_slots([&](int64_t col) {
        Outputs beyond;
        compute_beyond(col, beyond);
        write_groups(col, beyond);
      });
    }
    if (!kStays || row - threadIdx.y >= p.rows) return;
  }
}

}  // namespace jaxkern::quantize

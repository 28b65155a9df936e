// What units of turns work out: rstd of whole rows, or the largest magnitudes of whole columns.
#pragma once

#include "cuda/quantize/patch.cuh"
#include "cuda/quantize/turns.cuh"

namespace jaxkern::quantize {

// rstd of panels of kTile rows, by a warp for each row.
template <class T>
struct RstdUnits {
  static constexpr int kRows = Threads<T>::kWarps;   // of a unit
  static constexpr int kPerPanel = kTile / kRows;
  static constexpr int kAtOnce = 8;                  // loads of a thread

  static __device__ __forceinline__ void work(const QuantizeParams& p, int64_t unit, bool aligned) {
    const int lane = threadIdx.x % tile::kWarpSize;
    const int64_t row = unit * kRows + threadIdx.x / tile::kWarpSize;
    if (row >= p.rows) return;
    const auto* from = static_cast<const Bits<T>*>(p.inputs[0]) + row * p.cols;
    float sum = 0.0f;
    for (int64_t first = 0; first < p.cols; first += kAtOnce * tile::kWarpSize * kVec<T>) {
      Load<T> x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t col = first + (i * tile::kWarpSize + lane) * kVec<T>;
        x[i].load(from + col, inside(col, p.cols), aligned);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += sum_of_squares<T>(x[i]);
    }
    sum = tile::warp_sum(sum);
    if (lane == 0) p.rstd[row] = rstd_of(sum, p);
  }
};

// rstd alone.
template <class T>
__global__ void __launch_bounds__(Threads<T>::kThreads) rstd_kernel(const QuantizeParams p) {
  RstdUnits<T>::work(p, blockIdx.x, inputs_aligned<RmsNorm, T>(p));
}

// Raises the maxima of a tile's columns, which begin as zeros. All threads of the block call.
template <class T>
__device__ __forceinline__ void raise_columns(int32_t* amax, const QuantizeParams& p,
                                              const Patch<T>& x, const Place<T>& at,
                                              TileColumnMax<T>& columns) {
  columns.write(x, at);
  __syncthreads();
  const int64_t col = at.tile_col * kTile + threadIdx.x;
  if (threadIdx.x < kTile && col < p.cols) {
    atomicMax(amax + col, static_cast<int32_t>(columns.read(threadIdx.x)));
  }
}

}  // namespace jaxkern::quantize

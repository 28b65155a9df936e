// rstd of whole rows for kernels of tiles, which do not see them, from one read of x: some blocks
// work out rstd of the rows that others will need a little later. When those come, x is still in
// L2.
//
// Blocks take turns in the order that they start in, by a counter. Those of a panel of 128 rows are
// units, a warp for each row, and tiles. A block of a tile waits for the units of its panel alone,
// whose turns were earlier and which wait for nobody: so it ends. With a lead that is as long as
// the GPU has blocks at work, the units are done when the tiles load, and there is little to wait
// for.
//
//   turns   units 0 .. lead - 1 | units of lead, tiles of 0 | units of lead + 1, tiles of 1 | ...
#pragma once

#include "cuda/quantize/rms_norm.cuh"
#include "cuda/tile/ptx/atomic.cuh"

namespace jaxkern::quantize {

// Of a kernel whose blocks have kThreads, for panels of kRows rows.
template <int kThreads, int kRows>
struct Ahead {
  static constexpr int kWarps = kThreads / tile::kWarpSize;  // rows of a unit
  static constexpr int kUnits = kRows / kWarps;              // of a panel
  static constexpr int kAtOnce = 8;                          // loads of a thread

  struct Turn {
    bool is_unit;
    unsigned index;  // of all units or tiles
  };

  // Of all threads of the block.
  static __device__ __forceinline__ Turn take(const QuantizeParams& p) {
    __shared__ unsigned shared;
    if (threadIdx.x == 0) shared = static_cast<unsigned>(atomicAdd(p.progress, 1));
    __syncthreads();
    return turn(p, shared);
  }

  static __device__ __forceinline__ Turn turn(const QuantizeParams& p, unsigned t) {
    const auto panels = static_cast<unsigned>(tile::ceil_div(p.rows, kRows));
    const auto tiles = static_cast<unsigned>(tile::ceil_div(p.cols, kScaleBlock));  // of a panel
    const unsigned lead = min(static_cast<unsigned>(p.lead), panels);
    if (t < lead * kUnits) return {true, t};
    t -= lead * kUnits;
    const unsigned panel = t / (kUnits + tiles), rest = t % (kUnits + tiles);
    if (panel >= panels - lead) return {false, t - (panels - lead) * kUnits};
    if (rest < kUnits) return {true, (lead + panel) * kUnits + rest};
    return {false, panel * tiles + rest - kUnits};
  }

  // rstd of the rows of a unit.
  template <class T>
  static __device__ __forceinline__ void work(const QuantizeParams& p, unsigned unit,
                                              bool aligned) {
    const int lane = threadIdx.x % tile::kWarpSize;
    const int64_t row = int64_t{unit} * kWarps + threadIdx.x / tile::kWarpSize;
    if (row < p.rows) {
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
    __syncthreads();
    if (threadIdx.x == 0) tile::ptx::add_release(p.progress + 1 + unit / kUnits, 1);
  }

  // Until rstd of all of a panel is there. By all threads of the block.
  static __device__ __forceinline__ void wait(const QuantizeParams& p, int64_t panel) {
    if (threadIdx.x == 0) {
      while (tile::ptx::load_acquire(p.progress + 1 + panel) < kUnits) {
      }
    }
    __syncthreads();
  }
};

}  // namespace jaxkern::quantize
